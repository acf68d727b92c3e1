"""`verify_equations`: numbers known by heart, vectors, random equations, planted faults, and every error's text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

import funcfreeze as ff
from funcfreeze import gradients
from funcfreeze.declare.plan import resolve_plan
from funcfreeze.declare.selectors import Leaf
from funcfreeze.gradients import Outcome
from funcfreeze.gradients.reference import Reference
from funcfreeze.optim import linear_schedule
from funcfreeze.proof.equations import verify_equations

a, b, c, x = sympy.symbols("a b c x")


def details(report: Any, engine: str = "routed") -> dict[str, str]:
    """What the report says of each parameter, by one engine."""
    suffix = f" ({engine})"
    return {
        check.subject.removesuffix(suffix): check.detail for check in report.checks if check.subject.endswith(suffix)
    }


def test_report_names_losses_formula_gradient_and_point() -> None:
    report = verify_equations({"adv": 2 - b * x, "cls": b**2}, {"adv": {"b": -0.5}, "cls": "*"}, {"b": 3, "x": 4})
    assert report.ok
    assert report.worst <= 1e-15
    assert details(report) == {
        "value of adv": "adv = -b*x + 2; value -10",
        "value of cls": "cls = b**2; value 9",
        "b": "∂adv/∂b = -x (weight -0.5), ∂cls/∂b = 2*b; gradient 8",
        "x": "untouched: cls may update it and is without it",
    }
    assert [check.losses for check in report.checks if check.subject == "b (toggle)"] == [("adv", "cls")]
    assert report.facts == {"dtype": "float64", "at": {"b": 3.0, "x": 4.0}}
    assert {check.tolerance for check in report.checks} == {1e-12}
    json.dumps(report.to_dict())


def test_every_engine_is_named_in_title_and_checks() -> None:
    report = verify_equations({"L": a**2}, {"L": "a"}, {"a": 1})
    assert report.title == "routed, reference, toggle against SymPy's derivatives"
    assert [check.subject for check in report.checks] == [
        f"{what} ({engine})" for what in ("value of L", "a") for engine in ("routed", "reference", "toggle")
    ]


def test_engines_are_read_when_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "ENGINES", {"only": Reference()})
    assert [check.subject for check in verify_equations({"L": a}, {"L": "a"}, {"a": 1}).checks] == [
        "value of L (only)",
        "a (only)",
    ]


def test_symbols_and_pinned_keyword_name_the_point() -> None:
    assert verify_equations({"L": a * b}, {"L": "a"}, at={a: sympy.Rational(1, 3), b: 2}).ok


def test_routes_in_every_form() -> None:
    equations, at = {"L": a * b, "M": b**3}, {"a": 2, "b": 3}
    for routes in (
        {"L": ff.path("*") - "b", "M": ff.regex("b")},
        {"L": ff.Route(["a", "b"], weight=-2.0), "M": [ff.Route("b"), ff.Route("*", weight=torch.tensor(0.25))]},
        resolve_plan({"L": "a", "M": {"b": 0.0}}, [Leaf((name,), torch.tensor(1.0)) for name in at]),
    ):
        assert verify_equations(equations, routes, at).ok


def test_weights_add_up_and_weight_zero_touches() -> None:
    routes = {"L": [ff.Route("a", weight=2.0), ff.Route("*", weight=0.5)], "M": {"b": 0.0}}
    said = details(verify_equations({"L": a * c, "M": b**2}, routes, {"a": 1, "b": 2, "c": 4}))
    assert said["a"] == "∂L/∂a = c (weight 2.5); gradient 10"
    assert said["b"] == "∂M/∂b = 2*b (weight 0); gradient 0"
    assert said["c"] == "∂L/∂c = a (weight 0.5); gradient 0.5"


def test_vectors_work_entry_by_entry_with_scalars_between() -> None:
    report = verify_equations(
        {"L": c * sympy.exp(a) + b},
        {"L": "*"},
        {"a": [0, 1, 2], "b": [1, 2, 3], "c": 2},
        cotangents={"L": [1, -1, 0.5]},
    )
    assert report.ok
    said = details(report)
    assert said["a"] == "∂L/∂a = c*exp(a); gradient [2, -5.43656365692, 7.38905609893]"
    assert said["b"] == "∂L/∂b = 1; gradient [1, -1, 0.5]"
    assert said["c"].startswith("∂L/∂c = ")
    assert said["c"].endswith("; gradient 1.97624622101")  # 1 - e + e²/2
    assert report.facts["cotangents"] == {"L": [1.0, -1.0, 0.5]}


def test_entries_of_vectors() -> None:
    w, v = sympy.IndexedBase("w"), sympy.IndexedBase("v")
    report = verify_equations(
        {"dot": w[0] * v[0] + w[1] * v[1], "second": w[1] ** 2},
        {"dot": "w", "second": {"w": 10.0}},
        {"w": [1, 2, 7], "v": [3, 4]},
    )
    assert report.ok
    assert details(report)["w"] == (
        "∂dot/∂w = [v[0], v[1], 0], ∂second/∂w = [0, 2*w[1], 0] (weight 10); gradient [3, 44, 0]"
    )


def test_a_vector_and_its_own_entry_in_one_expression() -> None:
    w = sympy.IndexedBase("w")
    report = verify_equations({"L": sympy.Symbol("w") * w[0]}, {"L": "w"}, {"w": [2, 3]}, cotangents={"L": [1, 1]})
    assert report.ok
    assert details(report)["w"] == "∂L/∂w = [2*w[0] + w[1], w[0]]; gradient [7, 2]"


def test_list_of_expressions_with_external_gradient() -> None:
    w = sympy.IndexedBase("w")
    report = verify_equations(
        {"f": [a * w[0], a + w[1]], "one": [a**2]},
        {"f": "*", "one": "a"},
        {"a": 2, "w": [3, 4]},
        cotangents={"f": [10, 1], "one": [3]},
    )
    assert report.ok
    assert details(report)["a"] == "∂f/∂a = 10*w[0] + 1, ∂one/∂a = 6*a; gradient 43"
    assert details(report)["w"] == "∂f/∂w = [10*a, 1]; gradient [20, 1]"


def test_a_scalar_takes_a_number_as_its_external_gradient() -> None:
    assert details(verify_equations({"L": a**2}, {"L": "a"}, {"a": 3}, cotangents={"L": -2}))["a"].endswith(
        "gradient -12"
    )


def test_a_loss_that_is_a_parameter() -> None:
    report = verify_equations({"L": a, "M": a * b}, {"L": "*", "M": "a"}, {"a": 2, "b": 5})
    assert report.ok
    assert details(report)["a"] == "∂L/∂a = 1, ∂M/∂a = b; gradient 6"


def test_touched_means_being_among_the_free_symbols() -> None:
    """A zero derivative is a gradient; a symbol that SymPy dropped, or that the loss is without, has none."""
    losses = {"L": sympy.sign(a) + (c - c), "M": sympy.Mul(0, b, evaluate=False)}
    report = verify_equations(losses, {"L": "*", "M": "b"}, {"a": 3, "b": 2, "c": 1})
    assert report.ok
    said = details(report)
    assert said["a"].endswith("gradient 0")
    assert said["b"].endswith("gradient 0")
    assert said["c"] == "untouched: L may update it and is without it"


def test_frozen_for_all_losses() -> None:
    assert (
        details(verify_equations({"L": a * b}, {"L": "a"}, {"a": 1, "b": 2}))["b"] == "untouched: no loss may update it"
    )


def test_numbers_are_the_float64_numbers_and_cancellation_is_no_fault() -> None:
    """0.1 + 0.2 - 0.3 is not 0 in float64, and near a zero of the derivative rounding of π is all there is."""
    report = verify_equations(
        {"L": (a + b - c) ** 2, "M": sympy.cos(sympy.pi * x)},
        {"L": "*", "M": "x"},
        {"a": 0.1, "b": 0.2, "c": 0.3, "x": 1},
    )
    assert report.ok


def test_real_symbols_and_decimal_constants() -> None:
    assert verify_equations(
        {"L": sympy.Abs(a) * 0.1 + sympy.sqrt(a**2) / 3 + b**0.5}, {"L": "*"}, {"a": -2, "b": 0.7}
    ).ok


def _polynomial(rng: random.Random, symbols: list[Any]) -> Any:
    terms = (
        rng.randint(-3, 3) * sympy.Mul(*(rng.choice(symbols) ** rng.randint(0, 3) for _ in range(rng.randint(1, 3))))
        for _ in range(3)
    )
    return sum(terms, rng.choice(symbols))


def _expression(rng: random.Random, symbols: list[Any]) -> Any:
    inner = _polynomial(rng, symbols)
    form: Callable[[Any], Any] = rng.choice(
        [sympy.sin, sympy.cos, sympy.tanh, sympy.atan, lambda e: sympy.exp(-(e**2)), lambda e: sympy.log(1 + e**2)]
    )
    return form(inner / 4) * rng.choice(symbols) + _polynomial(rng, symbols) / rng.randint(1, 7)


@pytest.mark.parametrize(
    "seed", [*range(5200, 5208), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5208, 5220))]
)
def test_random_equations_over_random_routes(seed: int) -> None:
    rng = random.Random(seed)
    symbols = list(sympy.symbols("p q r s"))
    vector = rng.random() < 0.4
    at = {
        str(symbol): [rng.uniform(-2, 2) for _ in range(2)] if vector and rng.random() < 0.5 else rng.uniform(-2, 2)
        for symbol in symbols
    }
    losses = {}
    while len(losses) < 3:
        drawn = _expression(rng, rng.sample(symbols, rng.randint(1, 3)))
        if drawn.free_symbols:
            losses[f"L{len(losses)}"] = drawn
    routes = {
        loss: {name: rng.choice([1.0, -0.5, 2.0]) for name in rng.sample(sorted(at), rng.randint(1, 4))}
        for loss in losses
    }
    routes["L0"] = dict.fromkeys(at, 1.0)  # so that no value is idle
    wide = {loss for loss, drawn in losses.items() if any(isinstance(at[str(s)], list) for s in drawn.free_symbols)}
    cotangents = {loss: [rng.uniform(-1, 1), 1] for loss in wide}
    report = verify_equations(losses, routes, at, cotangents=cotangents)
    assert report.ok, str(report)


@dataclass(frozen=True)
class Faulty:
    """The reference engine with a fault in what comes out of it, or goes in."""

    fault: Callable[[list[list[Tensor | None]], dict[str, Tensor]], None]

    def merged(self, evaluate: Any, params: Any, routing: Any, step: Any, seed: Any = None) -> Outcome:
        apart = Reference().separate(evaluate, params, routing, step, seed)
        table = [list(row) for row in apart.gradients]
        values = dict(apart.losses)
        self.fault(table, values)
        columns = ([entry for entry in column if entry is not None] for column in zip(*table, strict=True))
        return Outcome([sum(column[1:], column[0]) if column else None for column in columns], values, apart.rest)

    def separate(self, evaluate: Any, params: Any, routing: Any, step: Any, seed: Any = None) -> Any:
        return Reference().separate(evaluate, params, routing, step, seed)


def _set(loss: int, leaf: int, change: Callable[[Tensor | None], Tensor | None]) -> Callable[..., None]:
    def fault(table: list[list[Tensor | None]], values: dict[str, Tensor]) -> None:
        table[loss][leaf] = change(table[loss][leaf])

    return fault


def _value_off(table: Any, values: dict[str, Tensor]) -> None:
    values["M"] = values["M"] + 1e-9


FAULTS = {
    "nothing": (lambda table, values: None, None),
    "dropped edge": (_set(0, 1, lambda g: None), "b (routed): ∂L/∂b = a, ∂M/∂b = 2*b; expected 8, got 6"),
    "dropped only edge": (_set(0, 0, lambda g: None), "a (routed): ∂L/∂a = b; expected 3, got None"),
    "double counting": (_set(0, 1, lambda g: 2 * g), "b (routed): ∂L/∂b = a, ∂M/∂b = 2*b; expected 8, got 10"),
    "swapped sign": (_set(1, 1, lambda g: -g), "b (routed): ∂L/∂b = a, ∂M/∂b = 2*b; expected 8, got -4"),
    "zero instead of None": (
        _set(1, 2, lambda g: torch.zeros((), dtype=torch.float64)),
        "c (routed): untouched: M may update it and is without it; expected None, got 0",
    ),
    "a leak to what is frozen": (
        _set(0, 3, lambda g: torch.ones((), dtype=torch.float64)),
        "x (routed): untouched: no loss may update it; expected None, got 1",
    ),
    "slightly off": (_set(0, 0, lambda g: g + 1e-10), "a (routed): ∂L/∂a = b; expected 3, got 3.0000000001"),
    "not a number": (_set(0, 0, lambda g: g * torch.nan), "a (routed): ∂L/∂a = b; expected 3, got nan"),
    "wrong shape": (
        _set(0, 0, lambda g: g[None]),
        "a (routed): ∂L/∂a = b; expected 3 of shape () and dtype torch.float64, got [3] of shape (1,) and dtype "
        "torch.float64",
    ),
    "wrong dtype": (
        _set(0, 0, lambda g: g.float()),
        "a (routed): ∂L/∂a = b; expected 3 of shape () and dtype torch.float64, got 3 of shape () and dtype "
        "torch.float32",
    ),
    "value off": (_value_off, "value of M (routed): M = b**2; expected 9, got 9.000000001"),
    "value missing": (lambda table, values: values.pop("M"), "value of M (routed): M = b**2; expected 9, got None"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_come_out_not_ok(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault, said = FAULTS[name]
    monkeypatch.setattr(gradients, "ENGINES", {**gradients.ENGINES, "routed": Faulty(fault)})
    report = verify_equations(
        {"L": a * b + x, "M": b**2}, {"L": ["a", "b"], "M": ["b", "c"]}, {"a": 2, "b": 3, "c": 4, "x": 1}
    )
    failed = [f"{check.subject}: {check.detail}" for check in report.checks if not check.ok]
    assert report.ok == (said is None)
    assert failed == ([] if said is None else [said])
    assert ("NOT OK" in str(report)) == (said is not None)


def refusal(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(ff.RouteError) as caught:
        verify_equations(*args, **kwargs)
    return str(caught.value)


def test_a_route_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="`at` has no value for it"):
        verify_equations({"L": a}, {"L": "a"}, {"b": 1})


@pytest.mark.parametrize(
    ("losses", "at", "cotangents", "said"),
    [
        ([a], {"a": 1}, None, "`losses` is a mapping from names, got list: [a]"),
        ({}, {"a": 1}, None, "`losses` is a mapping from names, got an empty one"),
        ({"L": a}, 3, None, "`at` is a mapping from names, got int: 3"),
        ({"L": a}, {"a": 1}, [1], "`cotangents` is a mapping from names, got list: [1]"),
        ({1: a}, {"a": 1}, None, "a loss is named by a string, got int: 1"),
        (
            {"L": a * b},
            {"a": 1, "bb": 2},
            None,
            "loss 'L' = a*b holds b, and `at` has no value for it; did you mean 'bb'?",
        ),
        ({"L": a}, {"a": "1"}, None, "`at` for a is a finite number or a list of them, got str: '1'"),
        ({"L": a}, {"a": [1, None]}, None, "`at` for a is a finite number or a list of them, got list: [1, None]"),
        ({"L": a}, {"a": []}, None, "`at` for a is a finite number or a list of them, got list: []"),
        ({"L": a}, {"a": True}, None, "`at` for a is a finite number or a list of them, got bool: True"),
        ({"L": a}, {"a": float("inf")}, None, "`at` for a is a finite number or a list of them, got float: inf"),
        (
            {"L": "a + 1"},
            {"a": 1},
            None,
            "loss 'L' is a SymPy expression or a list of them, got str: 'a + 1'; write it with symbols, "
            'a, b = sympy.symbols("a b")',
        ),
        (
            {"L": []},
            {"a": 1},
            None,
            "loss 'L' is a SymPy expression or a list of them, got an empty list; write it with symbols, "
            'a, b = sympy.symbols("a b")',
        ),
        (
            {"L": sympy.S(7) + a - a},
            {"a": 1},
            None,
            "loss 'L' = 7 depends on nothing, so there is nothing to differentiate (SymPy drops a symbol from x - x "
            "and 0*x as they are written)",
        ),
        (
            {"L": sympy.IndexedBase("a")[0]},
            {"a": 1},
            None,
            "loss 'L' = a[0] holds the entry a[0] of a vector, and `at` has the single number 1.0 for a",
        ),
        (
            {"L": sympy.IndexedBase("a")[2]},
            {"a": [1, 2]},
            None,
            "loss 'L' = a[2] holds a[2], and `at` has 2 numbers for a: 0 to 1",
        ),
        (
            {"L": sympy.sqrt(sympy.Symbol("p", positive=True) ** 2)},
            {"p": -1},
            None,
            "loss 'L' = p: p was made with positive=True, by which SymPy simplifies, and `at` has -1.0 for it",
        ),
        (
            {"Q": a**2},
            {"a": [1, 2]},
            None,
            "loss 'Q' = a**2 is no scalar but has 2 entries; give its external gradient, "
            "such as cotangents={'Q': [1] * 2}",
        ),
        (
            {"Q": [a, a**2]},
            {"a": 1},
            None,
            "loss 'Q' = [a, a**2] is no scalar but has 2 entries; give its external gradient, "
            "such as cotangents={'Q': [1] * 2}",
        ),
        ({"Q": a}, {"a": [1, 2]}, {"Q": [1]}, "loss 'Q' = a is a vector of 2, and its cotangent is a list of 1"),
        ({"Q": a}, {"a": [1, 2]}, {"Q": 1}, "loss 'Q' = a is a vector of 2, and its cotangent is a single number"),
        ({"Q": a}, {"a": 1}, {"Q": [1]}, "loss 'Q' = a is a scalar, and its cotangent is a list of 1"),
        ({"Q": a}, {"a": 1}, {"Q": "1"}, "the cotangent of 'Q' is a finite number or a list of them, got str: '1'"),
        ({"Q": a}, {"a": 1}, {"R": 1}, "there is a cotangent for 'R', which is no loss; there are 'Q'"),
        (
            {"Q": a + b},
            {"a": [1, 2], "b": [1, 2, 3]},
            {"Q": [1, 1]},
            "loss 'Q' = a + b works entry by entry, and holds vectors of different lengths: a of 2 and b of 3 numbers",
        ),
        (
            {"Q": [a, 1]},
            {"a": [1, 2]},
            {"Q": [1, 1]},
            "loss 'Q' is a SymPy expression or a list of them, got int: 1; write it with symbols, "
            'a, b = sympy.symbols("a b")',
        ),
        (
            {"Q": [a, b]},
            {"a": [1, 2], "b": 1},
            {"Q": [1, 1]},
            "loss 'Q' = [a, b] is a list, whose expressions are scalars, and holds the vector a of 2 numbers; index it",
        ),
    ],
)
def test_refused_equations(losses: Any, at: Any, cotangents: Any, said: str) -> None:
    assert refusal(losses, {"L": "*", "Q": "*"}, at, cotangents=cotangents) == said


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        (sympy.zeta(a), "zeta(a) has no counterpart in torch here"),
        (sympy.Function("f")(a), "f(a) has no counterpart in torch here"),
        (
            sympy.Integral(sympy.exp(-(b**2)), (b, 0, a)),
            "Integral(exp(-b**2), (b, 0, a)) has no counterpart in torch here",
        ),
        (sympy.MatrixSymbol("A", 2, 2)[0, 1] * a, "A[0, 1] has no counterpart in torch here"),
        (a * sympy.I, "I is no finite real number"),
        (a + sympy.oo * a**2, "oo is no finite real number"),
        (sympy.IndexedBase("w")[a], "w[a] is no entry of a vector, which has one whole number as its index"),
        (sympy.IndexedBase("w")[0, 1], "w[0, 1] is no entry of a vector, which has one whole number as its index"),
        (sympy.IndexedBase("w")[-1], "loss 'L' = w[-1] holds w[-1], and `at` has 1 numbers for w: 0 to 0"),
    ],
)
def test_refused_functions(expression: Any, said: str) -> None:
    message = refusal({"L": expression}, {"L": "*"}, {"a": 1, "b": 1, "w": [1]})
    assert said in message
    assert "w[-1]" in message or "; an expression is made of Add, Mul, Pow, exp, log, sin, " in message


def test_all_problems_at_once() -> None:
    said = refusal({"L": a * b, "M": "b", "N": sympy.zeta(a)}, {}, {"a": None, "d": 1}, cotangents={"K": 1})
    starts = [
        "5 problems:",
        "  - `at` for a is a finite number or a list of them, got NoneType: None",
        "  - loss 'L' = a*b holds b, and `at` has no value for it",
        "  - loss 'M' is a SymPy expression or a list of them, got str: 'b'",
        "  - loss 'N': zeta(a) has no counterpart in torch here",
        "  - there is a cotangent for 'K', which is no loss; there are 'L', 'M', 'N'",
    ]
    lines = said.splitlines()
    assert len(lines) == len(starts)
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts


def test_routes_without_equations_and_equations_without_routes() -> None:
    assert refusal({"one": a, "two": a}, {"one": "a", "tow": "a"}, {"a": 1}) == (
        "2 problems:\n  - loss 'two' has an equation and no route; did you mean 'tow'?\n"
        "  - loss 'tow' has a route and no equation; did you mean 'two'?"
    )
    assert refusal({"L": a}, {"L": "b"}, {"a": 1}) == "loss 'L': path('b') matches no parameter; there are 'a'"


def test_a_value_that_is_in_no_equation_and_no_route() -> None:
    assert refusal({"L": a}, {"L": "a"}, {"a": 1, "aa": 2}) == (
        "`at` has a value for aa, which is in no equation and no route; did you mean 'a'?"
    )
    assert verify_equations({"L": a}, {"L": ["a", "aa"]}, {"a": 1, "aa": 2}).ok


def test_values_and_derivatives_that_are_no_numbers() -> None:
    losses = {"L": sympy.sqrt(a) + b, "M": sympy.log(b), "N": sympy.exp(c)}
    huge = "exp(c) is 1.970071114017046993888879352243323125317e+434 at c = 1000.0"
    advice = "which is no finite real number in float64; choose another point"
    assert refusal(losses, dict.fromkeys("LMN", "*"), {"a": 0, "b": -1, "c": 1000}).splitlines() == [
        "4 problems:",
        f"  - loss 'M': log(b) is 3.141592653589793238462643383279502884197*I at b = -1.0, {advice}",
        f"  - loss 'N': {huge}, {advice}",
        f"  - ∂L/∂a: 1/(2*sqrt(a)) is zoo at a = 0.0, {advice}",
        f"  - ∂N/∂c: {huge}, {advice}",
    ]


def test_an_infinite_derivative_that_nobody_may_use_is_none_of_ours() -> None:
    assert verify_equations({"L": sympy.sqrt(a) + b, "M": a * b}, {"L": "b", "M": "*"}, {"a": 0, "b": 1}).ok


def test_a_schedule_has_no_step_here() -> None:
    with pytest.raises(TypeError, match=r"is a schedule of the step, and there is no step here"):
        verify_equations({"L": a}, {"L": {"a": linear_schedule(0.0, 1.0, 10)}}, {"a": 1})
