"""`ff.grad` under transforms of torch.func, beside one `torch.func.grad` a loss; None where untouched stays so."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import funcfreeze as ff

ROUTES = {"task": "*", "adv": {"body": -0.3, "head": 1.0}, "size": {"head": 0.5}}
WEIGHTS = {"body": {"task": 1.0, "adv": -0.3}, "head": {"task": 1.0, "adv": 1.0, "size": 0.5}}

pytestmark = [  # torch.func's own: of jvp, of linearize
    pytest.mark.filterwarnings("ignore:`torch.jit.script`"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]


def losses(p, x):
    h = torch.tanh(p["body"] @ x)
    return {
        "task": (h * p["head"]).sum().sin(),
        "adv": h.square().sum() * p["head"].sum(),
        "size": p["head"].pow(3).sum(),
    }


def law(p, x):
    """The merged gradients in torch.func, one forward a loss."""
    apart = {name: grad(lambda q, name=name: losses(q, x)[name])(p) for name in ROUTES}
    return {path: sum(w * apart[name][path] for name, w in row.items()) for path, row in WEIGHTS.items()}


def ours(engine):
    f = ff.grad(losses, ROUTES, engine=engine)

    def touched(p, x):
        grads = f(p, x)
        assert grads["unused"] is None
        return {path: grads[path] for path in WEIGHTS}

    return touched


def size(gradients):
    """A number made of gradients."""
    return lambda p, x: sum(gradient.pow(3).sum() for gradient in gradients(p, x).values())


def dual(gradients, p, x):
    """The gradients and their tangents, in a dual level outside of torch.func."""
    params, tangents = p
    with forward_ad.dual_level():
        given = {path: forward_ad.make_dual(tensor, tangents[path]) for path, tensor in params.items()}
        found = {path: forward_ad.unpack_dual(gradient) for path, gradient in gradients(given, x).items()}
        return {path: g.primal for path, g in found.items()}, {path: g.tangent for path, g in found.items()}


TRANSFORMS = {
    "grad": lambda f, p, t, xs: grad(size(f))(p, xs[0]),
    "grad at an argument": lambda f, p, t, xs: grad(size(f), argnums=1)(p, xs[0]),
    "grad of grad": lambda f, p, t, xs: grad(lambda x: grad(size(f), argnums=1)(p, x).sum())(xs[0]),
    "vmap": lambda f, p, t, xs: vmap(f, (None, 0))(p, xs),
    "vmap of vmap": lambda f, p, t, xs: vmap(lambda a: vmap(lambda x: f(p, x * a))(xs))(xs[:, 0]),
    "vmap of parameters": lambda f, p, t, xs: vmap(lambda a: f({**p, "body": a * p["body"]}, xs[0]))(xs[:, 0]),
    "vmap of grad": lambda f, p, t, xs: vmap(grad(size(f)), (None, 0))(p, xs),
    "grad of vmap": lambda f, p, t, xs: grad(lambda q: vmap(size(f), (None, 0))(q, xs).sum())(p),
    "jvp": lambda f, p, t, xs: jvp(lambda q: f(q, xs[0]), (p,), (t,)),
    "jvp at an argument": lambda f, p, t, xs: jvp(lambda x: f(p, x), (xs[0],), (xs[1],)),
    "jvp of jvp": lambda f, p, t, xs: jvp(lambda y: jvp(lambda x: f(p, x), (y,), (xs[1],))[1], (xs[0],), (xs[2],)),
    "vjp": lambda f, p, t, xs: vjp(lambda q: f(q, xs[0]), p)[1]({path: t[path] for path in WEIGHTS}),
    "jacrev": lambda f, p, t, xs: jacrev(lambda q: f(q, xs[0]))(p),
    "jacfwd": lambda f, p, t, xs: jacfwd(lambda q: f(q, xs[0]))(p),
    "hessian": lambda f, p, t, xs: hessian(size(f), argnums=1)(p, xs[0]),
    "hessian of parameters": lambda f, p, t, xs: hessian(lambda q: size(f)(q, xs[0]))(p),
    "linearize": lambda f, p, t, xs: linearize(lambda x: f(p, x), xs[0])[1](xs[1]),
    "dual level": lambda f, p, t, xs: (
        dual(f, (p, t), xs[0]) if f is not law else jvp(lambda q: law(q, xs[0]), (p,), (t,))
    ),
    "functional.hvp": lambda f, p, t, xs: torch.autograd.functional.hvp(lambda x: size(f)(p, x), xs[0], xs[1]),
    "functional.jacobian": lambda f, p, t, xs: torch.autograd.functional.jacobian(
        lambda x: size(f)(p, x), xs[0], vectorize=True, strategy="forward-mode"
    ),
}


def assert_same(got, wanted):
    got, wanted = (torch.utils._pytree.tree_leaves(tree) for tree in (got, wanted))
    assert len(got) == len(wanted) > 0
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.fixture
def params():
    return {"body": torch.randn(3, 3), "head": torch.randn(3), "unused": torch.randn(2)}


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        *((name, "routed") for name in TRANSFORMS),
        *(
            pytest.param(name, "reference", marks=[pytest.mark.slow] * (name == "linearize"))  # traces for seconds
            for name in TRANSFORMS
        ),
    ],
)
def test_transforms(name, engine, params):
    tangents = {path: torch.randn_like(tensor) for path, tensor in params.items()}
    xs = torch.randn(5, 3)
    assert_same(TRANSFORMS[name](ours(engine), params, tangents, xs), TRANSFORMS[name](law, params, tangents, xs))


@pytest.mark.parametrize("engine", ["routed", "reference"])
def test_grad_mode_is_followed_as_torch_func_follows_it(engine, params):
    """Inside a transform no_grad cuts off reverse mode, and leaves forward mode; around one it cuts off the outside."""
    f, xs = ours(engine), torch.randn(4, 3)

    def without_graph(gradients):
        def cut(p, x):
            with torch.no_grad():
                return gradients(p, x)

        return cut

    for transform in ("grad", "vmap", "jvp", "jacfwd", "vmap of grad"):
        tangents = {path: torch.randn_like(tensor) for path, tensor in params.items()}
        found, wanted = (TRANSFORMS[transform](without_graph(g), params, tangents, xs) for g in (f, law))
        assert_same(found, wanted)
    required = {path: tensor.requires_grad_() for path, tensor in params.items()}
    at = [required["body"], required["head"]]
    every = [vmap(size(gradients), (None, 0))(required, xs).sum() for gradients in (f, law)]
    assert_same(*(torch.autograd.grad(total, at) for total in every))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not any(g.requires_grad for g in vmap(f, (None, 0))(required, xs).values())


@pytest.mark.parametrize("engine", ["routed", "reference"])
def test_losses_and_what_comes_beside_them_are_followed_too(engine, params):
    def with_aux(p, x):
        return losses(p, x), {"norm": p["unused"].norm(), "text": "fine"}

    f = ff.grad_and_value(with_aux, ROUTES, engine=engine, has_aux=True)

    def number(p, x):
        _, (values, aux) = f(p, x)
        assert aux["text"] == "fine"
        return sum(values.values()) * aux["norm"]

    def by_hand(p, x):
        return sum(losses(p, x).values()) * p["unused"].norm()

    xs = torch.randn(4, 3)
    assert_same(grad(number)(params, xs[0]), grad(by_hand)(params, xs[0]))
    assert_same(vmap(grad(number), (None, 0))(params, xs), vmap(grad(by_hand), (None, 0))(params, xs))


def test_maml_over_a_batch_of_tasks():
    """vmap over tasks of grad over an inner loop by `ff.grad`, through a module."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    params = {path: p.detach() for path, p in net.named_parameters()}
    x, y = torch.randn(3, 5, 2), torch.randn(3, 5, 1)  # three tasks

    def loss(p, x, y):
        return (functional_call(net, p, (x,)) - y).square().mean()

    def outer(inner):
        def adapted_loss(p, x, y):
            for _ in range(2):
                grads = inner(p, x, y)
                p = {path: q if grads[path] is None else q - 0.1 * grads[path] for path, q in p.items()}
            return loss(p, x, y)

        return vmap(grad(adapted_loss), (None, 0, 0))(params, x, y)

    def head_by_hand(p, x, y):
        found = grad(loss)(p, x, y)
        return {path: gradient if path.startswith("2.") else None for path, gradient in found.items()}

    on_the_head = ff.grad(lambda p, x, y: {"task": loss(p, x, y)}, {"task": "2.*"})
    assert_same(outer(on_the_head), outer(head_by_hand))


def test_toggle_says_that_it_cannot(params):
    f = ff.grad(losses, ROUTES, engine="toggle")
    message = "engine='toggle' calls backward\\(\\), which transforms .* do not see; use engine='reference' under them"
    with pytest.raises(RuntimeError, match=message):
        vmap(lambda x: f(params, x)["head"])(torch.randn(4, 3))
    with pytest.raises(RuntimeError, match=message):
        grad(lambda p: f(p, torch.randn(3))["head"].sum())(params)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
        f(params, torch.randn(3))


def test_hooks_are_refused_where_torch_func_would_not_run_them(params):
    def hooked(p, x):
        h = p["body"] @ x
        h.register_hook(lambda g: g * 2)
        return {"task": h.sum()}

    with pytest.raises(RuntimeError, match="use engine='routed' outside of its transforms, which does"):
        vmap(lambda x: ff.grad(hooked, {"task": "body"})(params, x)["body"])(torch.randn(4, 3))
