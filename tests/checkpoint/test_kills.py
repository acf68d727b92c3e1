"""Runs that are killed at random moments, half of them inside of a save, end with the bits of one that was not."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from full_runs import flat, lone, network, train

import funcfreeze as ff

STEPS, EVERY = 60, 3
KILLS = int(os.environ.get("FUNCFREEZE_KILLS", "30"))  # 100 takes two minutes and more


def run(folder):
    """What one writes as a script that starts and restarts."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    step = lone(network())
    state, extra = ff.checkpoint.resume(folder / "saved", step)
    losses = extra.get("losses", [])
    with (folder / "log").open("a") as log:
        log.write(f"resumed {int(state.step)}\n")
        while int(state.step) < STEPS:
            seen = []
            state = train(step, state, 1, seen)
            losses.append([float(value) for value in flat(seen[0]).values() if value.ndim == 0])
            if int(state.step) % EVERY == 0:
                log.write("saving\n")
                log.flush()
                extra = {"losses": losses}
                ff.checkpoint.save(
                    folder / "saved", step, state, extra=extra, keep=2, background=int(state.step) % 2 == 0
                )
                log.write(f"saved {int(state.step)}\n")
                log.flush()
    digest = hashlib.sha256(json.dumps(losses).encode())
    for tensor in [*state.params.values(), *state.buffers.values(), *state.targets["teacher"].values()]:
        digest.update(tensor.numpy().tobytes())
    (folder / "unfinished").write_text(digest.hexdigest())
    os.replace(folder / "unfinished", folder / "end")  # it may be killed here, too


def started(folder):
    folder.mkdir(exist_ok=True)
    process = os.fork()
    if process == 0:
        try:
            run(folder)
        except BaseException as error:
            (folder / "error").write_text(repr(error))
        os._exit(0)
    return process


def lines_of(folder):
    log = folder / "log"
    return log.read_text().splitlines() if log.exists() else []


def has_ended(process):
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait_for_a_save(process, folder, rng):
    """Until it begins one, and a few thousandths of a second more."""
    saves = rng.randrange(1, 6) + lines_of(folder).count("saving")
    while not has_ended(process) and lines_of(folder).count("saving") < saves:
        time.sleep(0.0005)  # another process, which is to be caught in the act
    time.sleep(rng.uniform(0, 0.006))  # about as long as a save takes: anywhere inside of one


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_killed_at_random_moments(tmp_path, seed):
    rng = random.Random(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what is forked has no thread pool
    try:
        begin = time.monotonic()
        os.waitpid(started(tmp_path / "whole"), 0)
        whole = time.monotonic() - begin
        assert not (tmp_path / "whole" / "error").exists(), (tmp_path / "whole" / "error").read_text()
        wanted = (tmp_path / "whole" / "end").read_text()
        kills = inside = attempts = 0
        while kills < KILLS:
            folder, attempts = tmp_path / f"run{attempts}", attempts + 1
            while not (folder / "end").exists():
                process = started(folder)
                if rng.random() < 0.6:
                    wait_for_a_save(process, folder, rng)
                else:
                    time.sleep(rng.uniform(0.02, whole / 3))  # anywhere at all, starting included
                if not has_ended(process):
                    os.kill(process, signal.SIGKILL)
                    kills += 1
                    inside += [line for line in lines_of(folder) if line.startswith("sav")][-1:] == ["saving"]
                os.waitpid(process, 0)
                assert not (folder / "error").exists(), (folder / "error").read_text()
                assert_nothing_is_lost(folder)
            assert (folder / "end").read_text() == wanted, folder
        assert inside >= 0.4 * kills, f"{inside} of {kills}"
    finally:
        torch.set_num_threads(threads)


def assert_nothing_is_lost(folder):
    """What was said to be saved is there, but for what is written in the background: there the one before."""
    saved = max((int(line.split()[1]) for line in lines_of(folder) if line.startswith("saved")), default=0)
    present = [int(path.stem.removeprefix("step-")) for path in Path(folder / "saved").glob("step-*")]
    assert max(present, default=0) >= saved - EVERY
