"""The cases one can check with pencil and paper: which loss moves what, and by how much."""

from __future__ import annotations

from dataclasses import replace

import sympy

from funcfreeze.proof.equations import verify_equations
from funcfreeze.proof.report import Report


def seed_reports() -> list[Report]:
    """Every case, verified now by every engine.

    >>> [report.ok for report in seed_reports()]
    [True, True, True, True, True]
    """
    return [shared_slope(), frozen_middle(), external_gradient(), signed_weights(), unreached()]


def shared_slope() -> Report:
    """Two lines share their slope, y = b + a·x and z = c + a·x; the loss on y may move b only.

    So a's gradient is −x = −5 from the loss on z alone; trained on both it would be −10.
    """
    a, b, c, x = sympy.symbols("a b c x")
    y, z = b + a * x, c + a * x
    return replace(
        verify_equations(
            {"on_y": 7 - y, "on_z": 7 - z}, {"on_y": "b", "on_z": ["a", "c"]}, {"a": 1, "b": 2, "c": 3, "x": 5}
        ),
        title="y = b + a·x, z = c + a·x: the loss 7 − y updates b only, 7 − z updates a and c",
    )


def frozen_middle() -> Report:
    """inp → A → B → out: a loss that may move A only still flows through B, which it leaves alone.

    With out = B·A·inp the gradient of −out by A is −B·inp: the frozen B is in it. B itself hears of `fit` alone.
    """
    A, B, inp, target = sympy.symbols("A B inp target")
    out = B * (A * inp)
    return replace(
        verify_equations(
            {"fit": (out - target) ** 2 / 2, "push": -out},
            {"fit": "B", "push": "A"},
            {"A": 2, "B": 3, "inp": 5, "target": 7},
        ),
        title="inp → A → B → out: push = −out updates A only, through the frozen B; fit = (out − target)²/2 updates B",
    )


def external_gradient() -> Report:
    """Q = 3a³ − b² over vectors: ∂Q/∂a = 9a², ∂Q/∂b = −2b.

    The example of PyTorch's tutorial "A Gentle Introduction to torch.autograd", with its numbers.
    """
    a, b = sympy.symbols("a b")
    return replace(
        verify_equations({"Q": 3 * a**3 - b**2}, {"Q": "*"}, {"a": [2, 3], "b": [6, 4]}, cotangents={"Q": [1, 1]}),
        title="Q = 3a³ − b² over vectors with the external gradient (1, 1)",
    )


def signed_weights() -> Report:
    """Domain-adversarial training without a reversal layer: the domain loss, with its sign turned at the encoder.

    The law of Ganin et al., "Domain-Adversarial Training of Neural Networks" (2016), equations 13 to 15, on numbers:
    the encoder follows ∂class/∂e − λ·∂domain/∂e, the domain head its own loss.
    """
    e, c, d, x = sympy.symbols("encoder classifier domain x")
    h = sympy.tanh(e * x)
    return replace(
        verify_equations(
            {"class": (c * h - 1) ** 2, "domain": sympy.log(1 + sympy.exp(-d * h))},
            {"class": ["encoder", "classifier"], "domain": {"domain": 1.0, "encoder": -0.1}},
            {"encoder": 0.5, "classifier": 2, "domain": -1, "x": 0.8},
        ),
        title="h = tanh(encoder·x): the domain loss trains its head and, times −0.1, the encoder",
    )


def unreached() -> Report:
    """A loss is routed to a parameter it does not hold: no gradient, which is not a gradient of zero.

    An optimizer leaves such a parameter alone; on zeros it would go on with weight decay and momentum.
    """
    body, head = sympy.symbols("body head")
    return replace(
        verify_equations(
            {"task": (head * sympy.sin(body)) ** 2, "aux": head**2},
            {"task": "*", "aux": "body"},
            {"body": 1, "head": 2, "spare": 3},
        ),
        title="task is routed to everything and is without spare; aux is routed to body and holds only head",
    )
