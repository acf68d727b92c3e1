"""Every example runs by the command in its first line, and says what is missing where its framework is."""

from __future__ import annotations

import ast
import os
import pathlib
import re
import subprocess
import sys

import pytest
from plain_ways import FOLDER, ROOT, skip_if_by_hand

NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
INSTALL = r'pip install -c constraints\.txt ("\.\[examples\]"( deepspeed)?|\.)'
FIRST_LINE = re.compile(rf"# (?P<install>{INSTALL}) && (?P<launcher>python|torchrun --nproc-per-node 2) (?P<path>\S+)")
FRAMEWORKS = {  # the first thing that each needs beside torch, or before it
    "accelerate_loop": "accelerate",
    "byol": "sklearn",
    "ddp": "sklearn",
    "deepspeed_loop": "deepspeed",
    "lightning_module": "lightning",
    "multitask": "sklearn",
    "plain_loop": "sklearn",
    "sac": "torch",
    "trainer_lora": "peft",
}
RUNNER = pathlib.Path(__file__).parent / "beside_torchvision.py"


def first_line(name: str) -> re.Match[str]:
    return FIRST_LINE.fullmatch((FOLDER / f"{name}.py").read_text().splitlines()[0])


def run(command: list[str], *first: pathlib.Path) -> subprocess.CompletedProcess[str]:
    paths = [*first, ROOT, ROOT / "tests", *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, *command]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


def test_each_has_its_framework_here():
    assert list(FRAMEWORKS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_is_short_and_begins_with_its_command_and_what_it_shows(name):
    source = (FOLDER / f"{name}.py").read_text()
    found = first_line(name)
    assert found, source.splitlines()[0]
    assert found["path"] == f"examples/{name}.py"
    assert len(source.splitlines()) < 120
    assert ast.get_docstring(ast.parse(source))


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in NAMES])
def test_each_runs(name):
    skip_if_by_hand(FRAMEWORKS[name])
    found = first_line(name)
    if found["launcher"] == "python":
        ended = run([str(RUNNER), found["path"]])
    else:
        ended = run(["-m", "torch.distributed.run", *found["launcher"].split()[1:], found["path"]])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.search("^parameter +elements ", ended.stdout, re.MULTILINE), "the plan"
    assert re.search(r"^(step|batch|epoch|\{'loss')", ended.stdout, re.MULTILINE), "progress"
    assert re.search(r" \d\d%| deviation [01]\.\d\d", ended.stdout), "what came of it"


QUICK = {"lightning_module", "deepspeed_loop"}  # these import their framework first


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_without_its_framework_it_says_how_to_get_it(name, tmp_path):
    missing = FRAMEWORKS[name]
    (tmp_path / f"{missing}.py").write_text(
        f'raise ModuleNotFoundError("No module named {missing!r}", name="{missing}")'
    )
    ended = run([f"examples/{name}.py"], tmp_path)
    assert ended.returncode == 1
    assert ended.stderr == f"{missing} is missing: {first_line(name)['install']}\n"
    assert ended.stdout == ""


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "deepspeed_loop")])
def test_without_torchrun_it_says_how_to_start(name):
    skip_if_by_hand(FRAMEWORKS[name])
    ended = run([f"examples/{name}.py"])
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].endswith(f"torchrun --nproc-per-node 2 examples/{name}.py")
