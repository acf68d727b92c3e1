"""The step as users meet it: state in, state out; exceptions that change nothing; states that are spent."""

from __future__ import annotations

import copy
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcfreeze as ff


def network():
    return nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()),
            "cls": nn.Linear(6, 3),
            "dom": nn.Linear(6, 2),
            "still": nn.Linear(6, 6),
        }
    )


def losses(model, batch):
    h = model["encoder"](batch)
    label = torch.arange(len(batch))
    return {"cls": F.cross_entropy(model["cls"](model["still"](h)), label % 3), "dom": model["dom"](h).square().mean()}


ROUTES = {"cls": ["encoder", "cls"], "dom": {"dom": 1.0, "encoder": -0.1}}


def make(model=None, losses=losses, routes=ROUTES, optimizer=None, **options):
    return ff.Step(model or network(), losses, routes, optimizer=optimizer or ff.optim.adamw(1e-2), **options)


def everything(state):
    """The bytes of all tensors of a state."""
    return [leaf.clone() for leaf in optree.tree_leaves((state.params, state.buffers, state.optimizer, state.step))]


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


def recipe(model, batches):
    """The recipe in plain PyTorch, with AdamW over all parameters."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for batch in batches:
        optimizer.zero_grad()
        found = losses(model, batch)
        for loss, weight, allowed in (
            ("cls", 1.0, ("encoder", "cls")),
            ("dom", -0.1, ("encoder",)),
            ("dom", 1.0, ("dom",)),
        ):
            for path, parameter in model.named_parameters():
                parameter.requires_grad_(path.split(".")[0] in allowed)
            (weight * found[loss]).backward(retain_graph=True)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        optimizer.step()
    return model


@pytest.mark.parametrize("engine", ["routed", "reference", "toggle"])
@pytest.mark.parametrize("donate", [True, False])
def test_a_run_equals_the_recipe(engine, donate):
    model, batches = network(), [torch.randn(5, 4) for _ in range(6)]
    start = {path: p.detach().clone() for path, p in model.named_parameters()}
    step = make(model, engine=engine, donate=donate)
    state = step.init()
    for batch in batches:
        state, _ = step(state, batch)
    wanted = recipe(model, batches)
    assert int(state.step) == 6
    for path, p in wanted.named_parameters():
        torch.testing.assert_close(state.params[path] - start[path], p.detach() - start[path], rtol=1e-7, atol=1e-7)
    for path, buffer in wanted.named_buffers():
        torch.testing.assert_close(state.buffers[path], buffer)
    assert all(torch.equal(p, start[path]) for path, p in model.named_parameters()), "the module keeps its own values"


def test_export_writes_back_and_call_sees_the_state():
    model, batch = network(), torch.randn(5, 4)
    step = make(model)
    state, _ = step(step.init(), batch)
    outside = step.call(state, lambda m, x: m["cls"](m["encoder"](x)), batch)
    assert not outside.requires_grad
    before = everything(state)
    assert step.export(state) is model
    model.train()
    torch.testing.assert_close(model["cls"](model["encoder"](batch)), outside)
    assert same(before, everything(state)), "call and export leave the state alone"


def test_call_restores_flags_and_buffers():
    model = network()
    model["encoder"][1].eval()
    step = make(model)
    state = step.init()
    before = everything(state), [p.clone() for p in (*model.parameters(), *model.buffers())]

    def evaluate(m):
        m.train()
        m["encoder"](torch.randn(5, 4))
        m.eval()

    step.call(state, evaluate)
    assert model.training
    assert not model["encoder"][1].training
    assert same(before[0], everything(state))
    assert same(before[1], [*model.parameters(), *model.buffers()])


def test_train_and_eval_are_as_they_are_when_the_step_runs():
    model = network()
    step = make(model)
    state, _ = step(step.init(), torch.randn(5, 4))
    assert int(state.buffers["encoder.1.num_batches_tracked"]) == 1
    model.eval()
    state, _ = step(state, torch.randn(5, 4))
    assert int(state.buffers["encoder.1.num_batches_tracked"]) == 1


def test_what_is_frozen_is_shared_and_the_rest_copied():
    model = network()
    model["dom"].bias.requires_grad_(False)
    step = make(model)
    state = step.init()
    shared = {path for path, p in model.named_parameters() if state.params[path].data_ptr() == p.data_ptr()}
    assert shared == {"still.weight", "still.bias", "dom.bias"}
    assert set(state.optimizer) == set(step.plan.routed)
    adopted = step.init(copy=False)
    assert all(adopted.params[path].data_ptr() == p.data_ptr() for path, p in model.named_parameters())


def test_donation_reuses_storage_and_spends_the_state():
    step = make()
    state = step.init()
    pointer = state.params["cls.weight"].data_ptr()
    after, _ = step(state, torch.randn(5, 4))
    assert after.params["cls.weight"].data_ptr() == pointer
    assert repr(state) == "State(spent)"
    for use in (
        lambda: step(state, torch.randn(5, 4)),
        lambda: step.gradients(state, torch.randn(5, 4)),
        lambda: step.call(state, lambda m: None),
        lambda: step.export(state),
        lambda: state.params,
        lambda: optree.tree_leaves(state),
        lambda: state.replace(step=torch.tensor(0)),
    ):
        with pytest.raises(RuntimeError, match=r"this State is spent: a step with donate=True.*donate=False"):
            use()


def test_a_replaced_state_is_spent_with_its_origin():
    step = make()
    state = step.init()
    other = state.replace(step=torch.tensor(7))
    step(other, torch.randn(5, 4))
    with pytest.raises(RuntimeError, match="spent"):
        _ = state.params


def test_without_donation_the_old_state_stays():
    step, donating = make(donate=False), None
    state = step.init()
    before = everything(state)
    after, _ = step(state, torch.randn(5, 4))
    assert same(before, everything(state))
    donating = make(step.model)
    again, _ = donating(after, torch.randn(5, 4))
    assert int(again.step) == 2
    assert same(before, everything(state)), "a donating step on the new state does not reach the old one"


def test_a_copied_state_is_independent():
    step = make()
    state = step.init()
    mapped, copied = optree.tree_map(torch.clone, state), copy.deepcopy(state)
    before = everything(state)
    step(state, torch.randn(5, 4))
    assert same(before, everything(mapped))
    assert same(before, everything(copied))


def test_several_steps_share_one_state():
    """GAN-like alternation: neither step's init shares storage that the other may write to the module."""
    model = network()
    first = make(model, routes={"cls": "cls", "dom": "dom"})
    second = make(model, routes={"cls": "encoder", "dom": {"still": -1.0}})
    before = [p.clone() for p in model.parameters()]
    state = first.init()
    for _ in range(2):
        state, _ = first(state, torch.randn(5, 4))
        state, _ = second(state, torch.randn(5, 4))
    assert int(state.step) == 4
    assert same(before, list(model.parameters())), "what the first shared with the module, the second copied"
    assert {"cls.weight", "encoder.0.weight"} <= set(state.optimizer)
    assert float(state.optimizer["encoder.0.weight"]["step"]) == 2.0


def test_untouched_is_untouched():
    """No weight decay, no momentum, no count, not in the clip norm, for a loss that is absent this step."""

    def sometimes(model, batch):
        found = losses(model, batch[0])
        return {"cls": found["cls"], "dom": found["dom"] if batch[1] else None}

    step = make(losses=sometimes, optimizer=ff.optim.adamw(1e-2, weight_decay=0.5))
    state, metrics = step(step.init(), (torch.randn(5, 4), True))
    assert set(metrics) == {"cls", "dom"}
    before = state.params["dom.weight"].clone(), [v.clone() for v in state.optimizer["dom.weight"].values()]
    state, metrics = step(state, (torch.randn(5, 4), False))
    assert set(metrics) == {"cls"}
    assert torch.equal(before[0], state.params["dom.weight"])
    assert same(before[1], list(state.optimizer["dom.weight"].values()))
    assert float(state.optimizer["cls.weight"]["step"]) == 2.0
    nothing = make(losses=lambda m, b: {"cls": None, "dom": None})
    start = nothing.init()
    kept = everything(start)
    after, metrics = nothing(start, None)
    assert metrics == {}
    assert same(kept[:-1], everything(after)[:-1])


def test_weight_zero_is_touched():
    step = make(routes={"cls": ["encoder", "cls"], "dom": {"dom": 0.0}}, optimizer=ff.optim.adamw(1e-2))
    gradients = step.gradients(step.init(), torch.randn(5, 4))
    assert torch.equal(gradients["dom.weight"], torch.zeros(2, 6))
    state, _ = step(step.init(), torch.randn(5, 4))
    assert float(state.optimizer["dom.weight"]["step"]) == 1.0


def test_scheduled_weights_and_rates_read_the_step():
    schedule = ff.optim.linear_schedule(0.0, 1.0, 10)
    step = make(routes={"cls": "cls", "dom": {"dom": schedule}}, optimizer=ff.optim.sgd(schedule))
    state = step.init()
    batch = torch.randn(5, 4)
    plain = make(step.model, routes={"cls": "cls", "dom": "dom"}, optimizer=step.optimizer).gradients(state, batch)[
        "dom.bias"
    ]
    assert torch.equal(step.gradients(state, batch)["dom.bias"], torch.zeros(2))
    before = state.params["cls.bias"].clone()
    state, _ = step(state, batch)
    assert torch.equal(before, state.params["cls.bias"]), "the rate is 0 at step 0"
    torch.testing.assert_close(step.gradients(state, batch)["dom.bias"] * 10, plain)


def test_gradients_update_nothing():
    step = make()
    state = step.init()
    before = everything(state)
    batch = torch.randn(5, 4)
    merged = step.gradients(state, batch)
    apart = step.per_loss_gradients(state, batch)
    assert same(before, everything(state))
    assert set(apart["cls"]) == {row.path for row in step.plan.rows if "cls" in row.weights}
    for path, gradient in merged.items():
        torch.testing.assert_close(sum(row[path] for row in apart.values() if path in row), gradient)


@pytest.mark.parametrize("engine", ["routed", "reference", "toggle"])
def test_losses_are_called_once(engine):
    calls = []

    def counted(model, batch):
        calls.append(1)
        return losses(model, batch)

    step = make(losses=counted, engine=engine)
    state, _ = step(step.init(), torch.randn(5, 4))
    assert len(calls) == 1
    step.gradients(state, torch.randn(5, 4))
    assert len(calls) == 2


def test_ambient_no_grad_does_not_matter():
    step, batch = make(), torch.randn(5, 4)
    wanted = step.gradients(step.init(), batch)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            got = step.gradients(step.init(), batch)
        assert all(torch.equal(got[path], gradient) for path, gradient in wanted.items())


def test_metrics_are_detached_scalars_beside_what_losses_returned():
    def with_metrics(model, batch):
        return losses(model, batch), {"accuracy": model["cls"].weight.mean(), "note": "fine"}

    _, metrics = (step := make(losses=with_metrics))(step.init(), torch.randn(5, 4))
    assert set(metrics) == {"cls", "dom", "accuracy", "note"}
    assert all(metrics[name].ndim == 0 and not metrics[name].requires_grad for name in ("cls", "dom", "accuracy"))


def test_a_metric_that_is_a_parameter_keeps_its_value():
    model = nn.Linear(3, 1)

    def losses(m, batch):
        return {"a": m(batch).sum()}, {"bias": m.bias}

    step = ff.Step(model, losses, {"a": "*"}, optimizer=ff.optim.sgd(0.1))
    before = model.bias.detach().clone()
    _, metrics = step(step.init(), torch.ones(2, 3))
    assert torch.equal(metrics["bias"], before)


class Boom(Exception):
    pass


def test_an_exception_changes_nothing():
    model = network()
    step = make(model)
    state, _ = step(step.init(), torch.randn(5, 4))
    inside = [t.clone() for t in (*model.parameters(), *model.buffers())]
    before = everything(state)

    def failing(where):
        def f(m, batch):
            m["encoder"](batch)
            if where == "forward":
                raise Boom
            found = losses(m, batch)
            return {**found, "extra": found["cls"]} if where == "names" else (found, {"cls": 1})

        return f

    def raising_schedule(number):
        raise Boom

    broken = [
        (make(model, losses=failing("forward")), Boom),
        (make(model, losses=failing("names")), ff.RouteError),
        (make(model, losses=failing("clash")), ff.RouteError),
        (make(model, optimizer=ff.optim.adamw(raising_schedule)), Boom),
        (make(model, routes=ROUTES | {"cls": {"cls": raising_schedule}}), Boom),
    ]
    for other, error in broken:
        with pytest.raises(error):
            other(state, torch.randn(5, 4))
        assert same(before, everything(state))
        assert same(inside, [*model.parameters(), *model.buffers()])
    state, _ = step(state, torch.randn(5, 4))


def test_a_mapping_of_modules():
    parts = {"gen": nn.Linear(2, 3), "disc": nn.Linear(3, 1)}

    def losses(model, batch):
        score = model["disc"](model["gen"](batch)).mean()
        return {"gen": -score, "disc": score}

    step = ff.Step(parts, losses, {"gen": "gen", "disc": "disc"}, optimizer=ff.optim.sgd(0.1))
    assert [row.path for row in step.plan.rows] == ["gen.weight", "gen.bias", "disc.weight", "disc.bias"]
    state, _ = step(step.init(), torch.randn(4, 2))
    assert step.export(state) is parts
    assert torch.equal(parts["gen"].weight, state.params["gen.weight"])


def test_any_optimizer_of_torch():
    step = make(optimizer=ff.optim.from_torch(torch.optim.RMSprop, lr=1e-2, momentum=0.9))
    state = step.init()
    for _ in range(3):
        state, _ = step(state, torch.randn(5, 4))
    assert float(state.optimizer["cls.weight"]["step"]) == 3.0


def test_partitioned_optimizers_see_ties_and_kinds():
    model = network()
    optimizer = ff.optim.partition(
        {
            ff.kind(nn.Linear): ff.optim.adam(1e-3),
            ~ff.kind(nn.Linear): ff.optim.chain(ff.optim.clip_by_global_norm(1.0), ff.optim.sgd(0.1)),
        }
    )
    step = make(model, optimizer=optimizer)
    state, _ = step(step.init(), torch.randn(5, 4))
    assert int(state.step) == 1


def untouched_by(step, state, *others):
    """Run a step on a state and see that the values of other states and modules stay."""
    before = [[t.clone() for t in tensors] for tensors in others]
    step(state, torch.randn(5, 4))
    assert all(same(one, list(other)) for one, other in zip(before, others, strict=True))


def test_states_made_elsewhere_are_copied_before_they_are_overwritten():
    step = make()
    state = step.init()
    moved = optree.tree_map(lambda tensor: tensor.to("cpu"), state)
    untouched_by(step, moved, state.params.values(), optree.tree_leaves(state.optimizer))
    other = step.init()
    mixed = step.init().replace(params=other.params)
    untouched_by(step, mixed, other.params.values())
    own = {path: p.detach() for path, p in step.module.named_parameters()}
    untouched_by(step, step.init().replace(params=own), list(step.module.parameters()))
    narrow = make(step.model, routes={"cls": "cls", "dom": "dom"})
    wide = make(step.model, routes={"cls": "*", "dom": "dom"})
    untouched_by(wide, optree.tree_map(lambda tensor: tensor, narrow.init()), list(step.module.parameters()))


def test_a_shallow_copy_is_spent_with_its_origin():
    step = make()
    state = step.init()
    step(copy.copy(state), torch.randn(5, 4))
    assert repr(state) == "State(spent)"


def test_a_pickled_state_goes_on():
    step = make()
    state, _ = step(step.init(), torch.randn(5, 4))
    batch = torch.randn(5, 4)
    again, _ = step(pickle.loads(pickle.dumps(state)), batch)
    state, _ = step(state, batch)
    assert same(everything(state), everything(again))


def test_threads_may_step_on_one_module():
    def slow(model, batch):
        h = model[0](batch)
        time.sleep(0.002)
        return {"a": model[1:](h).square().mean()}

    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    parameters = list(model.parameters())
    batch = torch.randn(4, 3)

    def run(_):
        step = ff.Step(model, slow, {"a": "*"}, optimizer=ff.optim.sgd(0.1))
        state = step.init()
        for _ in range(8):
            state, _ = step(state, batch)
        return state.params

    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(run, range(3))
    assert all(same(list(first.values()), list(other.values())) for other in others)
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))


@pytest.mark.parametrize("engine", ["routed", "reference", "toggle"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scalar_parameters_keep_their_dtype_under_scheduled_weights(engine, dtype):
    model = nn.ParameterDict(
        {"s": nn.Parameter(torch.ones((), dtype=dtype)), "v": nn.Parameter(torch.ones(2, dtype=dtype))}
    )
    routes = {"a": {"s": ff.optim.linear_schedule(0.1, 0.5, 10), "v": 0.5}}
    step = ff.Step(model, lambda m, b: {"a": (m["s"] * m["v"]).sum()}, routes, optimizer=ff.optim.adam(), engine=engine)
    gradients = step.gradients(step.init(), None)
    assert {path: gradient.dtype for path, gradient in gradients.items()} == {"s": dtype, "v": dtype}
    step(step.init(), None)


@pytest.mark.parametrize("engine", ["routed", "toggle", "reference"])
def test_a_loss_that_is_a_view_of_a_parameter_keeps_its_value(engine):
    step = ff.Step(
        nn.Linear(2, 2),
        lambda model, batch: {"a": model.bias[0], "b": model.weight[0, 0]},
        {"a": "*", "b": "*"},
        optimizer=ff.optim.sgd(0.5),
        engine=engine,
    )
    state = step.init()
    wanted = [float(state.params["bias"][0]), float(state.params["weight"][0, 0])]
    _, metrics = step(state, None)
    assert [float(metrics["a"]), float(metrics["b"])] == wanted


def test_metrics_that_share_memory_with_a_parameter_keep_their_values():
    model = nn.Linear(3, 1)

    def losses(m, batch):
        return {"a": m(batch).sum()}, {"detached": m.bias.detach(), "view": [m.weight.data[0, 1:]]}

    step = ff.Step(model, losses, {"a": "*"}, optimizer=ff.optim.sgd(0.1))
    _, metrics = step(step.init(), torch.ones(2, 3))
    assert torch.equal(metrics["detached"], model.bias)
    assert torch.equal(metrics["view"][0], model.weight[0, 1:])


class Memory(nn.Module):
    def __init__(self, start):
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.register_buffer("memory", start)

    def forward(self, x):
        h = self.linear(x)
        self.memory = h.mean(0) if self.memory is None else None
        return h


@pytest.mark.parametrize(
    ("start", "text"),
    [
        (
            None,
            "the forward made a buffer, memory, that was not there, or None, when the Step was built; run one batch",
        ),
        (torch.zeros(2), "the forward removed buffer memory or set it to None; give it a value instead"),
    ],
)
def test_buffers_that_come_and_go(start, text):
    model = Memory(start)
    step = ff.Step(model, lambda m, b: {"a": m(b).sum()}, {"a": "*"}, optimizer=ff.optim.sgd(0.1))
    with pytest.raises(RuntimeError, match=text):
        step(step.init(), torch.randn(3, 4))
    assert model.memory is start


def test_a_custom_transform_with_wrong_updates_changes_nothing():
    wrong = ff.optim.Transform(
        lambda params: (), lambda grads, state, params, *, step=None: ({**grads, "cls.bias": torch.ones(7)}, state)
    )
    step = make(optimizer=wrong)
    state = step.init()
    before = everything(state)
    with pytest.raises(ValueError, match=r"cls.bias: the update has shape \(7,\), the parameter has shape \(3,\)"):
        step(state, torch.randn(5, 4))
    assert same(before, everything(state))


def test_a_model_that_changed_after_the_step_was_built():
    step = make()
    state = step.init()
    nn.utils.parametrizations.weight_norm(step.module["cls"])
    with pytest.raises(RuntimeError, match=r"Linear.weight is gone: the model has changed since the Step was built"):
        step(state, torch.randn(5, 4))


def test_metrics_that_are_buffers_are_apart_from_the_state():
    model = nn.BatchNorm1d(3)
    step = ff.Step(
        model,
        lambda m, x: ({"a": m(x).square().mean() + m.weight.sum()}, {"mean": m.running_mean}),
        {"a": "*"},
        optimizer=ff.optim.sgd(0.1),
    )
    state, metrics = step(step.init(), torch.randn(5, 3))
    held = state.buffers["running_mean"].clone()
    metrics["mean"].zero_()
    assert torch.equal(state.buffers["running_mean"], held)


def test_a_state_does_not_hold_graphs_or_parameters_of_others():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    step = ff.Step(model, lambda m, x: {"l": m["a"](x).mean()}, {"l": "a"}, optimizer=ff.optim.sgd(0.1))
    state = step.init()
    given = {**state.params, "b.weight": torch.randn(2, 2, requires_grad=True) * 2, "b.bias": model["b"].bias}
    state, _ = step(state.replace(params=given), torch.randn(3, 2))
    assert not any(tensor.requires_grad for tensor in state.params.values())
    copy.deepcopy(state)


def test_call_refuses_writes_and_init_refuses_batches():
    step = make()
    state = step.init()

    def halve(model):
        for parameter in model.parameters():
            parameter.mul_(0.5)

    with pytest.raises(RuntimeError, match=r"given to `call` wrote to .*whose memory is the state's: it may only read"):
        step.call(state, halve)
    with pytest.raises(TypeError, match=r"init\(copy=...\) is True or False, got Tensor; a batch is for the step"):
        step.init(torch.randn(3, 4))
    with pytest.raises(TypeError, match=r"got tuple; a step returns a pair: state, metrics = step\(state, batch\)"):
        step(step(step.init(), torch.randn(5, 4)), torch.randn(5, 4))
