"""In which order files, their names and their folders come onto the disk."""

from __future__ import annotations

import errno
import os
import stat
import sys
import time

import pytest
import torch
from torch import nn

import funcfreeze as ff
from funcfreeze.checkpoint import files, folder
from funcfreeze.checkpoint.folder import checkpoints_in


def step_of():
    return ff.Step(nn.Linear(2, 1), lambda m, x: {"l": m(x).mean()}, {"l": "*"}, optimizer=ff.optim.sgd(0.1))


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc what is synced")
def test_what_is_named_is_on_the_disk(tmp_path, monkeypatch):
    done = []
    sync, rename = os.fsync, os.rename

    def synced(handle):
        done.append(("synced", os.path.relpath(os.readlink(f"/proc/self/fd/{handle}"), tmp_path)))
        sync(handle)

    def renamed(one, other):
        rename(one, other)
        done.append(("renamed", os.path.relpath(other, tmp_path)))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    step = step_of()
    ff.checkpoint.save(tmp_path / "new" / "run", step, step.init())
    (unfinished,) = (name for what, name in done if what == "renamed" and ".step-" in name)
    final = "new/run/step-0000000000"
    order = [done.index(entry) for entry in done]
    assert order == sorted(order)
    assert done == [
        ("synced", "."),
        ("synced", "new"),
        ("renamed", unfinished),
        ("synced", f"{unfinished}/tensors.safetensors"),
        ("synced", f"{unfinished}/manifest.json"),
        ("synced", unfinished),
        ("renamed", final),
        ("synced", "new/run"),
    ]


def test_a_file_system_that_syncs_no_folders(tmp_path, monkeypatch):
    sync = os.fsync

    def files_alone(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(handle)

    monkeypatch.setattr(files.os, "fsync", files_alone)
    step = step_of()
    assert ff.checkpoint.check(ff.checkpoint.save(tmp_path, step, step.init())) == []


def test_a_rename_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    step = step_of()
    at = ff.checkpoint.save(tmp_path, step, step.init(), extra={"which": "old"})
    rename = os.rename

    def full(one, other):
        if other == at:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        rename(one, other)

    monkeypatch.setattr(folder.os, "rename", full)
    with pytest.raises(OSError, match="quota"):
        ff.checkpoint.save(tmp_path, step, step.init(), extra={"which": "new"})
    monkeypatch.undo()
    assert checkpoints_in(tmp_path) == [at]
    assert os.listdir(tmp_path) == [at.name]
    assert ff.checkpoint.load(at, step)[1] == {"which": "old"}


def test_without_locks_it_goes_by_days(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "fcntl", None)
    left, old = (tmp_path / f".step-0000000003.{digit * 16}" for digit in "01")
    for path in (left, old):
        path.mkdir()
    day_before = time.time() - 25 * 60 * 60
    os.utime(old, (day_before, day_before))
    step = step_of()
    ff.checkpoint.save(tmp_path, step, step.init())
    assert left.is_dir()
    assert not old.is_dir()


def test_values_that_python_and_json_tell_apart(tmp_path):
    step = step_of()
    extra = {
        "by": {1: torch.tensor(1.0), "1": torch.tensor(2.0), 1.5: (torch.tensor(4.0), b"x")},
        "deep": {"a/b": {"c": torch.tensor(5.0)}, "a": {"b/c": torch.tensor(6.0)}},
    }
    ff.checkpoint.save(tmp_path, step, step.init(), extra=extra)
    _, found = ff.checkpoint.resume(tmp_path, step)
    assert str(found) == str(extra)


def test_numbers_that_are_refused(tmp_path):
    numpy = pytest.importorskip("numpy")
    step = step_of()
    for value, kind in [
        (numpy.longdouble(1), "longdouble"),
        (numpy.datetime64("2026-01-01", "ns"), "datetime64"),
        (numpy.eye(1), "ndarray"),
        (10**5000, "int"),
        (numpy.add, "ufunc"),
    ]:
        with pytest.raises(TypeError, match=rf"not extra.x \({kind}\)"):
            ff.checkpoint.save(tmp_path, step, step.init(), extra={"x": value})
    ff.checkpoint.save(tmp_path, step, step.init(), extra={"x": [numpy.float32(0.5), numpy.bool_(True), numpy.int8(3)]})
    assert ff.checkpoint.resume(tmp_path, step)[1] == {"x": [0.5, True, 3]}
