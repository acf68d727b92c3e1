"""Steps with averaged twins are the loops that people write with them in plain torch."""

from __future__ import annotations

import pytest
import torch

import funcfreeze as ff
from twins import GRAPH, PROGRAMS, assert_is_the_loop

SLOW = pytest.mark.slow
RUNS = {
    "eager": {},
    "kept": {"donate": False},
    "reference": {"engine": "reference"},
    "toggle": {"engine": "toggle"},
}
COMPILED_HERE = {"BYOL", "mean teacher, averaged", "DQN"}
"""The others are compiled in CI."""

INDUCTOR = {"options": {"fallback_random": True}}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_loop(name, run):
    if (name, run) == ("JEPA", "reference"):
        pytest.skip("torch.func draws a transformer's dropout in another order of memory, also without targets")
    assert_is_the_loop(PROGRAMS[name], RUNS[run])


@pytest.mark.parametrize("donate", [True, pytest.param(False, marks=SLOW)], ids=["donated", "kept"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in COMPILED_HERE else SLOW) for name in PROGRAMS])
def test_the_loop_compiled(name, donate):
    assert_is_the_loop(PROGRAMS[name], {"compile": GRAPH, "donate": donate})


@SLOW
@pytest.mark.parametrize("name", ["MoCo", "JEPA", "mean teacher"])
def test_the_loop_compiled_by_inductor(name):
    assert_is_the_loop(PROGRAMS[name], {"compile": INDUCTOR})


@pytest.mark.parametrize("name", PROGRAMS)
def test_verify(name):
    program = PROGRAMS[name]
    step = program.step(program.nets())
    state, given = step.init(), program.given(2)
    state, _ = step(state, given[0])
    report = ff.verify(step, state, given[1], steps=3)
    assert report.ok, report
    before = {twin: {path: t.clone() for path, t in held.items()} for twin, held in state.targets.items()}
    ff.verify(step, state, given[1], steps=2)
    for twin, held in before.items():
        assert all(torch.equal(tensor, state.targets[twin][path]) for path, tensor in held.items())
