"""Momentum encoders and their like: a forward that writes to parameters no loss may update, however it writes."""

from __future__ import annotations

import copy

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import funcfreeze as ff


def assign_data(key, query, m):
    key.data = key.data * m + query.data * (1.0 - m)


def data_in_place(key, query, m):
    key.data.mul_(m).add_(query.data, alpha=1.0 - m)


def in_place(key, query, m):
    key.mul_(m).add_(query, alpha=1.0 - m)


def copy_into(key, query, m):
    key.copy_(key * m + query * (1.0 - m))


def lerp(key, query, m):
    key.lerp_(query, 1.0 - m)


def foreach(key, query, m):
    torch._foreach_lerp_([key], [query], 1.0 - m)


def set_into_rows(key, query, m):
    key[:1] = query[:1]


WRITES = [assign_data, data_in_place, in_place, copy_into, lerp, foreach, set_into_rows]
BY_ENGINE = [(engine, write) for engine in ("routed", "toggle") for write in WRITES] + [("reference", foreach)]
"""torch.func refuses the other writes to what it has captured."""


class MoCo(nn.Module):
    """As its authors write it: a momentum encoder, a queue in a buffer, a pointer read as a Python number."""

    def __init__(self, write, frozen=True, every=1, start=0):
        super().__init__()
        self.write, self.every, self.start, self.calls, self.m = write, every, start, 0, 0.9
        self.encoder_q = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))
        self.encoder_k = copy.deepcopy(self.encoder_q)
        for parameter in self.encoder_k.parameters():
            parameter.requires_grad = not frozen
        self.register_buffer("queue", F.normalize(torch.randn(4, 8), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def _momentum_update(self):
        if self.calls >= self.start and (self.calls - self.start) % self.every == 0:
            for query, key in zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True):
                self.write(key, query, self.m)
        self.calls += 1

    @torch.no_grad()
    def _enqueue(self, keys):
        pointer = int(self.queue_ptr)
        self.queue[:, pointer : pointer + len(keys)] = keys.T
        self.queue_ptr[0] = (pointer + len(keys)) % self.queue.shape[1]

    def forward(self, one, other):
        query = F.normalize(self.encoder_q(one), dim=1)
        with torch.no_grad():
            self._momentum_update()
            keys = F.normalize(self.encoder_k(other), dim=1)
        positive = (query * keys).sum(1, keepdim=True)
        logits = torch.cat([positive, query @ self.queue.clone().detach()], dim=1) / 0.2
        self._enqueue(keys)
        return logits


def losses(model, batch):
    logits = model(*batch)
    return {"nce": F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long)), "small": logits.square().mean()}


ROUTES = {"nce": "encoder_q", "small": {"encoder_q": 0.1}}


def batches(count=4):
    return [(torch.randn(4, 5), torch.randn(4, 5)) for _ in range(count)]


def eager_run(model, given):
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.1, momentum=0.9)
    for batch in given:
        optimizer.zero_grad()
        found = losses(model, batch)
        (found["nce"] + 0.1 * found["small"]).backward()
        optimizer.step()
    return model


def step_of(model, **options):
    return ff.Step(model, losses, ROUTES, optimizer=ff.optim.sgd(0.1, momentum=0.9), **options)


def assert_as_eager(state, start, eager):
    """The displacement of every parameter, and every buffer."""
    began = dict(start.named_parameters())
    for path, parameter in eager.named_parameters():
        moved = (parameter - began[path]).detach()
        torch.testing.assert_close(state.params[path] - began[path].detach(), moved, rtol=1e-9, atol=1e-12, msg=path)
    assert all(not torch.equal(began[path], p) for path, p in eager.named_parameters() if "encoder_k.3.weight" in path)
    for path, buffer in eager.named_buffers():
        torch.testing.assert_close(state.buffers[path], buffer, rtol=1e-9, atol=1e-12, msg=path)


@pytest.mark.parametrize(("engine", "write"), BY_ENGINE)
@pytest.mark.parametrize(("frozen", "donate"), [(True, True), (False, True), (True, False)])
def test_kept_in_the_state(write, engine, frozen, donate):
    model, given = MoCo(write, frozen), batches()
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step = step_of(model, engine=engine, donate=donate)
    state = first = step.init()
    before = [leaf.clone() for leaf in optree.tree_leaves(first)]
    for batch in given:
        state, _ = step(state, batch)
    model.calls = 0
    assert_as_eager(state, model, eager_run(model, given))
    assert all(torch.equal(own[name], tensor) for name, tensor in model.state_dict().items())
    if not donate:
        assert all(map(torch.equal, before, optree.tree_leaves(first)))


@pytest.mark.parametrize("write", WRITES)
def test_kept_when_it_begins_later_or_comes_rarely(write):
    for every, start in ((2, 0), (1, 2), (3, 1)):
        model, given = MoCo(write, every=every, start=start), batches(7)
        step = step_of(model)
        state = step.init()
        initial = copy.deepcopy(model)
        for batch in given:
            state, _ = step(state, batch)
        assert_as_eager(state, initial, eager_run(initial, given))


@pytest.mark.parametrize("write", WRITES)
def test_gradients_and_call_and_verify_change_nothing(write):
    model, given = MoCo(write), batches(2)
    step = step_of(model)
    state = step.init()
    everything = lambda: [  # noqa: E731
        *optree.tree_leaves(state),
        *model.state_dict().values(),
        torch.tensor(model.calls),
    ]
    before = [leaf.clone() for leaf in everything()]
    got = step.gradients(state, given[0])
    step.per_loss_gradients(state, given[0])
    assert ff.verify(step, state, given[0]).ok
    assert all(map(torch.equal, before, everything()))
    eager = copy.deepcopy(model)
    found = losses(eager, given[0])
    named = dict(eager.encoder_q.named_parameters(prefix="encoder_q"))
    want = torch.autograd.grad(found["nce"] + 0.1 * found["small"], list(named.values()))
    torch.testing.assert_close([got[path] for path in named], list(want), rtol=1e-9, atol=1e-12)
    state, _ = step(state, given[0])
    before = [leaf.clone() for leaf in everything()]
    step.call(state, lambda m: losses(m, given[1]))
    model.calls -= 1
    assert all(map(torch.equal, before, everything()))


def test_the_report_of_verify_has_a_line_for_it():
    model = MoCo(assign_data)
    step = step_of(model)
    assert "written by the forward" in str(ff.verify(step, step.init(), batches(1)[0]))


def test_byol_as_people_write_it():
    class BYOL(nn.Module):
        def __init__(self):
            super().__init__()
            self.online = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4))
            self.predictor = nn.Linear(4, 4)
            self.target = copy.deepcopy(self.online).requires_grad_(False)

        def update_moving_average(self):
            for current, average in zip(self.online.parameters(), self.target.parameters(), strict=True):
                average.data = 0.99 * average.data + 0.01 * current.data

    def byol(model, batch):
        model.update_moving_average()
        one, other = batch
        with torch.no_grad():
            aim = model.target(other)
        return {"byol": 2 - 2 * F.cosine_similarity(model.predictor(model.online(one)), aim).mean()}

    model, given = BYOL(), batches()
    eager = copy.deepcopy(model)
    optimizer = torch.optim.Adam([*eager.online.parameters(), *eager.predictor.parameters()], 0.01)
    for batch in given:
        optimizer.zero_grad()
        byol(eager, batch)["byol"].backward()
        optimizer.step()
    step = ff.Step(model, byol, {"byol": ["online", "predictor"]}, optimizer=ff.optim.adam(0.01))
    state = step.init()
    for batch in given:
        state, _ = step(state, batch)
    for path, parameter in eager.named_parameters():
        torch.testing.assert_close(state.params[path], parameter.detach(), rtol=1e-9, atol=1e-12, msg=path)


def test_a_hard_copy_does_not_share_memory_with_what_it_was_copied_from():
    model = nn.ModuleDict({"online": nn.Linear(3, 2), "target": nn.Linear(3, 2).requires_grad_(False)})

    def hard(m, x):
        for online, target in zip(m["online"].parameters(), m["target"].parameters(), strict=True):
            target.data = online.data
        return {"q": (m["online"](x) - 0.9 * m["target"](x) + 1.0).square().mean()}

    step = ff.Step(model, hard, {"q": "online"}, optimizer=ff.optim.sgd(0.1))
    state = step.init()
    x = torch.randn(4, 3)
    for _ in range(3):
        held = {path: tensor.clone() for path, tensor in state.params.items()}
        state, _ = step(state, x)
        assert torch.equal(state.params["target.weight"], held["online.weight"])
        assert not torch.equal(state.params["online.weight"], held["online.weight"])


def test_gradients_flow_through_what_was_written_to():
    model = nn.ModuleDict({"body": nn.Linear(3, 3), "slow": nn.Linear(3, 3).requires_grad_(False)})

    def through(m, x):
        m["slow"].weight.data.mul_(0.5)
        return {"a": m["slow"](m["body"](x)).square().mean()}

    for engine in ("routed", "toggle"):
        eager, x = copy.deepcopy(model), torch.randn(4, 3)
        step = ff.Step(model, through, {"a": "body"}, optimizer=ff.optim.sgd(0.1), engine=engine)
        state = step.init()
        for _ in range(2):
            got = step.gradients(state, x)
            want = torch.autograd.grad(through(eager, x)["a"], list(eager["body"].parameters()))
            torch.testing.assert_close([*got.values()], [*want], rtol=1e-12, atol=1e-12)
            state, _ = step(state, x)
            with torch.no_grad():
                for p, g in zip(eager["body"].parameters(), want, strict=True):
                    p -= 0.1 * g


@pytest.mark.parametrize("write", [assign_data, in_place])
def test_in_torch_func_it_is_refused_and_says_what_to_use(write):
    step = step_of(MoCo(write), engine="reference")
    with pytest.raises(RuntimeError, match="use engine='routed', which does"):
        step(step.init(), batches(1)[0])


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [data_in_place, in_place, copy_into, foreach, assign_data])
def test_a_write_to_a_parameter_that_may_be_updated(write):
    model = nn.ModuleDict({"body": nn.Linear(3, 3), "head": nn.Linear(3, 1)})

    def writing(m, x):
        with torch.no_grad():
            write(m["body"].weight, torch.zeros(3, 3), 0.5)
        return {"a": m["head"](m["body"](x)).mean()}

    step = ff.Step(model, writing, {"a": "*"}, optimizer=ff.optim.adam(0.1))
    state, x = step.init(), torch.randn(4, 3)
    everything = lambda: [*optree.tree_leaves(state), *model.state_dict().values()]  # noqa: E731
    before = [leaf.clone() for leaf in everything()]
    for run in (lambda: step(state, x), lambda: step.gradients(state, x), lambda: ff.verify(step, state, x)):
        with pytest.raises(RuntimeError, match=r"parameter body\.weight, which a loss may update"):
            run()
        assert all(map(torch.equal, before, everything()))


def test_an_exception_after_a_write_changes_nothing():
    model = MoCo(data_in_place)

    def failing(m, batch):
        found = losses(m, batch)
        raise ValueError(f"no luck with {found}")

    step = ff.Step(model, failing, ROUTES, optimizer=ff.optim.adam(0.1))
    state = step.init()
    before = [leaf.clone() for leaf in optree.tree_leaves(state)] + [t.clone() for t in model.state_dict().values()]
    with pytest.raises(ValueError, match="no luck"):
        step(state, batches(1)[0])
    assert all(map(torch.equal, before, [*optree.tree_leaves(state), *model.state_dict().values()]))


def test_another_form_is_refused():
    model = nn.ModuleDict({"body": nn.Linear(3, 3), "slow": nn.Linear(3, 3).requires_grad_(False)})

    def reshaping(m, x):
        m["slow"].weight.data = torch.zeros(2, 3)
        return {"a": m["body"](x).mean()}

    step = ff.Step(model, reshaping, {"a": "body"}, optimizer=ff.optim.sgd(0.1))
    with pytest.raises(RuntimeError, match=r"slow\.weight another form: it had shape \(3, 3\).*has shape \(2, 3\)"):
        step(step.init(), torch.randn(4, 3))


def test_a_write_that_begins_later_and_a_state_that_must_stay():
    model, given = MoCo(in_place, start=1), batches(3)
    step = step_of(model, donate=False)
    state, _ = step(step.init(), given[0])
    with pytest.raises(RuntimeError, match=r"encoder_k.*written to .* now and not at the first step|has written to"):
        step(state, given[1])
    model.calls = 1
    held = state.params["encoder_k.3.weight"].clone()
    after, _ = step(state, given[1])  # known from now on
    assert torch.equal(held, state.params["encoder_k.3.weight"])
    assert not torch.equal(held, after.params["encoder_k.3.weight"])


def test_a_write_in_checkpointed_code_is_the_same_at_every_step():
    model = nn.ModuleDict({"body": nn.Linear(3, 3), "slow": nn.Linear(3, 3, bias=False).requires_grad_(False)})

    def block(x):
        with torch.no_grad():
            model["slow"].weight.mul_(0.5)
        return torch.tanh(model["body"](x))

    def losses(m, x):
        return {"a": checkpoint(block, x, use_reentrant=False).square().mean()}

    step = ff.Step(model, losses, {"a": "body"}, optimizer=ff.optim.sgd(0.1))
    state, start = step.init(), model["slow"].weight.detach().clone()
    for turn in range(1, 4):
        state, _ = step(state, torch.randn(4, 3))
        torch.testing.assert_close(state.params["slow.weight"], start * 0.5**turn)
    assert torch.equal(model["slow"].weight, start)
