"""The shipped cases against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from funcfreeze.demos import seeds
from funcfreeze.gradients import ENGINES
from funcfreeze.proof.report import Report


def gradients(report: Report) -> dict[str, list[str]]:
    """What each engine was found to compute, by parameter."""
    parameters = [check for check in report.checks if not check.subject.startswith("value of ")]
    found: dict[str, list[str]] = {}
    for check in parameters:
        said = check.detail.rpartition("gradient ")[2] if "gradient " in check.detail else "None"
        found.setdefault(check.subject.split()[0], []).append(said)
    return found


def test_all_cases_hold_for_all_engines() -> None:
    reports = seeds.seed_reports()
    assert [report.ok for report in reports] == [True] * 5
    assert len({report.title for report in reports}) == 5
    for report in reports:
        assert {check.subject.split()[-1] for check in report.checks} == {f"({engine})" for engine in ENGINES}
        assert report.worst <= 1e-15


@pytest.mark.parametrize(
    ("case", "golden"),
    [
        (seeds.shared_slope, {"a": "-5", "b": "-1", "c": "-1", "x": "None"}),
        (seeds.frozen_middle, {"A": "-15", "B": "230", "inp": "None", "target": "None"}),
        (seeds.external_gradient, {"a": "[36, 81]", "b": "[-12, -8]"}),
    ],
)
def test_golden_numbers(case, golden) -> None:
    assert gradients(case()) == {name: [number] * 3 for name, number in golden.items()}


def test_shared_slope_says_which_loss_reaches_what_and_why() -> None:
    said = {check.subject: (check.losses, check.detail) for check in seeds.shared_slope().checks}
    assert said["a (routed)"] == (("on_z",), "∂on_z/∂a = -x; gradient -5")
    assert said["b (routed)"] == (("on_y",), "∂on_y/∂b = -1; gradient -1")
    assert said["c (routed)"] == (("on_z",), "∂on_z/∂c = -1; gradient -1")


def test_signed_weights_turn_the_domain_loss_round_at_the_encoder() -> None:
    found = gradients(seeds.signed_weights())
    e, c, d, x = 0.5, 2.0, -1.0, 0.8
    h = math.tanh(e * x)
    slope = x * (1 - h**2)
    weight_of_wrong = 1 / (1 + math.exp(d * h))
    golden = {
        "encoder": 2 * (c * h - 1) * c * slope - 0.1 * (-d * weight_of_wrong * slope),
        "classifier": 2 * (c * h - 1) * h,
        "domain": -h * weight_of_wrong,
    }
    for name, number in golden.items():
        assert [float(said) for said in found[name]] == pytest.approx([number] * 3, rel=1e-11)
    assert found["x"] == ["None"] * 3


def test_unreached_parameters_have_no_gradient() -> None:
    found = gradients(seeds.unreached())
    assert found["spare"] == ["None"] * 3
    assert [float(said) for said in found["body"]] == pytest.approx([4 * math.sin(2.0)] * 3, rel=1e-11)
    assert [float(said) for said in found["head"]] == pytest.approx([4 * math.sin(1.0) ** 2] * 3, rel=1e-11)
