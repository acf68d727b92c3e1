"""The command that looks into checkpoints, as one types it."""

from __future__ import annotations

import torch
from full_runs import lone, network, train
from typer.testing import CliRunner

import funcfreeze as ff
from funcfreeze.demos.commands import app


def typed(*arguments):
    return CliRunner().invoke(app, ["checkpoint", *map(str, arguments)])


def test_what_is_there_and_how_two_differ(tmp_path):
    step = lone(network())
    state = step.init()
    paths = []
    for best in (0.5, 0.25):
        state = train(step, state, 1)
        paths.append(ff.checkpoint.save(tmp_path, step, state, extra={"best": best}))
    shown = typed(tmp_path)
    assert shown.exit_code == 0
    rows = [line for line in shown.output.splitlines() if "whole" in line]
    assert [row.split()[0] for row in rows] == ["2", "1"]
    assert "extra.best: 0.25" in shown.output
    assert "step-0000000002 of Step(a, b; engine='routed', donate=True)" in shown.output
    assert str(step.plan) in shown.output
    assert "numbers: 83 of params, 17 of buffers, " in shown.output
    differing = typed(*paths)
    assert differing.exit_code == 0
    assert "\nstep: 1 and 2\n" in differing.output
    assert differing.output.startswith("params/")
    assert "params/trunk.0.weight: differs by" in differing.output
    assert "extra.best: 0.5 and 0.25" in differing.output
    assert typed(paths[0], paths[0]).output == "the two are the same\n"


def test_damage_and_folders_without_any(tmp_path):
    step = lone(network())
    at = ff.checkpoint.save(tmp_path, step, step.init())
    raw = bytearray((at / "tensors.safetensors").read_bytes())
    raw[-1] ^= 1
    (at / "tensors.safetensors").write_bytes(raw)
    shown = typed(tmp_path)
    assert shown.exit_code == 1
    assert "damaged" in shown.output
    assert "its bytes are not those that were written" in shown.output
    assert typed(at, at).exit_code == 1
    none = typed(tmp_path / "nowhere")
    assert none.exit_code == 1
    assert "nowhere is not there, and a checkpoint is a folder" in none.stderr


def test_tensors_of_other_shapes(tmp_path):
    paths = []
    for width in (2, 3):
        step = ff.Step(
            torch.nn.Linear(width, 1), lambda m, x: {"l": m(x).sum()}, {"l": "*"}, optimizer=ff.optim.sgd(0.1)
        )
        paths.append(ff.checkpoint.save(tmp_path / str(width), step, step.init()))
    assert "params/weight: (1, 2) torch.float64 and (1, 3) torch.float64" in typed(*paths).output
