"""The command, as one types it."""

import io
import json
import runpy
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.metadata import version

import pytest
import torch
from typer.testing import CliRunner

from funcfreeze.declare.plan import Plan
from funcfreeze.demos import adversarial, seeds, speed
from funcfreeze.demos.commands import app
from funcfreeze.proof.report import Check, Report

MEASURES = {"source_accuracy", "target_accuracy", "domain_probe"}
TINY = ["--steps", "3", "--speed-seconds", "0"]


@pytest.fixture(autouse=True)
def single_precision():
    """The demos run in torch's default dtype, as they do from the command."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


def typed(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "deep" / "folder"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "Size", partial(speed.Size, layers=2, width=8, heads=2, batch=4))
        return typed("demo", "--out", out, "--seeds", 2, *TINY), out


def test_demo_writes_its_files(ran):
    result, out = ran
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == ["curves.png", "plan.json", "results.json"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_demo_writes_its_results(ran):
    _, out = ran
    results = json.loads((out / "results.json").read_text())
    assert results["seeds"] == [0, 1]
    for run in ("baseline", "adversarial"):
        assert results[run].keys() == MEASURES
        assert all(len(values) == 2 and 0 <= min(values) <= max(values) <= 1 for values in results[run].values())
    assert results["verify"]["ok"] is True
    assert 0 <= results["verify"]["worst"] < 1e-6
    assert all(results["speed"][key] > 0 for key in ("recipe_ms", "reversal_ms", "routed_ms"))


def test_demo_writes_the_plan_it_trained_with(ran):
    _, out = ran
    settings = replace(adversarial.Settings(), steps=3)
    assert Plan.from_dict(json.loads((out / "plan.json").read_text())) == adversarial.make_step(0, 0.3, settings).plan


def test_demo_says_things_in_order(ran):
    result, out = ran
    expected = [
        "domain updates 10 of 12 parameters",
        "ok: engine 'routed' against the recipe",
        "training 100%",
        "target accuracy",
        "torch.optim.Adam",
        f"wrote {out / 'curves.png'}",
    ]
    places = [result.output.index(text) for text in expected]
    assert places == sorted(places)


def test_demo_is_plain_without_a_terminal(ran):
    result, _ = ran
    assert "\x1b" not in result.output
    assert "\r" not in result.output


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_an_unwritable_folder_is_said_in_one_line_before_the_training(tmp_path, inside):
    taken = tmp_path / "taken"
    taken.write_text("a file")
    result = typed("demo", "--out", taken / inside, *TINY)
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("funcfreeze: cannot write ")
    assert str(taken) in line
    assert line.endswith("give another folder with --out DIR")


def test_demo_ends_where_the_step_is_not_verified(tmp_path, monkeypatch):
    failed = Report("engine against the recipe", (Check("encoder", error=1.0, tolerance=1e-10),))
    monkeypatch.setattr(adversarial, "verify_step", lambda *_: failed)
    result = typed("demo", "--out", tmp_path, *TINY)
    assert result.exit_code == 1
    assert "NOT OK" in result.stdout
    assert "training" not in result.stdout
    assert result.stderr.startswith("funcfreeze: the step is not equal to the recipe")


@pytest.mark.parametrize("option", ["--seeds", "--steps"])
def test_counts_start_at_one(option):
    result = typed("demo", option, 0)
    assert result.exit_code == 2
    assert option in result.output


def test_options_of_demo_are_not_ignored_before_finetune(tmp_path):
    result = typed("demo", "--seeds", 2, "finetune")
    assert result.exit_code == 2
    assert "--seeds" in result.output
    assert "finetune" in result.output


def test_finetune_shows_plan_and_numbers():
    result = typed("demo", "finetune", "--seeds", 2, "--steps", 3)
    assert result.exit_code == 0, result.output
    assert "frozen: no route" in result.output
    (body,) = (line for line in result.output.splitlines() if "largest change in body" in line)
    assert body.count("bit-identical") == 1
    assert "163,840" in result.output
    assert "\x1b" not in result.output


def test_verify_seeds_prints_every_case():
    result = typed("verify", "seeds")
    assert result.exit_code == 0, result.output
    assert result.output.count("ok: ") >= len(seeds.seed_reports())


def test_verify_seeds_fails_when_a_case_does(monkeypatch):
    failed = Report("y = b + a·x", (Check("a", error=1.0, tolerance=1e-12),))
    monkeypatch.setattr(seeds, "seed_reports", lambda: [failed])
    result = typed("verify", "seeds")
    assert result.exit_code == 1
    assert "NOT OK: y = b + a·x" in result.stdout


def test_version():
    assert typed("--version").output == f"funcfreeze {version('funcfreeze')}\n"


@pytest.mark.parametrize("arguments", [[], ["demo"], ["demo", "finetune"], ["verify"], ["verify", "seeds"]])
def test_every_command_has_help(arguments):
    result = typed(*arguments, "--help")
    assert result.exit_code == 0
    assert "Usage: " in result.output


CASES = {
    "everything": (["typer", "rich", "sklearn", "matplotlib"], ["demo", "--out", "out"]),
    "scikit-learn": (["sklearn"], ["demo", "--out", "out"]),
    "matplotlib": (["matplotlib"], ["demo", "--out", "out"]),
    "equations": (["sklearn", "matplotlib"], ["verify", "seeds"]),
}
"""What is not installed, and what is typed."""

WITHOUT = """
import gc, json, os, sys
import funcfreeze

os.chdir(sys.argv[2])
gc.freeze()  # else every child copies what its end looks through
for name, (blocked, arguments) in json.loads(sys.argv[1]).items():
    child = os.fork()  # what a case imports is its own; that torch is, is shared
    if not child:
        for number, stream in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{name}.{stream}", os.O_CREAT | os.O_WRONLY), number)
        sys.modules.update(dict.fromkeys(blocked))  # None there is a module that cannot be found
        sys.argv = ["funcfreeze", *arguments]
        from funcfreeze.cli import main
        main()
        sys.exit()
    with open(f"{name}.code", "w") as file:
        file.write(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """Exit code, output and errors of each case, and what files are there after it."""
    folder = tmp_path_factory.mktemp("without")
    subprocess.run([sys.executable, "-c", WITHOUT, json.dumps(CASES), str(folder)], check=True, timeout=120)
    return folder


@pytest.mark.parametrize(
    ("case", "package"), [("everything", "typer"), ("scikit-learn", "scikit-learn"), ("matplotlib", "matplotlib")]
)
def test_a_missing_extra_is_said_in_one_line(case, package, without):
    assert (without / f"{case}.code").read_text() == "1"
    assert (without / f"{case}.out").read_text() == ""
    assert (without / f"{case}.err").read_text() == (
        f'funcfreeze: the command needs {package}, which is not installed: pip install "funcfreeze[demo]"\n'
    )
    assert not (without / "out").exists()


def test_verify_needs_no_data_and_no_plots(without):
    assert (without / "equations.code").read_text() == "0", (without / "equations.err").read_text()
    assert "ok: " in (without / "equations.out").read_text()


def test_a_narrow_encoding_does_not_end_the_command(monkeypatch):
    """As in `python -m funcfreeze.cli`, in this process."""
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "argv", ["funcfreeze", "demo", "finetune", "--seeds", "1", "--steps", "1"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
    monkeypatch.delitem(sys.modules, "funcfreeze.cli", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("funcfreeze.cli", run_name="__main__")
    sys.stdout.flush()
    assert not ended.value.code
    assert b"?  frozen: no route" in printed.getvalue()


@pytest.mark.slow
def test_a_demo_that_is_stopped_and_resumed_gives_the_same_table(tmp_path):
    """SIGTERM in the middle of the training, SIGKILL later on, and the same numbers as undisturbed."""
    options = ["--seeds", "2", "--steps", "240", "--speed-seconds", "0"]

    def run(folder, *more, kill=None, after=""):
        command = [
            sys.executable,
            "-u",
            "-m",
            "funcfreeze.cli",
            "demo",
            "--out",
            str(tmp_path / folder),
            *options,
            *more,
        ]
        out = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                out.append(line)
                if kill is not None and line.startswith(after):
                    process.send_signal(kill)
                    kill = None
            told = process.stderr.read()
        return process.returncode, "".join(out), told

    code, wanted, told = run("whole")
    assert code == 0, told
    code, _, told = run("parts", kill=signal.SIGTERM, after="training  2")
    assert code == 1
    assert told.splitlines()[-1] == "funcfreeze: stopped by SIGTERM; the same command with --resume goes on"
    code, _, _ = run("parts", "--resume", kill=signal.SIGKILL, after="training  6")
    assert code == -signal.SIGKILL
    code, found, told = run("parts", "--resume")
    assert code == 0, told
    whole, parts = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "parts"))
    for run_ in ("baseline", "adversarial"):
        assert whole[run_] == parts[run_]
    table = [line for line in wanted.splitlines() if "->" in line]
    assert [line for line in found.splitlines() if "->" in line] == table
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["curves.png", "plan.json", "results.json"]
