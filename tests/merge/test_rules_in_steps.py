"""Rules in a step: beside what else a step does, compiled, and what they keep from step to step."""

from __future__ import annotations

import copy
import json
import pickle
import re

import pytest
import torch
from torch import nn

import funcfreeze as ff
from funcfreeze import merge

RULES = {
    "mean": merge.mean(),
    "pcgrad": merge.pcgrad(),
    "declared": merge.pcgrad(order="declared"),
    "mgda": merge.mgda(),
    "imtl_g": merge.imtl_g(),
    "cagrad": merge.cagrad(0.5),
    "upgrad": merge.upgrad(),
    "aligned_mtl": merge.aligned_mtl(),
    "median": merge.aligned_mtl(scale="median"),
    "graddrop": merge.graddrop(leak=0.1),
    "gradnorm": merge.gradnorm(),
    "dwa": merge.dwa(3),
}


class ManyTrunks(nn.Module):
    """A trunk for every rule, so that one graph has them all; three heads on the sum of what they give."""

    def __init__(self, names):
        super().__init__()
        self.trunks = nn.ModuleDict({name: nn.Linear(6, 5) for name in names})
        self.heads = nn.ModuleList(nn.Linear(5, 2) for _ in range(3))


def many_losses(model, batch):
    h = torch.tanh(sum(trunk(batch["x"]) for trunk in model.trunks.values()))
    found = {
        name: (head(h) - batch["y"][:, k : k + 1]).square().mean()
        for k, (name, head) in enumerate(zip("abc", model.heads, strict=True))
    }
    return found, {"size": h.square().mean()}


def many_trunks(rules, **options):
    model = ManyTrunks(rules)
    routes = {name: ["trunks", f"heads.{k}"] for k, name in enumerate("abc")}
    entries = {f"trunks.{name}": rule for name, rule in rules.items()}
    return ff.Step(model, many_losses, routes, optimizer=ff.optim.adam(1e-2), merge=entries, **options)


def batch(rows=8):
    return {"x": torch.randn(rows, 6), "y": torch.randn(rows, 3)}


def assert_same(one, other, tolerance=1e-9):
    """Equal states, rules' own included, and equal metrics, our own included."""
    (state, metrics), (wanted, expected) = one, other
    for path, tensor in wanted.params.items():
        torch.testing.assert_close(state.params[path], tensor, rtol=tolerance, atol=tolerance)
    mine, theirs = (given.optimizer.get("merge", {}) for given in (state, wanted))
    assert mine.keys() == theirs.keys()
    for label in theirs:
        ((name, kept),) = theirs[label].items()
        for key, tensor in kept.items():
            torch.testing.assert_close(mine[label][name][key], tensor, rtol=tolerance, atol=tolerance)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value, rtol=1e-6, atol=1e-8, equal_nan=True)


@pytest.mark.parametrize("engine", ["reference", "toggle"])
def test_engines_agree_over_steps(engine):
    step = many_trunks(RULES)
    other = step.remade(engine=engine)
    one, two = (step.init(), {}), (other.init(), {})
    for _ in range(4):
        given = batch()
        one, two = step(one[0], given), other(two[0], given)
        assert_same(one, two)


@pytest.mark.parametrize(
    "rules",
    [
        {name: RULES[name] for name in ("pcgrad", "gradnorm", "graddrop")},
        pytest.param(RULES, marks=pytest.mark.slow),
    ],
    ids=["some", "all"],
)
def test_rules_compiled_are_one_graph_for_good(rules):
    """One graph, not traced again in 100 steps, and what eager steps give."""
    step = many_trunks(rules, compile=True)
    eager = step.remade(compile=False)
    one, two = (step.init(), {}), (eager.init(), {})
    for turn in range(100):
        given = batch()
        one = step(one[0], given)
        if turn < 10:
            two = eager(two[0], given)
            assert_same(one, two, tolerance=1e-7)
    assert step.traces == 1
    half = step.compute(one[0], given)
    after = step.apply_gradients(one[0], half)
    assert set(half.met) == {f"trunks.{name}" for name in rules}
    again = step.traces
    step.apply_gradients(after[0], step.compute(after[0], given))
    assert step.traces == again == 3


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"microbatches": 2}, {"loss_scale": ff.LossScale(8.0)}, {"on_nonfinite": "skip"}])
def test_rules_compiled_beside_other_options(options):
    step = many_trunks(RULES, compile=True, **options)
    eager = step.remade(compile=False)
    one, two = (step.init(), {}), (eager.init(), {})
    for _ in range(4):
        given = batch()
        one, two = step(one[0], given), eager(two[0], given)
        assert_same(one, two, tolerance=1e-7)


def test_a_half_is_the_first_half_of_a_step():
    step = many_trunks(RULES, donate=False)
    state, given = step.init(), batch()
    state, _ = step(state, given)
    whole = step(state, given)
    half = step.compute(state, given)
    assert_same(step.apply_gradients(state, half), whole, tolerance=0)
    assert_same(step.apply_gradients(state, half), whole, tolerance=0)
    assert half.per_loss == {}
    rows = step.compute(state, given, per_loss=True)
    for path, gradient in half.gradients.items():
        torch.testing.assert_close(rows.gradients[path], gradient)
    assert set(rows.per_loss) == {"a", "b", "c"}


def test_parts_of_a_batch_are_accumulated_before_a_rule_decides():
    """So that a batch in equal parts is that batch, for losses that are means."""
    rules = {name: rule for name, rule in RULES.items() if name != "graddrop"}
    step = many_trunks({**rules, "graddrop": merge.graddrop()})
    parts = step.remade(microbatches=4)
    one, two = (step.init(), {}), (parts.init(), {})
    for _ in range(3):
        given = batch(8)
        one, two = step(one[0], given), parts(two[0], given)
        one[1].pop("size"), two[1].pop("size")
        assert_same(two, one)
    per_loss = parts.compute(two[0], given, per_loss=True).per_loss
    for name, row in step.per_loss_gradients(one[0], given).items():
        for path, gradient in row.items():
            torch.testing.assert_close(per_loss[name][path], gradient)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("options", [{"loss_scale": ff.LossScale(4.0)}, {"on_nonfinite": "skip"}])
def test_a_skipped_step_leaves_what_rules_keep(options, compile):
    """Whether or not a loss scale, or the losses, are the cause."""
    step = many_trunks({"gradnorm": merge.gradnorm(), "dwa": merge.dwa(2)}, compile=compile, **options)
    state, _ = step(step.init(), batch())
    before = copy.deepcopy(state)
    bad = batch()
    bad["x"][0, 0] = torch.inf
    state, _ = step(state, bad)
    same = torch.utils._pytree.tree_map(torch.equal, dict(before.params), dict(state.params))
    assert all(same.values())
    kept, now = (s.optimizer["optimizer"] if "loss_scale" in s.optimizer else s.optimizer for s in (before, state))
    assert str(kept["merge"]) == str(now["merge"])
    state, metrics = step(state, batch())
    now = state.optimizer["optimizer"] if "loss_scale" in state.optimizer else state.optimizer
    assert str(kept["merge"]) != str(now["merge"])
    assert metrics["ff/weight/trunks.gradnorm"].isfinite().all()


def test_an_overflow_is_no_error_of_a_rule():
    """Gradients that are not finite give merged ones that are not, for every rule; what is finite is not touched."""
    step = many_trunks(RULES)
    given = batch()
    given["x"][0, 0] = torch.inf
    gradients = step.gradients(step.init(), given)
    assert all(not gradients[path].isfinite().all() for path in gradients if path.startswith("trunks"))


def test_states_travel():
    """Pickled, copied, adopted, and refused where another rule keeps something else."""
    step = many_trunks({"one": merge.gradnorm(), "two": merge.dwa(2)})
    state, _ = step(step.init(), batch())
    given = batch()
    wanted = step(copy.deepcopy(state), given)
    assert_same(step(pickle.loads(pickle.dumps(state)), given), wanted, tolerance=0)
    taken, adoption = step.adopt(copy.deepcopy(state))
    assert_same(step(taken, given), wanted, tolerance=0)
    assert {"optimizer.merge.trunks.one", "optimizer.merge.trunks.two"} <= set(adoption.kept)

    other = ff.Step(step.model, many_losses, ROUTES, optimizer=ff.optim.adam(1e-2), merge={"trunks.one": merge.dwa(2)})
    taken, adoption = other.adopt(copy.deepcopy(state))
    assert adoption.afresh == ("optimizer.merge.trunks.one: the state has another",)
    assert adoption.left == ("optimizer.merge.trunks.two",)
    other(taken, given)
    plain = ff.Step(step.model, many_losses, ROUTES, optimizer=ff.optim.adam(1e-2))
    taken, adoption = plain.adopt(copy.deepcopy(state))
    assert adoption.left == ("optimizer.merge.trunks.one", "optimizer.merge.trunks.two")
    plain(taken, given)
    with pytest.raises(ValueError, match=r"adam beside merge rules that keep a state"):
        plain(state, given)
    taken, adoption = step.adopt(plain.init())
    assert "optimizer.merge.trunks.one: the state does not have it" in adoption.afresh
    step(taken, given)


ROUTES = {name: ["trunks", f"heads.{k}"] for k, name in enumerate("abc")}


def test_a_running_optimizer_is_taken_over_and_given_back():
    step = many_trunks({"one": merge.gradnorm()})
    running = torch.optim.Adam(step.module.parameters(), lr=1e-2)
    losses, _ = many_losses(step.module, batch())
    sum(losses.values()).backward()
    running.step()
    state = step.init(optimizer=running)
    state, _ = step(state, batch())
    step.export(state, optimizer=running)
    entry = running.state[step.module.heads[0].weight]
    torch.testing.assert_close(entry["exp_avg"], state.optimizer["optimizer"]["heads.0.weight"]["exp_avg"])


def test_thawing_parameters_start_afresh_beside_rules_that_keep_a_state():
    model = ManyTrunks(["one"])
    routes = {**ROUTES, "a": [ff.Route("trunks"), ff.Route("heads.0", start=2, reset=True)]}
    rule = {"trunks": merge.gradnorm()}
    step = ff.Step(model, many_losses, routes, optimizer=ff.optim.adam(1e-2), merge=rule)
    state = step.init()
    for _ in range(3):
        state, _ = step(state, batch())
    assert state.optimizer["optimizer"]["heads.0.weight"]["step"] == 1
    assert bool(state.optimizer["merge"]["trunks"]["gradnorm: a, b, c"]["seen"].all())


def test_members_of_an_alternation_have_rules_of_their_own():
    model = ManyTrunks(["one"])

    def member(rule):
        return ff.Step(model, many_losses, ROUTES, optimizer=ff.optim.sgd(0.1), merge={"trunks": rule})

    step = ff.alternate({"first": member(merge.gradnorm()), "second": member(merge.gradnorm(lr=0.1))})
    state, given = step.init(), batch()
    state, metrics = step(state, given)
    alone, beside = member(merge.gradnorm()), member(merge.gradnorm(lr=0.1))
    one, _ = alone(alone.init(), given)
    two, second = beside(beside.init().replace(params={path: p.clone() for path, p in one.params.items()}), given)
    for path, tensor in two.params.items():
        torch.testing.assert_close(state.params[path], tensor)
    torch.testing.assert_close(metrics["second"]["ff/weight/trunks"], second["ff/weight/trunks"])
    kept = [state.optimizer[name]["merge"]["trunks"]["gradnorm: a, b, c"]["weights"] for name in ("first", "second")]
    assert not torch.equal(*kept)
    lines = str(step.plan).splitlines()
    assert "merge  second: trunks: gradnorm(lr=0.1) on 2 parameters (35 elements), where a, b, c meet" in lines
    assert ff.verify(step, state, given).ok


@pytest.mark.parametrize("options", [{}, {"loss_scale": ff.LossScale(8.0)}, {"microbatches": 2}, {"engine": "toggle"}])
def test_verify_takes_rules_to_the_recipe(options):
    step = many_trunks(RULES, **options)
    state, _ = step(step.init(), batch())
    report = ff.verify(step, state, batch())
    assert report.ok, str(report)


def test_metrics_are_what_the_gradients_say():
    step = many_trunks({"one": merge.cagrad(0.5), "two": merge.graddrop()}, donate=False)
    state, given = step.init(), batch()
    apart = step.per_loss_gradients(state, given)
    merged = step.gradients(state, given)
    _, metrics = step(state, given)
    paths = ["trunks.one.weight", "trunks.one.bias"]
    rows = torch.stack([torch.cat([apart[name][path].reshape(-1) for path in paths]) for name in "abc"])
    whole = torch.cat([merged[path].reshape(-1) for path in paths])
    torch.testing.assert_close(metrics["ff/norm/trunks.one"], rows.norm(dim=1))
    torch.testing.assert_close(metrics["ff/cosine/trunks.one"], cosines(rows))
    weights = metrics["ff/weight/trunks.one"]
    torch.testing.assert_close(weights @ rows, whole)
    shares = metrics["ff/share/trunks.one"]
    torch.testing.assert_close(shares, weights * (rows @ whole) / whole.square().sum())
    torch.testing.assert_close(shares.sum(), torch.tensor(1.0))
    assert metrics["ff/weight/trunks.two"].isnan().all()


def cosines(rows):
    unit = rows / rows.norm(dim=1, keepdim=True)
    return unit @ unit.T


def test_metrics_are_for_all_losses_also_the_absent():
    present = {"a", "c"}

    def losses(model, given):
        found, beside = many_losses(model, given)
        return {name: loss if name in present else None for name, loss in found.items()}, beside

    step = ff.Step(ManyTrunks(["one"]), losses, ROUTES, optimizer=ff.optim.sgd(0.1), merge=merge.mgda())
    _, metrics = step(step.init(), batch())
    assert metrics["ff/norm/*"].isnan().tolist() == [False, True, False]
    assert metrics["ff/cosine/*"].isnan().tolist() == [[False, True, False], [True, True, True], [False, True, False]]


def test_conflicts_by_entry_and_by_module():
    model = nn.ModuleDict({"low": nn.Linear(4, 4), "top": nn.Linear(4, 4), "a": nn.Linear(4, 1), "b": nn.Linear(4, 1)})

    def losses(model, x):
        h = model["top"](model["low"](x))
        return {"a": model["a"](h).square().mean(), "b": model["b"](h).mean()}

    routes = {"a": ["low", "top", "a"], "b": ["low", "top", "b"]}
    step = ff.Step(model, losses, routes, optimizer=ff.optim.sgd(0.1), merge={"low": merge.mgda()})
    state, x = step.init(), torch.randn(3, 4)
    found = step.conflicts(state, x)
    apart, merged = step.per_loss_gradients(state, x), step.gradients(state, x)
    assert list(found) == ["low", "top.*"]
    for name, half in (("low", "low"), ("top.*", "top")):
        paths = [f"{half}.weight", f"{half}.bias"]
        rows = {k: torch.cat([apart[k][path].reshape(-1) for path in paths]) for k in "ab"}
        whole = torch.cat([merged[path].reshape(-1) for path in paths])
        one = found[name]
        assert one.paths == tuple(paths)
        assert one.elements == 20
        torch.testing.assert_close(torch.tensor(one.norms["a"]), rows["a"].norm())
        cosine = rows["a"] @ rows["b"] / rows["a"].norm() / rows["b"].norm()
        torch.testing.assert_close(torch.tensor(one.cosines["a"]["b"]), cosine)
        torch.testing.assert_close(torch.tensor(sum(one.shares.values())), torch.tensor(1.0))
        if half == "top":
            torch.testing.assert_close(torch.tensor(one.shares["b"]), rows["b"] @ whole / whole.square().sum())
    json.dumps(found.to_dict())
    assert str(found).splitlines()[0] == "low (2 parameters, 20 elements)"
    alone = ff.Step(model, losses, {"a": "a", "b": "b"}, optimizer=ff.optim.sgd(0.1))
    assert str(alone.conflicts(alone.init(), x)) == "no two losses meet"


def test_combine_and_backward_do_as_the_step_does():
    """Whatever cotangent arrives: the rule sees the losses' own gradients."""
    rules = {name: rule for name, rule in RULES.items() if rule.init is None and not rule.is_random}
    rules |= {"draws": merge.pcgrad(seed=3), "drops": merge.graddrop(seed=4)}
    step = many_trunks(rules)
    state, given = step.init(), batch()
    wanted = step.gradients(state, given)
    model = step.module
    entries = {f"trunks.{name}": rule for name, rule in rules.items()}
    plan = ff.plan(model, ROUTES, merge=entries)
    for factor in (1.0, -3.0, 1e-3):
        for routes, rule in ((plan, None), (ROUTES, entries)):
            model.zero_grad()
            (ff.combine(many_losses(model, given)[0], routes, model, step=0, merge=rule) * factor).backward()
            for path, parameter in model.named_parameters():
                torch.testing.assert_close(parameter.grad, factor * wanted[path])
    model.zero_grad()
    ff.backward(many_losses(model, given)[0], ROUTES, model, step=0, merge=entries)
    for path, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[path])
    (ff.combine(many_losses(model, given)[0], plan, model, step=0) * 0.0).backward()
    for path, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[path])


def test_without_a_count_rules_draw_from_the_global_generator():
    model, given = ManyTrunks(["one"]), batch()
    rule = merge.pcgrad()
    found = []
    for seed in (0, 0, *range(1, 30)):
        model.zero_grad()
        torch.manual_seed(seed)
        ff.combine(many_losses(model, given)[0], ROUTES, model, merge=rule).backward()
        found.append(model.trunks["one"].weight.grad.clone())
    assert torch.equal(found[0], found[1])
    conflicts = any(not torch.allclose(found[0], other) for other in found[2:])
    rows = ff.Step(model, many_losses, ROUTES, optimizer=ff.optim.sgd(0.1))
    (only,) = rows.conflicts(rows.init(), given).values()
    cosine = only.cosines
    several = sum(cosine[i][j] < 0 for i, j in (("a", "b"), ("a", "c"), ("b", "c"))) >= 2
    assert conflicts == several, "the order matters where a gradient conflicts with two others"


def test_a_plan_with_rules_is_plain_data():
    step = many_trunks(RULES)
    data = json.loads(json.dumps(step.plan.to_dict()))
    again = ff.Plan.from_dict(data)
    assert again == step.plan
    assert str(again) == str(step.plan)
    other = ff.Step(step.model, many_losses, again, optimizer=ff.optim.adam(1e-2))
    given = batch()
    torch.testing.assert_close(other.gradients(other.init(), given), step.gradients(step.init(), given))
    with pytest.raises(ff.RouteError, match=r"the plan has merge rules already \(trunks.mean: mean\(\), "):
        ff.Step(step.model, many_losses, again, optimizer=ff.optim.adam(1e-2), merge=merge.mean())
    own = ff.plan(step.model, ROUTES, merge=merge.Rule(lambda meeting: meeting.norms, name="mine"))
    with pytest.raises(ff.RouteError, match=r"the merge rule mine\(\) of '\*' was a function"):
        ff.Plan.from_dict(own.to_dict())


def test_what_the_table_says():
    model = ManyTrunks(["one", "two"])
    routes = {"a": ["trunks.one", "heads.0"], "b": ["trunks.one", "heads.1"], "c": ["heads.2"]}
    plan = ff.plan(model, routes, merge={"trunks.one": merge.cagrad(0.3), "heads": merge.pcgrad()})
    assert str(plan).splitlines()[-2:] == [
        "merge  trunks.one: cagrad(c=0.3) on 2 parameters (35 elements), where a, b meet",
        "merge  heads: pcgrad() has nothing to do, since no two losses meet there",
    ]
    step = ff.Step(model, many_losses, routes, optimizer=ff.optim.sgd(0.1), merge={"heads": merge.pcgrad()})
    plain = ff.Step(model, many_losses, routes, optimizer=ff.optim.sgd(0.1))
    given = batch()
    torch.testing.assert_close(step.gradients(step.init(), given), plain.gradients(plain.init(), given), rtol=0, atol=0)


def test_one_loss_alone_is_as_without_a_rule():
    model, given = ManyTrunks(["one"]), batch()

    def losses(model, given):
        return {"a": many_losses(model, given)[0]["a"]}

    step = ff.Step(model, losses, {"a": "*"}, optimizer=ff.optim.sgd(0.1), merge=merge.mgda())
    plain = ff.Step(model, losses, {"a": "*"}, optimizer=ff.optim.sgd(0.1))
    torch.testing.assert_close(step.gradients(step.init(), given), plain.gradients(plain.init(), given), rtol=0, atol=0)


def test_mistakes_in_the_declaration_are_told_at_once():
    model = ManyTrunks(["one", "two"])
    rules = {"trunk": merge.mean(), "trunks.one": merge.mgda(), "trunks": merge.pcgrad(), 3: merge.mean()}
    with pytest.raises(ff.RouteError) as error:
        ff.plan(model, ROUTES, merge=rules)
    cure = 'take it out of all but one, as in path("*") - "encoder"'
    assert str(error.value).splitlines() == [
        "4 problems:",
        "  - merge: path('trunk') matches no parameter; did you mean 'trunks' or 'trunks.two' or 'trunks.one'?",
        "  - merge: a selector is a string, or made by path, regex, kind or where; got int: 3",
        f"  - merge: trunks.one.weight is claimed by 2 entries, 'trunks.one' and 'trunks'; {cure}",
        f"  - merge: trunks.one.bias is claimed by 2 entries, 'trunks.one' and 'trunks'; {cure}",
    ]
    for given, message in [
        (merge.pcgrad, r"merge\['\*'\]: a rule is made by calling it: funcfreeze.merge.pcgrad\(...\)"),
        ({"trunks": "pcgrad"}, r"merge\['trunks'\]: a rule such as funcfreeze.merge.pcgrad\(\), got str: 'pcgrad'"),
        ({"trunks": lambda gramian: gramian}, r"merge\['trunks'\]: <lambda> is no rule; make one of a function with"),
    ]:
        with pytest.raises(TypeError, match=message):
            ff.plan(model, ROUTES, merge=given)
    for make, message in [
        (lambda: merge.pcgrad(order="random_"), "merge.pcgrad: order is 'random' or 'declared', got 'random_'"),
        (lambda: merge.cagrad(-1), "merge.cagrad: c must be at least 0, got -1"),
        (lambda: merge.upgrad(regularization="x"), "merge.upgrad: regularization must be at least 0, got 'x'"),
        (lambda: merge.graddrop(leak=2), "merge.graddrop: leak must be from 0 to 1, got 2"),
        (
            lambda: merge.aligned_mtl(scale="max"),
            "merge.aligned_mtl: scale is one of 'min', 'median', 'rmse', got 'max'",
        ),
        (lambda: merge.dwa(0), "merge.dwa: period must be an int of at least 1, got 0"),
        (
            lambda: merge.gradnorm(alpha=-1, lr=0),
            "merge.gradnorm: alpha must be at least 0, got -1; lr must be above 0, got 0",
        ),
        (lambda: merge.mgda(at="features"), "a rule's `at` is 'parameters' or 'activations', got 'features'"),
    ]:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            make()


def test_what_a_key_may_have_been_meant_for():
    model = ManyTrunks(["one", "two"])
    with pytest.raises(ff.RouteError) as error:
        ff.plan(model, ROUTES, merge={"a": merge.mgda(), ("trunks.one", "trunks.two"): merge.pcgrad()})
    told = str(error.value).splitlines()
    assert told[0] == "2 problems:"
    assert told[1].startswith("  - merge: path('a') matches no parameter")
    assert told[1].endswith(
        "; 'a' is a loss, and the keys of merge= select parameters: a rule is for all losses that meet there"
    )
    assert told[2].endswith(
        '; for one decision about all of these, path("trunks.one") | path("trunks.two"); for one each, an entry each'
    )


def test_mgda_stands_still_beside_a_loss_without_weight():
    """What the README says of weights that start at zero, and of routes that start later."""
    weight = torch.tensor(0.0)
    model, given = ManyTrunks(["one"]), batch()
    for late in ({"trunks": weight, "heads": 1.0}, [ff.Route("trunks", start=3), ff.Route("heads")]):
        routes = {"a": "*", "b": late}

        def losses(model, given):
            found, _ = many_losses(model, given)
            return {name: found[name] for name in "ab"}

        step = ff.Step(model, losses, routes, optimizer=ff.optim.sgd(0.1), merge={"trunks": merge.mgda()})
        gradients = step.gradients(step.init(), given)
        stands_still = all(float(g.abs().max()) < 1e-12 for path, g in gradients.items() if path.startswith("trunks"))
        assert stands_still == isinstance(late, dict)
