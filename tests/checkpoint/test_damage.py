"""Damaged checkpoints are found and named, and the newest good one is used; what is none is said to be none."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from full_runs import batch, by_turns, lone, network, train
from torch import nn

import funcfreeze as ff
from funcfreeze.checkpoint import saving
from funcfreeze.checkpoint.folder import checkpoints_in


def flipped(raw, rng):
    at = rng.randrange(len(raw))
    raw[at] ^= 1 << rng.randrange(8)


def cut(raw, rng):
    del raw[rng.randrange(len(raw)) :]


def zeroed(raw, rng):
    start = rng.randrange(len(raw))
    block = raw[start : start + 64]
    raw[start : start + 64] = bytes(len(block)) if any(block) else b"\xff" * len(block)


def run_with(steps, folder, **options):
    step = lone(network())
    state = step.init()
    for _ in range(steps):
        state = train(step, state, 1)
        ff.checkpoint.save(folder, step, state, **options)
    return step, state


@pytest.mark.parametrize("damage", [flipped, cut, zeroed], ids=["flipped", "cut", "zeroed"])
def test_damage_anywhere_is_found_and_named(damage, seed, tmp_path):
    rng = random.Random(seed)
    step, _ = run_with(2, tmp_path)
    newest, before = checkpoints_in(tmp_path)
    for _ in range(70):
        victim = newest / rng.choice(sorted(os.listdir(newest)))
        raw = bytearray(victim.read_bytes())
        kept = bytes(raw)
        damage(raw, rng)
        victim.write_bytes(raw)
        problems = ff.checkpoint.check(newest)
        assert any(victim.name in problem for problem in problems), (victim, problems)
        assert ff.checkpoint.check(before) == []
        with pytest.warns(
            UserWarning, match=rf"{before.name} is the newest that is whole; newer ones are damaged:\n.*{victim.name}"
        ):
            state, _ = ff.checkpoint.resume(tmp_path, step)
        assert int(state.step) == 1
        with pytest.raises(ValueError, match=f"this checkpoint cannot be loaded:\n.*{victim.name}"):
            ff.checkpoint.load(newest, step)
        victim.write_bytes(kept)
    assert ff.checkpoint.check(tmp_path) == []


def test_files_that_are_missing_or_of_a_newer_format(tmp_path):
    step, _ = run_with(1, tmp_path)
    (at,) = checkpoints_in(tmp_path)
    (at / "tensors.safetensors").rename(tmp_path / "aside")
    assert ff.checkpoint.check(at) == [f"{at / 'tensors.safetensors'}: it is missing"]
    with pytest.raises(ValueError, match="all checkpoints in .* are damaged:\n.*it is missing"):
        ff.checkpoint.resume(tmp_path, step)
    (tmp_path / "aside").rename(at / "tensors.safetensors")
    (at / "manifest.json").unlink()
    with pytest.raises(ValueError, match="is no checkpoint: no manifest.json is in it"):
        ff.checkpoint.load(at, step)
    with pytest.raises(ValueError, match="is not there"):
        ff.checkpoint.load(tmp_path / "nowhere", step)
    with pytest.raises(ValueError, match="nowhere is not there, and a checkpoint is a folder"):
        ff.checkpoint.check(tmp_path / "nowhere")


def test_a_newer_format_is_no_damage(tmp_path, monkeypatch):
    step, _ = run_with(1, tmp_path)
    monkeypatch.setattr("funcfreeze.checkpoint.manifest.FORMAT", 0)
    with pytest.raises(ValueError, match="is of format 1, this version of funcfreeze reads format 0: update it"):
        ff.checkpoint.resume(tmp_path, step)


class Planted:
    def __reduce__(self):
        return os.mkdir, (Planted.where,)


def test_nothing_is_unpickled(tmp_path):
    step, _ = run_with(2, tmp_path)
    newest, _ = checkpoints_in(tmp_path)
    Planted.where = str(tmp_path / "ran")
    (newest / "tensors.safetensors").write_bytes(pickle.dumps(Planted()))
    with pytest.warns(UserWarning, match="damaged"):
        ff.checkpoint.resume(tmp_path, step)
    torch.save(Planted(), tmp_path / "weights.pt")
    with pytest.raises(Exception, match="(?i)header"):
        ff.checkpoint.load_into(network(), tmp_path / "weights.pt")
    assert not (tmp_path / "ran").exists()


def test_another_model_plan_or_optimizer_is_told_at_once(tmp_path):
    _, _ = run_with(1, tmp_path)
    other = network()
    other["trunk"][0] = nn.Linear(4, 8, bias=False)
    other["a"] = nn.Linear(8, 3)
    merge = {"trunk.0": ff.merge.pcgrad(seed=3)}
    step = ff.Step(
        other,
        lone(network()).losses,
        {"a": ["trunk", "a"], "b": {"trunk": 0.7, "b": 1.0}},
        optimizer=ff.optim.sgd(0.1),
        merge=merge,
    )
    with pytest.raises(ValueError, match="was saved by another step") as error:
        ff.checkpoint.resume(tmp_path, step)
    for told in [
        "parameter trunk.0.bias: the State has it, the Step does not",
        r"parameter a.weight: the Step has shape (3, 8)",
        "optimizer",
        'plan: trunk.0.weight and 2 more are routed {"a": [1.0], "b": [0.5]} in the checkpoint, '
        '{"a": [1.0], "b": [0.7]} in this step',
        "optimizer: trunk.0.weight is updated by AdamW in the checkpoint, by SGD in this step",
    ]:
        assert told in str(error.value), error.value
    (at,) = checkpoints_in(tmp_path)
    with pytest.warns(UserWarning, match="start afresh"):
        state, _ = ff.checkpoint.load(at, step, strict=False)
    assert int(state.step) == 1
    alternation = by_turns(network())
    with pytest.raises(ValueError, match="plan: the checkpoint is of a Step, this step of an alternation"):
        ff.checkpoint.resume(tmp_path, alternation)
    with pytest.raises(ValueError, match=r"is of another model:\n(.*\n)*.*a.weight: the file has shape \(2, 8\)"):
        ff.checkpoint.load_into(other, at)


def test_bad_values_write_nothing(tmp_path):
    step = lone(network())
    state = step.init()
    for options, error, message in [
        (
            {"extra": {"model": network(), "path": {"deep": {1, 2}}}},
            TypeError,
            r"not extra.model \(ModuleDict\), extra.path.deep \(set\)",
        ),
        ({"extra": {"at": {(1, 2): 3}}}, TypeError, r"not extra.at \(dict with keys that are tuple\)"),
        ({"data": [1, 2]}, TypeError, "list cannot say where it is"),
        ({"keep": 0}, ValueError, "keep is the number of checkpoints that stay, at least 1"),
        ({"generators": {"mine": 3}}, TypeError, r"generators\['mine'\] is a torch.Generator"),
        ({"extra": {"x": torch.eye(2).to_sparse()}}, TypeError, "sparse or quantised are extra/x"),
    ]:
        with pytest.raises(error, match=message):
            ff.checkpoint.save(tmp_path, step, state, **options)
    train(step, state, 1)
    with pytest.raises(RuntimeError, match="spent"):
        ff.checkpoint.save(tmp_path, step, state)
    with pytest.raises(ValueError, match="another model or optimizer"):
        ff.checkpoint.save(tmp_path, lone(nn.ModuleDict({**network(), "more": nn.Linear(1, 1)})), step.init())
    assert [*tmp_path.iterdir()] == []


def test_the_last_ones_stay(tmp_path):
    step, state = run_with(5, tmp_path)
    assert [path.name for path in checkpoints_in(tmp_path)] == [f"step-000000000{n}" for n in (5, 4, 3)]
    ff.checkpoint.save(tmp_path, step, step.init(), keep=1)  # an older one, which is what was asked for
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-0000000000"]
    ff.checkpoint.save(tmp_path, step, state, keep=None, extra={"again": 1})
    ff.checkpoint.save(tmp_path, step, state, keep=None, extra={"again": 2})
    assert len(checkpoints_in(tmp_path)) == 2
    assert ff.checkpoint.resume(tmp_path, step)[1] == {"again": 2}
    assert len(os.listdir(tmp_path)) == 2, "nothing unfinished is left"


@pytest.mark.filterwarnings("ignore:.*cannot say where it is")
def test_a_clock_that_goes_backwards(tmp_path, monkeypatch):
    """Which is the newest goes by steps, and when to save by a clock that only goes on."""
    step, state = run_with(3, tmp_path)
    for age, path in enumerate(checkpoints_in(tmp_path)):
        os.utime(path, (1e9 + age, 1e9 + age))
        os.utime(path / "manifest.json", (1e9 + age, 1e9 + age))
    clock = itertools.count(2e9, -3600)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    monkeypatch.setattr(saving, "datetime", SimpleNamespace(datetime=Backwards))
    state, _ = ff.checkpoint.resume(tmp_path, step)
    assert int(state.step) == 3
    state, _ = ff.fit(step, state, [batch()] * 4, epochs=1, folder=tmp_path, save_minutes=1e-9, show=False)
    assert [path.name[-1] for path in checkpoints_in(tmp_path)] == ["7", "6", "5"]


class Backwards(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.datetime.fromtimestamp(time.time(), tz)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    step, state = run_with(1, tmp_path)

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("funcfreeze.checkpoint.saving.write_tensors", full)
    state = train(step, state, 1)
    with pytest.raises(OSError, match="No space left on device"):
        ff.checkpoint.save(tmp_path, step, state)
    told = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ff.checkpoint.save(tmp_path, step, state, background=True)
        assert int(ff.checkpoint.resume(tmp_path, step)[0].step) == 1  # waits for the thread
        told = [str(one.message) for one in caught]
    assert any("no checkpoint was saved: OSError" in text and "No space left" in text for text in told), told
    assert len(os.listdir(tmp_path)) == 1


def test_two_at_once_into_one_folder(tmp_path):
    steps = [lone(network()) for _ in range(2)]
    errors = []

    def saving(step):
        try:
            state = step.init()
            for _ in range(8):
                state = train(step, state, 1)
                ff.checkpoint.save(tmp_path, step, state, keep=2)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=saving, args=(step,)) for step in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert ff.checkpoint.check(tmp_path) == []
    assert 1 <= len(os.listdir(tmp_path)) <= 3


SAVING = """
import sys, torch, funcfreeze as ff
torch.manual_seed(0)
folder, name = sys.argv[1:]
model = torch.nn.Linear(64, 64)
step = ff.Step(model, lambda m, x: {"l": m(x).square().mean()}, {"l": "*"}, optimizer=ff.optim.adam(0.1))
state = step.init()
for count in range(25):
    state, _ = step(state, torch.ones(2, 64))
    ff.checkpoint.save(folder, step, state, extra={"by": name}, keep=2, background=count % 2 == 0)
"""


@pytest.mark.slow
def test_two_processes_into_one_folder(tmp_path):
    """The later of a step's two stays, each is whole, nothing unfinished is left."""
    command = [sys.executable, "-W", "error", "-c", SAVING, str(tmp_path)]
    running = [subprocess.Popen([*command, name], stderr=subprocess.PIPE, text=True) for name in ("one", "other")]
    told = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], told
    assert told == ["", ""]
    assert ff.checkpoint.check(tmp_path) == []
    model = torch.nn.Linear(64, 64).float()
    step = ff.Step(model, lambda m, x: {"l": m(x).square().mean()}, {"l": "*"}, optimizer=ff.optim.adam(0.1))
    state, extra = ff.checkpoint.resume(tmp_path, step)
    assert int(state.step) == 25
    assert extra["by"] in ("one", "other")
    assert 1 <= len(os.listdir(tmp_path)) <= 3


@contextlib.contextmanager
def nothing_can_be_written(folder):
    """By rights, or as root, who has them all, by a file system that is mounted so."""
    by_root = os.geteuid() == 0
    if not by_root:
        folder.chmod(0o555)
    elif subprocess.run(["mount", "--bind", "-o", "ro", str(folder), str(folder)], capture_output=True).returncode:
        pytest.skip("root without a right to mount may write anywhere")
    try:
        yield
    finally:
        if by_root:
            subprocess.run(["umount", str(folder)], check=True)
        else:
            folder.chmod(0o755)


def test_a_folder_that_is_read_only(tmp_path):
    folder = tmp_path / "run"
    step, state = run_with(2, folder)
    before = sorted(os.listdir(folder))
    with nothing_can_be_written(folder):
        with pytest.raises(OSError, match=f"(Read-only file system|Permission denied).*{re.escape(str(folder))}"):
            ff.checkpoint.save(folder, step, state)

        def saved_in_the_background():
            ff.checkpoint.save(folder, step, state, background=True)
            return ff.checkpoint.resume(folder, step)[0]

        with pytest.warns(UserWarning, match=r"no checkpoint was saved: \w+Error: .* are as before"):
            found = saved_in_the_background()
        assert int(found.step) == 2
        assert ff.checkpoint.check(folder) == []
    assert sorted(os.listdir(folder)) == before


def test_without_safetensors_it_is_said_at_once(tmp_path, monkeypatch):
    step = lone(network())
    state = step.init()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for save in (
        lambda: ff.checkpoint.save(tmp_path, step, state, background=True),
        lambda: ff.fit(step, state, [torch.ones(6, 4)], steps=1, folder=tmp_path, show=False),
    ):
        with pytest.raises(ImportError, match=r"pip install 'funcfreeze\[checkpoint\]'"):
            save()
    assert int(state.step) == 0
    assert [*tmp_path.iterdir()] == []


HOLDING = """
import sys
from pathlib import Path
from funcfreeze.checkpoint.folder import held
with held(Path(sys.argv[1])) as is_ours:
    print("held" if is_ours else "not held", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_left_goes(tmp_path):
    step, state = run_with(1, tmp_path)
    (at,) = checkpoints_in(tmp_path)
    gone, written = (tmp_path / f".step-0000000009.{digit * 16}" for digit in "01")
    for left in (gone, written):
        shutil.copytree(at, left)
    held = [sys.executable, "-c", HOLDING, str(written)]
    with subprocess.Popen(held, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        ff.checkpoint.save(tmp_path, step, state)
        assert not gone.exists()
        assert written.exists(), "another process writes it"
        process.kill()
    ff.checkpoint.save(tmp_path, step, state)
    assert not written.exists()
    assert json.loads((at / "manifest.json").read_text())["step"] == 1


@pytest.mark.slow
def test_a_disk_that_fills(tmp_path):
    """A real one, where the machine lets us have one."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("no right to mount a file system of so many bytes, and so no disk that fills")
    try:
        step = lone(network())
        state, saved, failed = step.init(), [], None
        while failed is None and len(saved) < 20:
            state = train(step, state, 1)
            try:
                saved.append(ff.checkpoint.save(small, step, state, keep=None))
            except OSError as error:
                failed = error
        assert "No space left on device" in str(failed)
        assert ff.checkpoint.check(small) == []
        assert sorted(small.iterdir()) == saved
        state = train(step, state, 1)  # training goes on
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_folder_that_is_a_file(tmp_path):
    step = lone(network())
    (tmp_path / "taken").write_text("")
    with pytest.raises(OSError, match="taken"):
        ff.checkpoint.save(tmp_path / "taken", step, step.init())
