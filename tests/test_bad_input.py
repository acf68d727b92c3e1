"""Every mistake is a specific exception that names the place, both sides, and what to do; and changes nothing."""

from __future__ import annotations

import optree
import pytest
import torch
from torch import nn

import funcfreeze as ff


def model():
    return nn.ModuleDict({"encoder": nn.Linear(3, 2), "head": nn.Linear(2, 1)})


def losses(m, batch):
    h = m["encoder"](batch)
    return {"cls": m["head"](h).mean(), "adv": h.mean()}


ROUTES = {"cls": "*", "adv": "encoder"}
BATCH = torch.ones(4, 3)


def step(f=losses, m=None, routes=ROUTES, optimizer=None, **options):
    return ff.Step(m or model(), f, routes, optimizer=optimizer or ff.optim.sgd(0.1), **options)


def change(**changes):
    def changed(m, batch):
        found = losses(m, batch) | changes
        return {name: loss for name, loss in found.items() if loss != "missing"}

    return changed


@pytest.mark.parametrize("engine", ["routed", "reference", "toggle"])
@pytest.mark.parametrize(
    ("f", "error", "text"),
    [
        (
            change(extra=torch.ones(())),
            ff.RouteError,
            "loss 'extra' has no route; there are 'cls', 'adv' (route it, or return it beside the losses as a metric)",
        ),
        (
            change(adv="missing"),
            ff.RouteError,
            "there is a route for loss 'adv', which `losses` did not return; there are 'cls' (return None for a loss "
            "that is absent this step)",
        ),
        (change(adv=torch.ones(2, 3)), ff.RouteError, "loss 'adv' is not a scalar: its shape is (2, 3); reduce it"),
        (change(adv=torch.ones(1)), ff.RouteError, "loss 'adv' is not a scalar: its shape is (1,)"),
        (
            change(adv=torch.ones((), dtype=torch.int64)),
            ff.RouteError,
            "not a floating point number: its dtype is torch.int64",
        ),
        (change(adv=1.5), ff.RouteError, "loss 'adv' is not a tensor but float: 1.5"),
        (change(adv=torch.ones(())), ff.RouteError, "loss 'adv' does not require grad, so it can update nothing"),
        (lambda m, b: m["encoder"](b).mean(), TypeError, 'got a tensor of shape (): name it, {"loss": loss}'),
        (lambda m, b: [m["encoder"](b).mean()], TypeError, "`losses` returns a mapping such as"),
        (lambda m, b: (losses(m, b), 3), TypeError, "a pair of that and a mapping of metrics; got (dict, int)"),
        (lambda m, b: (losses(m, b), {"cls": 0}), ff.RouteError, "cls: both a loss and a metric have this name"),
    ],
)
def test_what_losses_returned(f, error, text, engine):
    s = step(f, engine=engine)
    state = s.init()
    before = [leaf.clone() for leaf in optree.tree_leaves(state)]
    with pytest.raises(error) as caught:
        s(state, BATCH.to(torch.float64))
    assert text in str(caught.value)
    assert all(map(torch.equal, before, optree.tree_leaves(state)))


def test_all_that_is_wrong_with_the_losses_at_once():
    s = step(change(adv="missing", extra=torch.ones(()), cls=torch.ones(2)))
    with pytest.raises(ff.RouteError) as caught:
        s(s.init(), BATCH.to(torch.float64))
    assert all(name in str(caught.value) for name in ("3 problems", "'adv'", "'extra'", "'cls' is not a scalar"))


def test_states_of_another_model():
    s, other = (
        step(),
        step(m=nn.ModuleDict({"encoder": nn.Linear(3, 2), "tail": nn.Linear(2, 1).float()}), routes={"cls": "*"}),
    )
    with pytest.raises(ValueError, match="this State is of another model or optimizer") as caught:
        s(other.init(), BATCH)
    assert "parameter head.weight: the Step has it, the State does not" in str(caught.value)
    assert "parameter tail.weight: the State has it, the Step does not" in str(caught.value)
    wide = step(m=nn.ModuleDict({"encoder": nn.Linear(4, 2), "head": nn.Linear(2, 1)}))
    with pytest.raises(ValueError, match=r"encoder.weight: the Step has shape \(2, 3\).*the State has shape \(2, 4\)"):
        s(wide.init(), BATCH)
    adam = step(optimizer=ff.optim.adam())
    with pytest.raises(ValueError, match=r"optimizer\['encoder.bias'\]\['exp_avg'\]: the Step's optimizer has it"):
        adam(s.init(), BATCH)
    with pytest.raises(ValueError, match="optimizer: the Step's optimizer keeps a tuple of 1, the State's a dict"):
        step(optimizer=ff.optim.chain(ff.optim.adam()))(s.init(), BATCH)
    with pytest.raises(TypeError, match=r"expected a State such as step.init\(\) gives, got dict"):
        s({}, BATCH)
    with pytest.raises(ValueError, match="state.step is a 0-d int64 tensor, got 3"):
        s(s.init().replace(step=3), BATCH)


def test_models_that_cannot_be_used():
    with pytest.raises(TypeError, match="the model is an nn.Module or a mapping of them, got int"):
        step(m=3)
    with pytest.raises(TypeError, match="a mapping of modules holds nn.Modules and nn.Parameters only, got 'a': int"):
        step(m={"a": 3})
    for name, text in (
        ("a.b", "use 'a_b'"),
        ("keys", "is taken by nn.ModuleDict itself; use 'keys_'"),
        ("", "non-empty"),
    ):
        with pytest.raises(ValueError, match=text):
            step(m={name: nn.Linear(1, 1)}, routes={"a": "*"})
    with pytest.raises(ValueError, match="lazy modules.*: weight, bias; run one batch through the model first"):
        step(m=nn.LazyLinear(3), routes={"a": "*"})


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
def test_wrapped_models_are_refused_with_the_reason():
    scripted = torch.jit.script(nn.Linear(1, 1))
    with pytest.raises(TypeError, match="the model is a ScriptModule, whose parameters cannot be exchanged; pass the"):
        step(m=scripted, routes={"a": "*"})
    with pytest.raises(TypeError, match="module 'a' is a ScriptModule"):
        step(m={"a": scripted}, routes={"a": "*"})


def test_distributed_wrappers_are_refused_with_the_reason(tmp_path):
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        linear, x = nn.Linear(2, 2), torch.ones(1, 2)
        ff.backward({"a": linear(x).sum()}, {"a": "*"}, linear)  # nothing is around it yet
        linear.zero_grad()
        parallel = nn.parallel.DistributedDataParallel(linear)
        from torch.distributed.fsdp import fully_shard

        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        sharded = fully_shard(nn.Linear(2, 2), mesh=mesh)
        inside = nn.Sequential(parallel)
        wrapped_by = (
            r"wrapped by DistributedDataParallel, which reduces gradients by hooks.*funcfreeze\.combine.*\.module"
        )
        sharded_by = "sharded by fully_shard.*pass the module before it is sharded"
        averaged_by = r"every rank would go on with its own. Use ff.combine\(.*no_sync"
        loss = {"a": torch.ones((), requires_grad=True)}
        for wrapped, of_step, of_backward in (
            (parallel, wrapped_by, averaged_by),
            (inside, wrapped_by, wrapped_by),
            (sharded, sharded_by, sharded_by),
        ):
            with pytest.raises(TypeError, match=of_step):
                step(m=wrapped, routes={"a": "*"})
            with pytest.raises(TypeError, match=of_backward):
                ff.backward(loss, {"a": "*"}, wrapped)
        for wrapped, text in ((inside, wrapped_by), (sharded, sharded_by)):
            with pytest.raises(TypeError, match=text):
                ff.combine(loss, {"a": "*"}, wrapped)
        for around in (linear, nn.Sequential(linear), {"net": linear}, {"net": parallel}):
            with pytest.raises(TypeError, match=averaged_by):
                ff.backward(loss, {"a": "*"}, around)
        with parallel.no_sync():
            ff.backward({"a": parallel(x).sum()}, {"a": "weight"}, parallel)
        assert (parallel.module.weight.grad, parallel.module.bias.grad) == (pytest.approx(torch.ones(2, 2)), None)
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*nested.*:UserWarning")  # torch says once in a process that they are a prototype
def test_a_strided_nested_parameter():
    m = nn.Module()
    m.weight = nn.Parameter(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
    with pytest.raises(ValueError, match=r"strided nested parameters: weight; .* use layout=torch.jagged"):
        step(m=m, routes={"a": "*"})


def test_post_accumulate_hooks_are_refused():
    m = model()
    m["head"].weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match=r"head.weight .*hook that runs after .grad is accumulated"):
        step(m=m)


@pytest.mark.parametrize("engine", ["routed", "toggle"])
def test_a_parameter_changed_in_place(engine):
    def clipping(m, batch):
        with torch.no_grad():
            m["head"].weight.clamp_(-1, 1)
        return losses(m, batch)

    def replacing(m, batch):
        found = losses(m, batch)
        m["head"].weight = nn.Parameter(torch.ones(1, 2))
        return found

    m = model()
    weight = m["head"].weight
    s = step(clipping, m, engine=engine)
    state = s.init()
    before = [leaf.clone() for leaf in optree.tree_leaves(state)]
    with pytest.raises(RuntimeError, match=r"`losses` writes to parameter head.weight, which a loss may update"):
        s(state, BATCH.to(torch.float64))
    assert all(map(torch.equal, before, optree.tree_leaves(state)))
    s = step(replacing, m, engine=engine)
    with pytest.raises(RuntimeError, match="put another tensor in the place of parameter head.weight"):
        s(s.init(), BATCH.to(torch.float64))
    assert m["head"].weight is weight


def test_an_in_place_write_that_autograd_sees_names_the_parameter():
    def writing(m, batch):
        m["head"].weight.mul_(2.0)
        return losses(m, batch)

    s = step(writing)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad is being used in an in-place operation"):
        s(s.init(), BATCH.to(torch.float64))


def test_sparse_gradients_the_optimizer_cannot_take():
    m = nn.Embedding(5, 2, sparse=True)
    f = lambda m, batch: {"a": m(batch).sum()}  # noqa: E731
    s = step(f, m, {"a": "*"}, ff.optim.adam())
    state = s.init()
    before = [leaf.clone() for leaf in optree.tree_leaves(state)]
    with pytest.raises(ValueError, match="weight"):
        s(state, torch.tensor([1]))
    assert all(map(torch.equal, before, optree.tree_leaves(state)))
    s = step(f, m, {"a": "*"}, ff.optim.sgd(0.1))
    s(s.init(), torch.tensor([1]))


def test_arguments_of_step():
    with pytest.raises(ValueError, match="engine is one of 'routed', 'reference', 'toggle', got 'fast'"):
        step(engine="fast")
    with pytest.raises(TypeError, match="a torch optimizer class goes through funcfreeze.optim.from_torch"):
        step(optimizer=torch.optim.Adam)
    with pytest.raises(TypeError, match=r"losses is a function losses\(model, batch\), got dict"):
        step(f={})
    with pytest.raises(AttributeError):
        step().engine = "toggle"


def test_schedules_outside_a_step():
    with pytest.raises(
        TypeError,
        match="is a schedule of the step, and there is no step here: give ff.combine or ff.backward step=, use",
    ):
        ff.grad(lambda p: {"a": p["w"] * 1.0}, {"a": {"w": ff.optim.dann_schedule(3)}})({"w": torch.ones(())})
    s = step(routes={"cls": "*", "adv": {"encoder": lambda number: "much"}})
    with pytest.raises(ValueError, match=r"must return a finite number or a 0-d tensor, it returned 'much'"):
        s(s.init(), BATCH.to(torch.float64))
