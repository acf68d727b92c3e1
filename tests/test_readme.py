"""Everything in the README that can be run is run, and what it prints is what it says."""

from __future__ import annotations

import pathlib
import re

import pytest
import torch

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def ran() -> dict:
    """The names that the README's Python leaves behind, run from top to bottom."""
    torch.set_default_dtype(torch.float32)
    namespace: dict = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    return namespace


def test_the_example_runs(ran):
    assert set(ran["metrics"]) == {"cls", "dom"}
    assert int(ran["state"].step) == 3
    assert ran["report"].ok


def test_the_plan_prints_as_shown(ran):
    (shown,) = (block for block in blocks("text") if block.startswith("parameter"))
    assert str(ran["step"].plan) == shown.strip()


def test_where_losses_meet_is_told_as_shown(ran):
    (shown,) = (block for block in blocks("text") if block.startswith("merge"))
    assert str(ran["meeting"].plan).splitlines()[-1] == shown.strip()


def test_the_first_example_has_at_most_twenty_lines():
    assert len([line for line in blocks("python")[0].splitlines() if line.strip()]) <= 20


def test_exactly_two_lines_set_everything_up():
    assert re.findall(r"^pip install .*", README, flags=re.MULTILINE) == [
        'pip install -c constraints.txt ".[demo]" && funcfreeze demo',
        'pip install -c constraints.txt ".[test]" && pytest',
    ]


def test_a_script_that_starts_and_restarts(ran, tmp_path):
    with torch.random.fork_rng():
        wanted = ran["script"](tmp_path / "whole", 12)
        ran["script"](tmp_path / "parts", 6)
        found = ran["script"](tmp_path / "parts", 12)
    assert all(torch.equal(found.params[path], tensor) for path, tensor in wanted.params.items())


def test_the_loop_that_is_there(ran, tmp_path):
    with torch.random.fork_rng():
        whole, fitted = ran["fitted_script"](tmp_path / "whole", 12)
        ran["fitted_script"](tmp_path / "parts", 6)
        parts, _ = ran["fitted_script"](tmp_path / "parts", 12)
    assert fitted.reason == "steps"
    assert fitted.best is not None
    assert all(torch.equal(parts.params[path], tensor) for path, tensor in whole.params.items())
    assert len((tmp_path / "whole" / "log.jsonl").read_text().splitlines()) == 3
