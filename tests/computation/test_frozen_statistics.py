"""`Step(frozen_statistics=...)` beside what people write by hand: `model.train()`, and then `eval()` on some norms."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._functorch import config as functorch
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import funcfreeze as ff
from funcfreeze.computation.statistics import FrozenNorms
from vision import torchvision

AOT = {"backend": "aot_eager"}
RUNS = {
    "routed": {"compile": False},
    "reference": {"engine": "reference", "compile": False},
    "toggle": {"engine": "toggle", "compile": False},
    "compiled": {"compile": AOT},
}
EAGER_AND_COMPILED = [False, AOT]
SLOW = pytest.mark.slow
EAGER_AND_SLOWLY_COMPILED = [False, pytest.param(AOT, marks=SLOW)]
MODES = [True, True, False, True, False]
"""`train(mode)` before each of five steps."""


class Net(nn.Module):
    """Norms of all sorts in a backbone, and some outside of it."""

    def __init__(self, affine=True):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4, affine=affine),
            nn.ReLU(),
            nn.Sequential(nn.Conv2d(4, 4, 1), nn.InstanceNorm2d(4, affine=affine, track_running_stats=True), nn.Tanh()),
            nn.InstanceNorm2d(4),
            nn.GroupNorm(2, 4),
            nn.Dropout(0.3),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Sequential(
            nn.Linear(16, 6), nn.BatchNorm1d(6), nn.LayerNorm(6), nn.Dropout(0.2), nn.Linear(6, 3)
        )


def losses(model, batch):
    x, label = batch
    h = model.backbone(x)
    return {"cls": F.cross_entropy(model.head(h), label), "small": h.square().mean() + model.head[0](h).square().mean()}


def batch_of(turn):
    torch.manual_seed(100 + turn)
    return torch.randn(5, 3, 4, 4), torch.randint(3, (5,))


def rows_of(turn):
    return batch_of(turn)[0][:, :, 0, 0]


ROUTES = {
    "routed": {"cls": "*", "small": {"backbone": 0.3}},
    "unrouted": {"cls": "head", "small": "head.0"},
    "without the norms": {
        "cls": ff.path("*") - ff.kind(nn.BatchNorm2d, nn.InstanceNorm2d),
        "small": {"backbone.0": -0.5},
    },
}


def freeze_backbone(model):
    """As users write it."""
    for m in model.backbone.modules():
        if isinstance(m, nn.BatchNorm2d | nn.InstanceNorm2d):
            m.eval()


def by_hand(model, f, plan, freeze, batch_of=batch_of, modes=MODES):
    """Plain eager PyTorch: gradients of every loss by `torch.autograd.grad`, added up, and torch's SGD.

    Not Adam, which makes steps of the rounding where a norm makes a gradient zero.
    """
    params = dict(model.named_parameters())
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    found = []
    for turn, mode in enumerate(modes):
        model.train(mode)
        freeze(model)
        batch = batch_of(turn)
        torch.manual_seed(turn)
        values = f(model, batch)
        sgd.zero_grad()
        for name, value in values.items():
            rows = {row.path: row.weights[name][0] for row in plan.rows if name in row.weights}
            given = torch.autograd.grad(value, [params[path] for path in rows], retain_graph=True, allow_unused=True)
            for (path, weight), gradient in zip(rows.items(), given, strict=True):
                if gradient is not None:
                    held = params[path].grad
                    params[path].grad = weight * gradient if held is None else held + weight * gradient
        found.append(
            (
                {name: value.detach().clone() for name, value in values.items()},
                {path: p.grad.clone() for path, p in params.items() if p.grad is not None},
            )
        )
        sgd.step()
    return found


def close(got, wanted):
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(
            got[name], wanted[name].detach(), rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


def flags(module):
    return {path: part.training for path, part in module.named_modules()}


def step_of(model, f=losses, routes=None, still="backbone", **options):
    routes = ROUTES["routed"] if routes is None else routes
    return ff.Step(model, f, routes, optimizer=ff.optim.sgd(0.05, momentum=0.9), frozen_statistics=still, **options)


def same_as_by_hand(step, f, freeze, batch_of=batch_of, modes=MODES, moves_flags=False):
    """Five steps beside the same by hand on a copy: losses, gradients, displacements and buffers."""
    model = step.module
    eager = copy.deepcopy(model)
    start = {path: p.detach().clone() for path, p in model.named_parameters()}
    wanted = by_hand(eager, f, step.plan, freeze, batch_of, modes)
    state = step.init()
    for turn, mode in enumerate(modes):
        model.train(mode)
        before = flags(model)
        batch = batch_of(turn)
        for take in (step.gradients, lambda *given: add_up(step.per_loss_gradients(*given))):
            torch.manual_seed(turn)
            close(take(state, batch), wanted[turn][1])
        torch.manual_seed(turn)
        if turn % 2:
            half = step.compute(state, batch)
            close(half.gradients, wanted[turn][1])
            state, metrics = step.apply_gradients(state, half)
        else:
            state, metrics = step(state, batch)
        close(metrics, wanted[turn][0])
        assert moves_flags or flags(model) == before
    close(
        {path: tensor - start[path] for path, tensor in state.params.items()},
        {path: p - start[path] for path, p in eager.named_parameters()},
    )
    close(dict(state.buffers), dict(eager.named_buffers()))
    return state


def add_up(rows):
    found = {}
    for row in rows.values():
        for path, gradient in row.items():
            found[path] = found[path] + gradient if path in found else gradient
    return found


@pytest.mark.parametrize(
    ("run", "routes"),
    [
        pytest.param(run, routes, marks=SLOW if run == "compiled" and routes != "routed" else [])
        for run in RUNS
        for routes in ROUTES
    ],
)
def test_as_by_hand(run, routes):
    model = Net()
    state = same_as_by_hand(step_of(model, routes=ROUTES[routes], **RUNS[run]), losses, freeze_backbone)
    assert int(state.buffers["backbone.1.num_batches_tracked"]) == 0
    assert int(state.buffers["head.1.num_batches_tracked"]) == 3  # of five, two in eval mode


@pytest.mark.parametrize("run", ["routed", "reference", "toggle", pytest.param("compiled", marks=SLOW)])
def test_as_by_hand_where_norms_have_no_parameters(run):
    same_as_by_hand(step_of(Net(affine=False), **RUNS[run]), losses, freeze_backbone)


def test_without_it_statistics_move():
    """The comparison can fail: a Step without it, and by-hand code that freezes nothing, are another program."""
    torch.manual_seed(0)
    with pytest.raises(AssertionError):
        same_as_by_hand(step_of(Net(), still=None, compile=False), losses, freeze_backbone)
    same_as_by_hand(step_of(Net(), still=None, compile=False), losses, lambda model: None)


@pytest.mark.parametrize(
    ("still", "frozen"),
    [
        ("*", ["backbone.1", "backbone.3.1", "head.1"]),
        ("backbone.3", ["backbone.3.1"]),
        ("backbone.1", ["backbone.1"]),
        ("*.1", ["backbone.1", "backbone.3.1", "head.1"]),
        ("backbone.?", ["backbone.1", "backbone.3.1"]),
        (["head", "backbone.1"], ["backbone.1", "head.1"]),
        (("head", ff.kind(nn.InstanceNorm2d)), ["backbone.3.1", "head.1"]),
        (ff.kind(nn.BatchNorm2d, nn.BatchNorm1d), ["backbone.1", "head.1"]),
        (ff.kind(nn.Sequential) - "head", ["backbone.1", "backbone.3.1"]),
        (ff.path("*") - "head", ["backbone.1", "backbone.3.1"]),
        (~ff.path("backbone.5") - "backbone.1", ["backbone.3.1", "head.1"]),
        (ff.regex(r".*\.3\.\d"), ["backbone.3.1"]),
        (ff.path("backbone") & ff.kind(nn.BatchNorm2d), ["backbone.1"]),
    ],
)
def test_selectors_of_modules(still, frozen):
    """Exactly these are in eval mode while `losses` runs, and everything else is as it was."""
    model = Net()
    step = step_of(model, still=still, compile=False)
    assert step.plan.frozen_statistics.norms == tuple(frozen)

    def freeze(model):
        for path in frozen:
            model.get_submodule(path).eval()

    same_as_by_hand(step, losses, freeze, modes=[True, True])


def test_only_the_norms_are_in_eval_mode():
    seen = []

    def looking(model, batch):
        seen.append(flags(model))
        return losses(model, batch)

    model = Net()
    step = step_of(model, looking, still="*", compile=False)
    step(step.init(), batch_of(0))
    changed = {path for path, training in seen[0].items() if not training}
    assert changed == {"backbone.1", "backbone.3.1", "head.1"}
    assert all(flags(model).values())


@pytest.mark.parametrize("compile", EAGER_AND_COMPILED)
def test_a_norm_that_the_user_put_into_eval_mode_stays_there(compile):
    model = Net()
    model.backbone[1].eval()
    model.head[1].eval()
    step = step_of(model, compile=compile)
    before, state = flags(model), step.init()
    for turn in range(2):
        state, _ = step(state, batch_of(turn))
        assert flags(model) == before
    assert all(int(state.buffers[f"{path}.num_batches_tracked"]) == 0 for path in ("backbone.1", "head.1"))


@pytest.mark.parametrize(
    ("run", "where", "donate"),
    [(run, "losses", donate) for run in ("routed", "reference", "toggle") for donate in (True, False)]
    + [(run, "backward", donate) for run in ("routed", "toggle") for donate in (True, False)]
    + [("compiled", "losses", True), ("compiled", "backward", False)],
)
def test_flags_are_put_back_after_an_error(run, where, donate):
    model = Net()
    model.backbone[1].eval()

    def raising(gradient):
        raise KeyError("in the backward")

    def fails(model, batch):
        found = losses(model, batch)
        if model.head[0].in_features == 0:
            raise KeyError("in losses")
        return found

    step = step_of(model, fails, donate=donate, **RUNS[run])
    state, before = step.init(), flags(model)
    torch.manual_seed(0)
    state, _ = step(state, batch_of(0))
    kept = {path: tensor.clone() for path, tensor in {**state.params, **state.buffers}.items()}
    handle = None
    if where == "losses":
        model.head[0].in_features = 0
    else:
        handle = model.head[0].weight.register_hook(raising)
    for take in (step, step.compute, step.gradients, step.per_loss_gradients):
        with pytest.raises(KeyError, match=f"in {'losses' if where == 'losses' else 'the backward'}"):
            take(state, batch_of(1))
        assert flags(model) == before
    for path, tensor in {**state.params, **state.buffers}.items():
        assert torch.equal(kept[path], tensor), path
    model.head[0].in_features = 16
    if handle is not None:
        handle.remove()
    state, _ = step(state, batch_of(1))
    assert int(state.buffers["backbone.1.num_batches_tracked"]) == 0
    assert int(state.buffers["head.1.num_batches_tracked"]) == 2


@pytest.mark.parametrize("compile", EAGER_AND_COMPILED)
@pytest.mark.parametrize("how", ["train", "one", "flag"])
def test_losses_that_put_a_frozen_norm_into_train_mode(how, compile):
    def puts(model, batch):
        model.head.eval()
        if how == "train":
            model.train()
        elif how == "one":
            model.backbone[1].train()
        else:
            model.backbone[1].training = True
        return losses(model, batch)

    model = Net()
    step = step_of(model, puts, compile=compile)
    state, before = step.init(), flags(model)
    kept = {path: tensor.clone() for path, tensor in {**state.params, **state.buffers}.items()}
    names = "backbone.1, backbone.3.1" if how == "train" else "backbone.1"
    with pytest.raises(RuntimeError) as caught:
        step(state, batch_of(0))
    assert str(caught.value) == (
        f"`losses` has put {names} into train mode (by train() on a module around it, or training = True), and "
        "frozen_statistics keeps its running statistics: call train() and eval() outside of `losses`, between steps, "
        "or leave it out of frozen_statistics"
    )
    after = flags(model)
    assert {path: after[path] for path in ("backbone.1", "backbone.3.1")} == {
        path: before[path] for path in ("backbone.1", "backbone.3.1")
    }
    for path, tensor in {**state.params, **state.buffers}.items():
        assert torch.equal(kept[path], tensor), path


@pytest.mark.parametrize("compile", EAGER_AND_SLOWLY_COMPILED)
def test_losses_may_put_all_else_into_any_mode(compile):
    def puts(model, batch):
        model.head.eval()
        model.backbone.eval()
        with torch.no_grad():
            target = model.backbone(batch[0])
        model.backbone[6].train()
        model.head.train()
        found = losses(model, batch)
        return {**found, "small": (model.backbone(batch[0]) - target).square().mean()}

    same_as_by_hand(step_of(Net(), puts, compile=compile), puts, freeze_backbone, modes=[True, True], moves_flags=True)


@pytest.mark.parametrize("compile", EAGER_AND_SLOWLY_COMPILED)
def test_a_norm_at_two_paths(compile):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            norm = nn.BatchNorm1d(3)
            self.one, self.two = nn.Sequential(nn.Linear(3, 3), norm), nn.Sequential(nn.Linear(3, 3), norm)

    def f(model, x):
        return {"a": model.two(model.one(x)).square().mean()}

    for still in ("one", "two", "two.1", ff.kind(nn.BatchNorm1d)):
        step = step_of(Shared(), f, {"a": "*"}, still=still, compile=compile)
        assert step.plan.frozen_statistics.norms == ("one.1",)
        same_as_by_hand(step, f, lambda model: model.one[1].eval(), rows_of, [True, False, True])


def test_two_steps_over_one_module():
    """Each freezes others, eager and compiled in turn; nothing is compiled twice."""
    model = Net()
    stills = {"backbone": freeze_backbone, "head": lambda model: model.head[1].eval(), None: lambda model: None}
    steps = [step_of(model, still=still, compile=c) for still in stills for c in EAGER_AND_COMPILED]
    freezes = [freeze for freeze in stills.values() for _ in EAGER_AND_COMPILED]
    order = [1, 3, 0, 5, 2, 4, 1, 5, 3]
    eager = copy.deepcopy(model)
    params = dict(eager.named_parameters())
    sgd = torch.optim.SGD(eager.parameters(), lr=0.05, momentum=0.9)
    state = steps[0].init()
    for turn, which in enumerate(order):
        eager.train()
        freezes[which](eager)
        torch.manual_seed(turn)
        found = losses(eager, batch_of(turn))
        sgd.zero_grad()
        found["cls"].backward(retain_graph=True)
        inside = [p for path, p in params.items() if path.startswith("backbone")]
        for p, g in zip(inside, torch.autograd.grad(found["small"], inside, allow_unused=True), strict=True):
            if g is not None:
                p.grad += 0.3 * g
        sgd.step()
        torch.manual_seed(turn)
        state, _ = steps[which](state, batch_of(turn))
        assert all(flags(model).values())
    close(dict(state.params), params)
    close(dict(state.buffers), dict(eager.named_buffers()))
    assert [step.traces for step in steps] == [0, 1, 0, 1, 0, 1]


def test_modes_that_change_are_traced_again_and_found_again():
    model = Net()
    step = step_of(model, compile=AOT)
    state = step.init()
    for mode in (True, False, True, False):
        model.train(mode)
        state, _ = step(state, batch_of(0))
    assert step.traces == 2
    model.train()
    model.backbone[1].eval()  # it is in eval mode for the step, either way
    step(state, batch_of(0))
    assert step.traces == 2


@pytest.mark.parametrize("run", [*RUNS])
def test_verify(run):
    model = Net()
    model.backbone[3][1].eval()
    step = step_of(model, **RUNS[run])
    before = flags(model)
    report = ff.verify(step, step.init(), batch_of(0))
    assert report.ok, report
    assert flags(model) == before


def test_verify_freezes_in_the_recipe_too(monkeypatch):
    """A recipe that does not freeze is told from the step."""
    step = step_of(Net(), compile=False)
    monkeypatch.setattr(FrozenNorms, "holding", lambda frozen: nullcontext())  # what the recipe alone uses
    report = ff.verify(step, step.init(), batch_of(0), steps=1)
    assert not report.ok


@pytest.mark.parametrize("compile", EAGER_AND_SLOWLY_COMPILED)
def test_activation_checkpointing(compile):
    """The recomputation finds the same flags as the forward."""

    def f(model, batch):
        h = checkpoint(model.backbone, batch[0], use_reentrant=False)
        return {"cls": F.cross_entropy(model.head(h), batch[1]), "small": h.square().mean()}

    same_as_by_hand(step_of(Net(), f, compile=compile), f, freeze_backbone)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("compile", EAGER_AND_SLOWLY_COMPILED)
def test_a_parametrized_norm(compile):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    parametrize.register_parametrization(model[1], "weight", Doubled())

    def f(model, x):
        return {"a": model(x).square().mean()}

    for still in ("1", ff.kind(nn.BatchNorm1d)):
        step = step_of(copy.deepcopy(model), f, {"a": "*"}, still=still, compile=compile)
        same_as_by_hand(step, f, lambda model: model[1].eval(), rows_of)


@functorch.patch(donated_buffer=False)
def test_in_a_module_that_is_compiled():
    """torch refuses to walk compiled code with donated buffers twice, which losses that are kept apart want."""
    model = Net()
    eager = copy.deepcopy(model)
    model.backbone = torch.compile(model.backbone, backend="aot_eager")

    def one(model, batch):
        return {"cls": losses(model, batch)["cls"]}

    step, plain = (
        ff.Step(net, one, {"cls": "*"}, optimizer=ff.optim.sgd(0.1), frozen_statistics="backbone", compile=False)
        for net in (model, eager)
    )
    assert step.plan == plain.plan
    state, other = step.init(), plain.init()
    for turn in range(3):
        torch.manual_seed(turn)
        state, _ = step(state, batch_of(turn))
        torch.manual_seed(turn)
        other, _ = plain(other, batch_of(turn))
    close(dict(state.params), dict(other.params))
    close(dict(state.buffers), dict(other.buffers))


@pytest.mark.parametrize("compile", EAGER_AND_SLOWLY_COMPILED)
def test_a_residual_network(compile):
    net = torchvision().models.resnet18(num_classes=4)
    model = nn.ModuleDict({"backbone": net, "critic": nn.Linear(4, 1)}).to(torch.float64)

    def f(model, batch):
        h = model["backbone"](batch[0])
        return {"cls": F.cross_entropy(h, batch[1]), "dom": model["critic"](h).square().mean()}

    def freeze(model):
        for m in model["backbone"].modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()

    def batch_of(turn):
        torch.manual_seed(turn)
        return torch.randn(2, 3, 16, 16), torch.randint(4, (2,))

    routes = {"cls": "backbone.fc", "dom": {"critic": 1.0, "backbone.layer4": -0.1}}
    step = step_of(model, f, routes, compile=compile)
    assert str(step.plan).endswith("\nfrozen statistics  backbone (20 norms)")
    same_as_by_hand(step, f, freeze, batch_of, [True])


@pytest.fixture
def two_ranks():
    """A process group that this process takes for one of two; nothing that it sends arrives."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
@pytest.mark.parametrize("compile", EAGER_AND_COMPILED)
def test_a_synchronised_norm_communicates_nothing(two_ranks, compile):
    def f(model, x):
        return {"a": model(x).square().mean()}

    model = nn.Sequential(nn.Linear(3, 4), nn.SyncBatchNorm(4))
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on"):  # it wants to communicate
        model(torch.randn(5, 3))
    step = step_of(model, f, {"a": "*"}, still=ff.kind(nn.SyncBatchNorm), compile=compile)
    same_as_by_hand(step, f, lambda model: model[1].eval(), rows_of)


def test_a_model_that_is_a_norm():
    model = nn.BatchNorm1d(3)
    step = step_of(model, lambda model, x: {"a": model(x).square().mean()}, {"a": "*"}, still="*", compile=False)
    state, _ = step(step.init(), torch.randn(4, 3))
    assert int(state.buffers["num_batches_tracked"]) == 0
    assert model.training


def test_call_and_export_are_as_without():
    model = Net()
    step = step_of(model, compile=False)
    state, _ = step(step.init(), batch_of(0))
    seen = step.call(state, flags)
    assert all(seen.values())
    assert all(flags(step.export(state)).values())
    model.eval()
    assert not any(step.call(state, flags).values())


def test_a_copy_of_a_step_freezes_its_own_module():
    step = step_of(Net(), compile=False)
    other = copy.deepcopy(step)
    state, _ = other(other.init(), batch_of(0))
    assert int(state.buffers["backbone.1.num_batches_tracked"]) == 0
    assert int(state.buffers["head.1.num_batches_tracked"]) == 1


def test_a_lazy_norm_is_one_after_its_first_batch():
    model = nn.Sequential(nn.Linear(3, 4), nn.LazyBatchNorm1d(affine=False))

    def f(model, x):
        return {"a": model(x).square().mean()}

    with pytest.raises(
        ValueError, match=r"lazy modules\): 1.running_mean, 1.running_var; run one batch through the mo"
    ):
        step_of(model, f, {"a": "*"}, still="1")
    model(torch.randn(4, 3))
    step = step_of(model, f, {"a": "*"}, still=ff.kind(nn.BatchNorm1d), compile=False)
    state, _ = step(step.init(), torch.randn(4, 3))
    assert int(state.buffers["1.num_batches_tracked"]) == 1  # of the batch before


HERE = "; the norms with running statistics are backbone.1, backbone.3.1, head.1"
NOT_THERE = "frozen_statistics: path({}) matches no module; did you mean {}?"
NO_NORM = "frozen_statistics: {} matches no norm with running statistics"
WHERE = (
    "frozen_statistics: where(<lambda>) is asked about parameters (path, tensor); modules are selected here, by path, "
    "regex or kind"
)


@pytest.mark.parametrize(
    ("still", "message"),
    [
        ("bakbone", NOT_THERE.format("'bakbone'", "'backbone' or 'backbone.3' or 'backbone.1'") + HERE),
        ("backbone.5", NO_NORM.format("path('backbone.5')") + HERE),
        (
            "backbone.1.weight",
            NOT_THERE.format("'backbone.1.weight'", "'backbone.1' or 'backbone.3.1' or 'backbone.3'") + HERE,
        ),
        (ff.kind(nn.GroupNorm, nn.LayerNorm), NO_NORM.format("kind(GroupNorm, LayerNorm)") + HERE),
        (
            ff.kind(nn.Embedding),
            "frozen_statistics: kind(Embedding) matches no module; the modules here are BatchNorm1d, BatchNorm2d, "
            f"InstanceNorm2d, Net, Sequential{HERE}",
        ),
        (ff.where(lambda path, p: p.ndim == 1), WHERE + HERE),
        (
            ff.path("*") - "backbon",
            NOT_THERE.format("'backbon'", "'backbone' or 'backbone.3' or 'backbone.1'") + HERE,
        ),
        (
            ff.path("head") - "head.1",
            f"frozen_statistics: (path('head') - path('head.1')) leaves no norm with running statistics{HERE}",
        ),
        (
            ["backbone", "hed", ff.where(lambda path, p: True)],
            "\n  - ".join(["2 problems:", NOT_THERE.format("'hed'", "'head' or 'head.1'"), WHERE + HERE]),
        ),
        ([], "frozen_statistics: an empty list selects nothing; leave it out"),
        (
            True,
            'frozen_statistics selects modules by a string, or by path, regex or kind ("*" is all of them); got bool: '
            "True",
        ),
    ],
)
def test_mistakes_in_the_selection(still, message):
    with pytest.raises(ff.RouteError) as caught:
        step_of(Net(), still=still)
    assert str(caught.value) == message


def test_a_module_in_the_place_of_its_path():
    model = Net()
    with pytest.raises(ff.RouteError) as caught:
        step_of(model, still=model.backbone[3])
    assert (
        str(caught.value) == "frozen_statistics selects modules by their paths; for this Sequential write 'backbone.3'"
    )
    with pytest.raises(ff.RouteError, match="for this Linear write its path in the model"):
        step_of(model, still=[nn.Linear(1, 1)])


def test_a_model_without_such_norms():
    def f(model, x):
        return {"a": model(x).square().mean()}

    norms = [nn.LayerNorm(2), nn.GroupNorm(1, 2), nn.BatchNorm1d(2, track_running_stats=False), nn.InstanceNorm1d(2)]
    with pytest.raises(ff.RouteError) as caught:
        step_of(nn.Sequential(*norms), f, {"a": "*"}, still="*")
    assert str(caught.value) == (
        "frozen_statistics: path('*') matches no norm with running statistics; the model has none: its BatchNorm1d, "
        "GroupNorm, InstanceNorm1d, LayerNorm keeps none"
    )
    with pytest.raises(ff.RouteError, match=r"path\('\*'\) matches no norm with .*; the model has none$"):
        step_of(nn.Sequential(nn.Linear(2, 2)), f, {"a": "*"}, still="*")


def test_the_plan_says_so():
    model = Net()
    plan, without = step_of(model).plan, step_of(model, still=None).plan
    assert str(plan) == f"{without}\nfrozen statistics  backbone (2 norms)"
    assert plan != without
    assert "frozen_statistics" not in without.to_dict()
    assert ff.Plan.from_dict(plan.to_dict()) == plan
    assert str(ff.Plan.from_dict(plan.to_dict())) == str(plan)
    assert step_of(model, still=["backbone.1", ff.kind(nn.InstanceNorm2d)]).plan == plan  # the same norms
    assert step_of(model, still="*").plan != plan
    assert str(step_of(model, still=["backbone.1"]).plan).endswith("frozen statistics  backbone.1 (1 norm)")
    shown = str(step_of(model, still=["head", ff.kind(nn.InstanceNorm2d)]).plan)
    assert shown.endswith("frozen statistics  head, kind(InstanceNorm2d) (2 norms)")


@pytest.mark.parametrize("compile", EAGER_AND_COMPILED)
def test_a_plan_as_routes_freezes_what_it_says(compile):
    model = Net()
    plan = ff.Plan.from_dict(step_of(model).plan.to_dict())
    step = step_of(model, routes=plan, still=None, compile=compile)
    assert step.plan == plan
    same_as_by_hand(step, losses, freeze_backbone, modes=[True])
    assert step_of(model, routes=plan, still=["backbone.1", "backbone.3"]).plan == plan
    with pytest.raises(ff.RouteError) as caught:
        step_of(model, routes=plan, still="head")
    assert str(caught.value) == (
        "frozen_statistics selects head.1, and the plan that was given as routes freezes the statistics of backbone.1, "
        "backbone.3.1; leave one of them out"
    )
    model.backbone[1].track_running_stats = False
    with pytest.raises(ff.RouteError) as caught:
        step_of(model, routes=plan, still=None)
    assert str(caught.value) == (
        "the plan freezes the statistics of backbone.1, no norm with running statistics of the model; the norms with "
        "running statistics are backbone.3.1, head.1"
    )


def test_loops_of_the_users_own_refuse_such_a_plan():
    model = Net()
    plan = step_of(model).plan
    wanted = (
        "the plan freezes the running statistics of backbone.1, backbone.3.1, which a Step does while it calls the "
        "model; here you call it: put these norms into eval mode yourself (norm.eval()), and give the routes, or a "
        "plan of funcfreeze.plan(model, routes)"
    )
    found = losses(model, batch_of(0))
    calls = [
        lambda: ff.combine(found, plan, model),
        lambda: ff.backward(found, plan, model),
        lambda: ff.grad(lambda params, batch: {}, plan)(dict(model.named_parameters()), batch_of(0)),
    ]
    for call in calls:
        with pytest.raises(ff.RouteError) as caught:
            call()
        assert str(caught.value) == wanted
    ff.combine(found, ff.plan(model, ROUTES["routed"]), model).backward()
