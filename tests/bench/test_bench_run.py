"""The bench's runner, counts, tables and picture, on workloads too small to be timed."""

from __future__ import annotations

import importlib
import json
import pathlib
import re
from functools import partial

import pytest
import torch

import funcfreeze as ff
from bench import alone, bars, long_runs, overhead, peers, run, startup, table, workloads
from bench.__main__ import main, readme_section
from bench.contender import Absent, Contender, Peer
from bench.counts import multiply_adds, products
from bench.peers import by_hand, inputs, optax, recipe, torchjd
from bench.timing import interleaved, quartiles, steps_per_run
from bench.workloads.actor_critic import actor_critic
from bench.workloads.vit import vit

CPU = torch.device("cpu")
ROOT = pathlib.Path(__file__).parents[2]


def made_small(patch):
    """One tiny workload, and peers that build quickly; one is absent and one fails."""

    def broken(workload, device):
        raise RuntimeError("no luck\nat all")

    patch.setattr(workloads, "WORKLOADS", {"tiny": (partial(actor_critic, width=4, size=2),) * 2})
    chosen = {
        "recipe": Peer("recipe", recipe.build),
        "inputs": Peer("backward(inputs=)", inputs.build),
        "torchjd": Peer("TorchJD", torchjd.build, requires=("no_such_package",)),
        "by-hand": Peer("by hand", broken),
        "funcfreeze": Peer("funcfreeze", by_hand.build),  # stands in: the real one is tested beside its peers
    }
    patch.setattr(run, "PEERS", chosen)
    patch.setattr(alone, "PEERS", chosen)
    return run.Options(rounds=3, workloads=("tiny",), peers=tuple(chosen), measures=run.IN_PROCESS)


@pytest.fixture
def small(monkeypatch):
    return made_small(monkeypatch)


@pytest.fixture(scope="module")
def written():
    """What a run finds, as JSON."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # a module's fixture is made before those of its tests
    with pytest.MonkeyPatch.context() as patch:
        (found,) = run.run(made_small(patch))
    torch.set_default_dtype(before)
    return json.dumps(found)


@pytest.fixture
def data(written):
    return json.loads(written)


def test_results_are_plain_data_with_everything_around_them(data):
    assert set(data) == {"date", "command", "machine", "versions", "scale", "rounds", "peers", "workloads"}
    assert data["versions"]["torch"] == torch.__version__
    results = data["workloads"]["tiny"]["results"]
    assert results["torchjd"] == {"absent": "not installed", "reason": "needs no_such_package"}
    assert results["by-hand"] == {"failed": "RuntimeError: no luck"}
    assert results["inputs"]["difference"] < 1e-9
    assert results["recipe"]["multiply-adds"] == multiply_adds(recipe.build(actor_critic(width=4, size=2), CPU))
    assert set(results["funcfreeze"]["time"]["over"]) == {"recipe", "inputs"}


@pytest.mark.parametrize(("chosen", "code"), [("inputs", 0), ("by-hand", 1)])
def test_a_check_fails_when_a_contender_does(small, capsys, monkeypatch, chosen, code):
    monkeypatch.setenv("JAX_ENABLE_X64", "0")  # put back afterwards
    with pytest.raises(SystemExit) as exited:
        main(["check", "--workloads", "tiny", "--peers", "recipe", chosen])
    assert exited.value.code == code
    assert f"tiny           {chosen}" in capsys.readouterr().out


@pytest.fixture
def choices(monkeypatch, small):
    """The command as if there were only the small workload and its peers."""
    command = importlib.import_module("bench.__main__")
    monkeypatch.setattr(command, "PEERS", dict.fromkeys(small.peers))
    return ["--rounds", "2", "--workloads", "tiny", "--peers", *small.peers, "--measures", *small.measures]


def test_what_is_measured_is_printed_as_tables_and_kept_as_json_where_that_is_wanted(choices, capsys, tmp_path):
    main(choices)
    printed = capsys.readouterr().out
    assert printed.startswith("# Measured\n")
    for title in ("| Step time, ms |", "| Multiply-adds of a step, millions |", "| Matrix products of a step |"):
        assert title in printed
    assert "| actor-critic |" in printed
    assert "![" not in printed
    assert "{" not in printed
    file = tmp_path / "new" / "found.json"
    main([*choices, "--out", str(file)])
    data = json.loads(file.read_text())
    assert capsys.readouterr().out == table.document(data)
    assert set(data["workloads"]) == {"tiny"}


def test_bars_are_printed_as_lines_and_kept_as_json_where_that_is_wanted(monkeypatch, capsys, tmp_path):
    measures = {
        "whole step": {"ms": {"recipe": 12.345, "routed": 1234.5}, "recipe / routed": 0.01},
        "memory": {"bytes": {"summed": 123_456_789, "routed": 2_500_000}, "routed / summed": 0.0203},
        "overhead": {"microseconds, sgd": 123.4},
    }
    monkeypatch.setattr(importlib.import_module("bench.__main__"), "measure", lambda rounds: measures)
    main(["bars", "--rounds", "7"])
    head, *lines = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in head
    assert "7 rounds" in head
    assert [line for line in lines if line] == [
        "whole step",
        "  ms               recipe 12.3   routed 1,234",
        "  recipe / routed  0.01",
        "memory",
        "  MB               summed 123   routed 2.5",
        "  routed / summed  0.0203",
        "overhead",
        "  microseconds, sgd  123",
    ]
    file = tmp_path / "bars.json"
    main(["bars", "--rounds", "7", "--out", str(file)])
    data = json.loads(file.read_text())
    assert data["measures"] == measures
    assert capsys.readouterr().out == bars.listing(data)


def test_the_help_says_what_is_printed(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "What is measured is printed as tables; `--out FILE.json` keeps it as JSON besides." in text
    assert "tables are printed either way" in text


def test_the_command_repeats_the_run():
    assert run.Options().command == "python -m bench --device cpu --scale small --rounds 30"
    assert run.Options(rounds=3, workloads=("gan",), peers=("recipe", "jax")).command == (
        "python -m bench --device cpu --scale small --rounds 3 --workloads gan --peers recipe jax"
    )


def test_tables_name_what_is_absent_and_where_we_lose(data):
    results = data["workloads"]["tiny"]["results"]
    results["recipe"]["time"]["ms"], results["funcfreeze"]["time"]["ms"] = [1, 2.0, 3], [1, 4.0, 9]
    results["inputs"]["time"]["ms"] = [1, 5.0, 9]
    results["funcfreeze"]["time"]["over"]["recipe"] = 2.0
    assert "| actor-critic | **2** | 5 | not installed | failed | 4 |" in table.table(data, "time")
    assert "2.00 **we lose** (funcfreeze / recipe)" in table.standings(data)
    results["recipe"]["time"]["ms"], results["funcfreeze"]["time"]["over"]["recipe"] = [1, 8.0, 9], 0.5
    results["funcfreeze"]["time"]["over"]["inputs"] = 0.8
    assert "0.80 ahead (funcfreeze / backward(inputs=))" in table.standings(data)
    results["funcfreeze"]["time"]["over"]["inputs"] = 1.004
    assert "1.00 even (" in table.standings(data)
    assert "stands where the recipe does" in table.differences(data)
    results["inputs"]["difference"] = 0.5
    assert "backward(inputs=) is 0.5 away from the recipe in actor-critic" in table.differences(data)
    assert "- TorchJD, not installed: needs no_such_package." in table.reasons(data)
    assert "- by hand, failed: RuntimeError: no luck." in table.reasons(data)
    assert "not measured" in table.table(data, "memory")


def test_runs_that_were_taken_again_are_named(data):
    assert "again" not in table.setting(data)
    assert table.setting({**data, "again": ["one", "two"]}).endswith(
        "when the machine was quieter, by `one` and `two`."
    )


def test_a_report_is_made_from_the_json_alone(data, tmp_path):
    pytest.importorskip("matplotlib")
    file, readme = tmp_path / "found.json", tmp_path / "README.md"
    file.write_text(json.dumps(data))
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    main(["report", str(file), "--readme", str(readme)])
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    assert "# Measured" in (tmp_path / "found.md").read_text()
    text = readme.read_text()
    assert text.startswith("before\n<!-- bench -->\n")
    assert text.endswith("<!-- /bench -->\nafter\n")
    assert "old" not in text
    assert data["command"] in text
    with pytest.raises(ValueError, match="0 sections"):
        table.put_into(file, "")


def test_the_readme_says_what_its_json_says():
    text = re.search(f"{table.BEGIN}.*?{table.END}", (ROOT / "README.md").read_text(), flags=re.DOTALL)[0]
    named = re.search(r"\[[^]]*\.json\]\(([^)]*)\)", text)
    if named is None:
        pytest.skip("nothing was measured yet")
    file = ROOT / named[1]
    assert text == readme_section(json.loads(file.read_text()), file)


def test_a_peer_alone_measures_its_first_step_and_memory(small):
    found = alone.measure("tiny", "recipe", "cpu", "small", alone.MEASURES)
    assert found["first-step"]["seconds"] > 0
    assert found["memory"]["bytes"] > 0
    assert alone.measure("tiny", "torchjd", "cpu", "small", ["memory"]) == {
        "memory": {"absent": "not installed", "reason": "needs no_such_package"}
    }


def test_a_fresh_process_that_fails_says_how():
    found = alone.in_fresh_process("no-such-workload", "recipe", "cpu", "small", ["memory"])
    assert found == {"memory": {"failed": "KeyError: 'no-such-workload'"}}


def test_products_are_counted_once():
    workload = vit(2, width=8, depth=1, heads=2, size=2, image=8)
    summed = by_hand.summed(workload, CPU)
    found = products(summed)
    assert found["multiply_adds"] == multiply_adds(summed)
    # embed, qkv, out, up, down, 2 heads thrice each but for the images' gradient; two products a head's attention
    assert found["matmuls"] == 3 * 7 - 1 + 3 * 2
    assert found["convolutions"] == 0
    weight = torch.randn(3, 4, requires_grad=True)
    jacobian = torch.func.vmap(lambda v: torch.autograd.grad(torch.ones(2, 3) @ weight, weight, v, retain_graph=True))
    assert products(lambda: jacobian(torch.randn(5, 2, 4)))["matmuls"] == 2
    convolve = torch.nn.Conv2d(2, 3, 3)
    assert products(lambda: convolve(torch.randn(1, 2, 5, 5)).sum().backward())["convolutions"] == 2


def test_products_of_an_xla_program():
    program = """
      %dot.3 = f32[4,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}
      %gemm = (f32[4,4]{1,0}, s8[]) custom-call(%a), custom_call_target="__cublas$gemm"
      %conv = f32[1,2]{1,0} convolution(%a, %b), window={size=3}
      %copy = f32[4,2]{1,0} copy(%dot.3)
    """
    assert optax.count_products(program) == {"matmuls": 2, "convolutions": 1}


def test_rounds_take_everybody_in_turn():
    seen: list[str] = []
    times = interleaved({name: partial(seen.append, name) for name in "ab"}, rounds=2, warmup=1)
    assert "".join(seen) == "abbaab"
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}
    assert quartiles([3.0, 1.0, 2.0]) == [1.5, 2.0, 2.5]
    assert quartiles([3.0]) == [3.0, 3.0, 3.0]
    assert 1 <= steps_per_run(lambda: None) <= 50


def test_several_steps_wait_once():
    seen: list[str] = []
    Contender(partial(seen.append, "step"), partial(seen.append, "wait"), dict).take(3)
    assert seen == ["step", "step", "step", "wait"]


def test_files_stay_small():
    for path in (ROOT / "bench").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 260, path


def test_every_peer_has_a_mark_of_its_own():
    from bench.plot import MARKS

    assert set(MARKS) == set(peers.PEERS)
    assert len(set(MARKS.values())) == len(MARKS)


def test_absent_is_plain_data():
    assert Absent("not here", "why").to_dict() == {"absent": "not here", "reason": "why"}


def test_the_bars_run():
    adversarial = workloads.adversarial(width=8, size=4)
    assert set(bars.whole_step(adversarial, 2)["ms"]) == {"recipe", "summed", "routed", "reversal"}
    assert bars.gradients_only(workloads.many_heads(2, size=4, width=8), 2)["routed / summed"] > 0
    assert 0 < bars.outside_the_engine(workloads.transformer(2, width=8), 2)["part outside"] < 1
    assert set(bars.memory(adversarial)["bytes"]) == {"summed", "recipe", "routed"}
    measured = overhead.overhead(4, ff.optim.adam(1e-3), rounds=2)
    assert min(measured["step"], measured["guards alone"]) > 0


def test_what_long_runs_cost_is_measured(monkeypatch, capsys):
    found = {
        "fit": long_runs.fit_beside_the_bare_loop(2, steps=3),
        "saving": long_runs.background_save(2, layers=2, width=4),
    }
    assert found["fit"]["microseconds a step"].keys() == {
        "bare loop",
        "fit",
        "fit with a logger",
        "fit that shows",
    }
    assert found["saving"]["megabytes"] == 2 * 4 * 4 * torch.empty(0).itemsize / 1e6
    assert min(found["saving"]["seconds"].values()) > 0
    monkeypatch.setattr(importlib.import_module("bench.__main__"), "long_runs", lambda rounds: found)
    main(["runs"])
    assert "microseconds added by fit with a logger" in capsys.readouterr().out


def test_startups_are_of_fresh_processes_in_turn(monkeypatch, capsys, tmp_path):
    seconds = {"by-hand-compiled": iter([4.0, 1.0, 6.0, 1.0]), "funcfreeze-compiled": iter([5.0, 0.5, 7.0, 0.5])}
    asked = []

    def with_caches(folder, workload, peer, device, scale, measures):
        asked.append((folder, peer))
        return {"first-step": {"cpu seconds": next(seconds[peer])}}

    monkeypatch.setattr(startup, "with_caches", with_caches)
    main(["startup", "--workloads", "gan", "--rounds", "2", "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    cold = {"by-hand-compiled": 5.0, "funcfreeze-compiled": 6.0, "ratio": 1.2}
    warm = {"by-hand-compiled": 1.0, "funcfreeze-compiled": 0.5, "ratio": 0.5}
    assert found["measures"]["gan"] == {"cold, cpu seconds": cold, "warm, cpu seconds": warm}
    assert [peer for _, peer in asked[::2]] == [*startup.PAIR[::-1], *startup.PAIR]
    assert len({folder for folder, _ in asked}) == 4, "a warm process finds the caches of a cold one, and no other's"
    assert "ratio 1.2" in capsys.readouterr().out


def test_a_first_step_that_fails_has_no_ratio():
    runs = {peer: {"cold": [{"failed": "no"}], "warm": [{"cpu seconds": 1.0}]} for peer in startup.PAIR}
    assert set(startup.summary(runs)) == {"warm, cpu seconds"}


def test_a_first_step_says_how_it_was_compiled():
    torch._dynamo.utils.counters.clear()  # other tests of this process compile, too
    found = alone.measure("actor-critic", "funcfreeze", "cpu", "small", ["first-step"])["first-step"]
    assert found["cpu seconds"] > 0
    assert (found["graphs made"], found["graphs from a cache"]) == (0, 0)
