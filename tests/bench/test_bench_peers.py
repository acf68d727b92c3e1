"""Every peer of the bench makes the update that funcfreeze makes, and one that cannot says why."""

from __future__ import annotations

import inspect
from functools import partial
from importlib.util import find_spec

import pytest
import torch

import funcfreeze as ff
from bench.contender import Absent, Contender, Peer, model_on, phases
from bench.peers import DEFAULTS, OURS, PEERS, by_hand, ours
from bench.workloads import make
from bench.workloads.actor_critic import actor_critic
from bench.workloads.adversarial import adversarial, confusion
from bench.workloads.gan import gan
from bench.workloads.gpt import gpt
from bench.workloads.resnet import ResNet18, resnet
from bench.workloads.vit import vit
from vision import torchvision

CPU = torch.device("cpu")
TINY = {
    "adversarial": partial(adversarial, width=24, size=6),
    "confusion": partial(confusion, width=24, size=6),
    "vit": partial(vit, 3, width=12, depth=1, heads=2, size=3, image=8),
    "gpt": partial(gpt, width=12, depth=2, heads=2, size=3, length=6, vocabulary=16, bottleneck=3),
    "gan": partial(gan, width=12, noise=4, pixels=9, size=6),
    "actor-critic": partial(actor_critic, width=12, size=6),
}
EAGER = [name for name in DEFAULTS if PEERS[name].routed and not PEERS[name].compiled and name not in OURS]


def displacements(contender: Contender, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Where two steps take every parameter that moves."""
    for _ in range(2):
        contender()
    before = dict(model.named_parameters())
    moved = {path: p.detach() - before[path].detach() for path, p in contender.parameters().items()}
    return {path: by for path, by in moved.items() if by.any()}


def routed(workload) -> Contender:
    step = ff.Step(model_on(workload, CPU), workload.losses, workload.routes, optimizer=ours.transform(workload))
    return ours.contender(step, workload, CPU)


def assert_same_update(contender, workload, tolerance=1e-9) -> None:
    assert isinstance(contender, Contender), contender
    wanted, got = (displacements(c, workload.model) for c in (routed(workload), contender))
    assert set(got) == set(wanted) == frozenset().union(*(phase.paths for phase in phases(workload)))
    for path in wanted:
        torch.testing.assert_close(got[path], wanted[path], rtol=tolerance, atol=1e-3 * tolerance, msg=path)


@pytest.mark.parametrize("peer", EAGER)
@pytest.mark.parametrize("name", TINY)
def test_a_peer_makes_the_same_update(peer, name):
    workload = TINY[name]()
    contender = PEERS[peer].build(workload, CPU)
    if isinstance(contender, Absent):
        assert peer == "torchjd"
        assert contender.kind == "not installed" or (contender.kind, name) == ("cannot express", "gpt")
        pytest.skip(contender.reason)
    assert_same_update(contender, workload)


@pytest.mark.slow
def test_a_convolutional_network_with_batch_statistics():
    workload = resnet(image=32, size=2)
    assert_same_update(PEERS["by-hand"].build(workload, CPU), workload, 1e-5)


def test_our_resnet_is_torchvisions():
    ours, theirs = ResNet18(), torchvision().models.resnet18()
    theirs.fc = torch.nn.Identity()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("name", ["actor-critic", pytest.param("gan", marks=pytest.mark.slow)])
def test_hand_written_code_survives_compilation(name):
    workload = TINY[name]()
    assert_same_update(by_hand.build(workload, CPU, compile={"backend": "aot_eager"}), workload)


@pytest.mark.parametrize(  # the others compile too long; each run checks them
    "name", ["actor-critic", pytest.param("gan", marks=pytest.mark.slow)]
)
@pytest.mark.skipif(find_spec("jax") is None or find_spec("optax") is None, reason="jax or optax is not installed")
def test_jax_makes_the_same_update(name):
    import jax

    workload = TINY[name]()
    with jax.enable_x64(True):
        assert_same_update(PEERS["jax"].build(workload, CPU), workload)


@pytest.mark.skipif("compile" not in inspect.signature(ff.Step).parameters, reason="Step does not compile yet")
def test_our_own_peer():
    workload = TINY["gan"]()
    assert_same_update(PEERS["funcfreeze"].build(workload, CPU), workload)
    assert_same_update(ours.build(workload, CPU, compile={"backend": "aot_eager"}), workload)


def test_a_peer_that_is_not_there_says_why():
    workload = TINY["gan"]()
    peer = Peer("nobody", lambda *_: pytest.fail("must not be built"), requires=("torch", "no_such_package"))
    assert peer.build(workload, CPU) == Absent("not installed", "needs no_such_package")
    assert PEERS["by-hand-graphs"].build(workload, CPU).kind == "not here"


def test_one_summed_loss_is_another_update():
    workload = TINY["adversarial"]()
    assert not PEERS["summed"].routed
    with pytest.raises(AssertionError):
        assert_same_update(PEERS["summed"].build(workload, CPU), workload)


def test_workloads_are_the_same_every_time():
    first, second = make("actor-critic"), make("actor-critic")
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
