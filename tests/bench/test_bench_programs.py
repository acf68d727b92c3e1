"""Whole training programs of the bench: the loop by hand and our program leave the same tensors, path by path."""

from __future__ import annotations

import copy
import importlib
from functools import partial

import pytest
import torch

from bench import bars, run
from bench.peers import PEERS
from bench.workloads.byol import byol, small_encoder
from bench.workloads.program import Program
from bench.workloads.sac import sac
from bench.workloads.wgan_gp import wgan_gp

CPU = torch.device("cpu")
TINY = {
    "wgan-gp": partial(wgan_gp, width=12, noise=4, pixels=9, size=6),
    "byol": partial(byol, partial(small_encoder, 2), features=8, hidden=6, outputs=4, image=8, size=4),
    "sac": partial(sac, observations=5, actions=2, width=12, size=6),
}
UNMOVED = {"wgan-gp": {"critic.4.bias"}, "byol": set(), "sac": set()}
"""What has no gradient: what the critic adds to every score."""


def after(program: Program, seed: int, body, tensors) -> dict[str, torch.Tensor]:
    """What is left after two steps of the bench."""
    torch.manual_seed(seed)
    for _ in range(2 * program.calls):
        body(program.batch())
    return {path: tensor.detach() for path, tensor in tensors().items()}


def by_hand(program: Program, seed: int, compile=None) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(program.model)
    loop = program.by_hand(model, compile)

    def tensors():
        targets = (
            (f"{name}: {path}", t) for name, part in loop.targets.items() for path, t in part.state_dict().items()
        )
        return {**model.state_dict(), **dict(targets)}

    return after(program, seed, loop.body, tensors)


def by_ours(program: Program, seed: int, compile=False) -> dict[str, torch.Tensor]:
    step = program.ours(copy.deepcopy(program.model), compile)
    state = step.init()

    def body(batch):
        nonlocal state
        state, _ = step(state, batch)

    def tensors():
        targets = ((f"{name}: {path}", t) for name, part in state.targets.items() for path, t in part.items())
        return {**state.params, **state.buffers, **dict(targets)}

    return after(program, seed, body, tensors)


def assert_same(program: Program, found: dict, wanted: dict) -> None:
    """The same displacements."""
    start = program.model.state_dict()
    assert set(found) == set(wanted)
    for path, tensor in wanted.items():
        begun = start.get(path, 0.0)
        torch.testing.assert_close(found[path] - begun, tensor - begun, rtol=1e-8, atol=1e-12, msg=path)


@pytest.mark.parametrize("name", TINY)
def test_our_program_does_what_the_loop_by_hand_does(name, seed):
    program = TINY[name]()
    wanted = by_hand(program, seed)
    start = program.model.state_dict()
    assert {path for path, before in start.items() if torch.equal(before, wanted[path])} == UNMOVED[name]
    assert_same(program, by_ours(program, seed), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_compiled_programs_do_it_too(name, seed):
    program = TINY[name]()
    wanted = by_hand(program, seed)
    assert_same(program, by_hand(program, seed, {"backend": "aot_eager"}), wanted)
    assert_same(program, by_ours(program, seed, {"backend": "aot_eager"}), wanted)


@pytest.mark.parametrize("name", ["byol", "sac"])
def test_a_target_that_moves_otherwise_is_another_update(name, seed, monkeypatch):
    program = TINY[name]()
    wanted = by_hand(program, seed)
    monkeypatch.setattr(importlib.import_module(f"bench.workloads.{name}"), "KEPT", 0.5)
    found = by_hand(program, seed)
    assert max(float((found[path] - wanted[path]).abs().max()) for path in program.model.state_dict()) > 1e-9
    with pytest.raises(AssertionError):
        assert_same(program, found, wanted)


def test_contenders_are_compared_with_the_loop_by_hand():
    program, results = TINY["wgan-gp"](), {"by-hand": {}, "funcfreeze": {}, "recipe": {}}
    contenders = run._build(program, run.Options(peers=tuple(results)), CPU, results)
    assert [*contenders] == ["by-hand", "funcfreeze"]
    assert results["recipe"]["absent"] == "not written"
    assert results["funcfreeze"]["difference"] < 1e-9
    assert "difference" not in results["by-hand"]


@pytest.mark.parametrize("peer", ["summed", "recipe", "inputs", "torchjd", "jax"])
def test_nobody_else_has_written_them(peer):
    assert PEERS[peer].build(TINY["sac"](), CPU).kind in ("not written", "not installed")


@pytest.mark.slow
def test_their_bars_run():
    found = bars.whole_program(TINY["wgan-gp"](), 2)
    assert set(found["ms"]) == {"by-hand", "by-hand-compiled", "funcfreeze", "funcfreeze-compiled"}
    assert min(found["ms"].values()) > 0
