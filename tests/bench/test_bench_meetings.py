"""The bench where losses meet: everybody who knows a rule makes the same update, and a plain run leaves these out."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from bench import run, table, workloads
from bench.__main__ import main, parser
from bench.contender import Absent
from bench.peers import DEFAULTS, PEERS
from bench.peers.rules_by_hand import COMBINED
from bench.workloads.meetings import MERGES, classification, merged, regression
from bench.workloads.merge import RADIUS, RULES, Merge
from bench.workloads.vit import vit

CPU = torch.device("cpu")
RIVALS = ("torchjd", "torchjd-in-turn", "torchjd-gramian", "by-hand")
TINY = {
    "mlp": partial(regression, width=8, size=6, tasks=3),
    "vit-2": partial(vit, 2, width=8, depth=1, heads=2, size=3, image=8),
    "vit-4": partial(vit, 4, width=8, depth=1, heads=2, size=3, image=8),
    "resnet": partial(classification, image=32, size=4, tasks=2),
}
MODELS = [pytest.param(name, marks=pytest.mark.slow) if name == "resnet" else name for name in TINY]


def made(model, merge=None):
    """The same numbers every time: a solver that stops early is near by other amounts for others."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TINY[model]() if merge is None else merged(TINY[model], merge)


def built(workload, *names):
    """Who took two steps, and what was found about everybody."""
    results = {name: {} for name in names}
    return run._build(workload, run.Options(peers=names), CPU, results), results


def moved(workload, peer) -> dict[str, torch.Tensor]:
    return run._two_steps(PEERS[peer], workload, CPU)[1]


@pytest.mark.parametrize("merge", MERGES, ids=lambda merge: merge.name)
@pytest.mark.parametrize("model", MODELS)
def test_everybody_makes_the_same_update_under_a_rule(model, merge):
    workload = made(model, merge)
    there, results = built(workload, *RIVALS, "funcfreeze")
    assert "funcfreeze" in there
    assert ("by-hand" in there) == (merge.rule != "upgrad")
    for peer, result in results.items():
        assert "failed" not in result, (peer, result)
        assert result.get("absent") in (None, "not installed", "cannot express", "not written"), peer
        assert result.get("difference", 0.0) <= run.tolerance(workload), peer
    if merge.rule not in ("graddrop", "upgrad"):
        assert "difference" in results["funcfreeze"]


def test_what_draws_is_built_and_not_compared():
    _, results = built(made("mlp", Merge("graddrop")), "torchjd", "torchjd-gramian", "by-hand", "funcfreeze")
    told = {peer: (result.get("absent"), result.get("not compared")) for peer, result in results.items()}
    draws = (None, "draws random numbers of its own")
    engine = ("cannot express", None)
    assert told == {"torchjd": draws, "torchjd-gramian": engine, "by-hand": draws, "funcfreeze": draws}
    for model, compared in {"mlp": False, "vit-2": True}.items():  # of two losses there is one order
        _, results = built(made(model, Merge("pcgrad")), "by-hand", "torchjd", "funcfreeze")
        assert ("difference" in results["torchjd"]) == compared
        assert results["funcfreeze"]["difference"] < 1e-9


@pytest.mark.parametrize("model", ["mlp", "vit-4"])
def test_a_rule_is_another_update_than_the_sum(model):
    plain = moved(made(model, Merge("sum")), "by-hand")
    assert run.difference(moved(made(model), "funcfreeze"), plain) < 1e-9
    assert run.difference(moved(made(model, Merge("imtl-g")), "funcfreeze"), plain) > 1e-3


@pytest.mark.parametrize("peer", [*RIVALS, "funcfreeze"])
def test_heads_have_their_own_plain_gradients(peer):
    plain, ruled = PEERS["summed"].build(made("mlp"), CPU), PEERS[peer].build(made("mlp", Merge("imtl-g")), CPU)
    assert not isinstance(ruled, Absent), ruled
    plain.take(1)
    ruled.take(1)
    found = dict(ruled.parameters())
    for path, wanted in plain.parameters().items():
        assert torch.allclose(found[path], wanted, rtol=0.0, atol=1e-9) == path.startswith("heads."), path


@pytest.mark.parametrize("peer", ["recipe", "inputs", "by-hand-compiled", "jax"])
def test_who_knows_no_rules_says_so(peer):
    assert PEERS[peer].build(made("mlp", Merge("pcgrad")), CPU).kind in ("not written", "not installed")


def test_who_is_there_for_rules_alone_says_so():
    assert PEERS["torchjd-gramian"].build(made("mlp"), CPU).kind == "not written"


def test_a_plain_run_leaves_them_out():
    assert not set(workloads.MEETINGS) & set(workloads.WORKLOADS)
    plain = parser().parse_args([])
    assert plain.workloads == [*workloads.WORKLOADS]
    assert tuple(plain.peers) == run.Options().peers == DEFAULTS
    assert set(PEERS) - set(DEFAULTS) == {"torchjd-in-turn", "torchjd-gramian"}
    named = ["--workloads", "meet-vit-8-mgda-activations", "gan", "--peers", "torchjd-gramian"]
    assert parser().parse_args(named).workloads == named[1:3]


def test_there_is_one_for_every_model_and_rule():
    models = ("mlp", "vit-2", "vit-4", "vit-8", "resnet")
    assert {*workloads.MEETINGS} == {
        f"meet-{model}-{rule}" for model in models for rule in (*RULES, "mgda-activations")
    }
    found = workloads.make("meet-mlp-mgda-activations")
    assert (found.name, found.merge.rule, found.merge.at) == ("MLP, 4 losses, mgda-activations", "mgda", "activations")
    assert workloads.make("meet-mlp-pcgrad").merge.tolerance == run.tolerance(made("mlp"))


def test_they_are_checked_and_measured_by_the_command(monkeypatch, capsys):
    monkeypatch.setattr(workloads, "MEETINGS", {"meet": (partial(merged, TINY["mlp"], Merge("pcgrad")),) * 2})
    monkeypatch.setenv("JAX_ENABLE_X64", "0")  # put back afterwards
    with pytest.raises(SystemExit) as exited:
        main(["check", "--workloads", "meet", "--peers", "by-hand", "funcfreeze", "torchjd"])
    assert exited.value.code == 0
    assert "draws random numbers" in capsys.readouterr().out
    options = run.Options(rounds=2, workloads=("meet",), peers=("summed", "by-hand", "funcfreeze"))
    *_, found = run.run(run.Options(**{**vars(options), "measures": run.IN_PROCESS}))
    text = table.document(found)
    assert "stands where the loop by hand does" in text
    for title in ("Step time", "Multiply-adds", "Matrix products"):
        assert title in text
    found["workloads"]["meet"]["results"]["by-hand"]["not compared"] = "draws"
    assert "the summed loss, and but those that draw random numbers, stands" in table.document(found)


@pytest.fixture
def matrix(seed):
    return torch.randn(3, 200, generator=torch.Generator().manual_seed(seed))


def test_the_rules_by_hand_are_what_their_papers_say(matrix):
    mean = matrix.mean(0)
    merged_by = {rule: combine(matrix) for rule, combine in COMBINED.items()}
    torch.testing.assert_close(merged_by["sum"], 3 * merged_by["mean"])
    steep = matrix @ merged_by["imtl-g"] / matrix.norm(dim=1)
    torch.testing.assert_close(steep, steep[:1].expand(3))
    shortest = merged_by["mgda"]
    assert (matrix @ shortest).min() > (1 - 1e-2) * shortest.square().sum()
    torch.testing.assert_close((merged_by["cagrad"] - mean).norm(), RADIUS * mean.norm(), rtol=1e-3, atol=0.0)
    assert (matrix @ merged_by["cagrad"]).min() > (matrix @ mean).min() - 1e-6
    kept = merged_by["graddrop"] / torch.where(matrix > 0, matrix, 0.0).sum(0)
    lost = merged_by["graddrop"] / torch.where(matrix < 0, matrix, 0.0).sum(0)
    assert (torch.isclose(kept, torch.ones(())) | torch.isclose(lost, torch.ones(()))).all()


def test_aligned_gradients_and_projected_ones():
    matrix = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    torch.testing.assert_close(COMBINED["aligned-mtl"](matrix), torch.tensor([0.5, 0.5]))
    crossed = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    torch.testing.assert_close(COMBINED["pcgrad"](crossed), torch.tensor([0.5, 1.5]))
