"""What people write, eagerly and compiled in lockstep: the same numbers, the same objects, or a refusal that helps."""

from __future__ import annotations

import importlib
import os
import pkgutil
import zlib

import programs
import pytest
import torch
from lockstep import COMPILED, PROGRAMS, compare, matches, run, run_plain

for _module in pkgutil.iter_modules(programs.__path__):
    importlib.import_module(f"programs.{_module.name}")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Dynamo's, of what it cannot take


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()  # it keeps which numbers it once gave up to treat as variable, for the whole process


NUMBERS = ("metrics", "moved", "buffers", "seen")


PINNED = torch.__version__.startswith("2.13.")
"""What Dynamo refuses or gets wrong differs from release to release; the programs say what this one does."""


def expected(name):
    found = PROGRAMS[name]
    reason = found.bug or found.known or (found.old if torch.__version__ < "2.13" else None)
    return pytest.param(name, marks=pytest.mark.xfail(reason=reason, strict=PINNED) if reason else ())


ALL = "FUNCFREEZE_ALL_PROGRAMS" in os.environ
"""Three of four programs, each of a kind with others, run only with this set, as `.ci/versions` does: a minute less."""

CHOSEN = [name for name in PROGRAMS if ALL or name.startswith("found") or zlib.crc32(name.encode()) % 4 == 0]


@pytest.mark.parametrize("name", map(expected, CHOSEN))
def test_lockstep(name):
    try:
        in_lockstep(PROGRAMS[name])
    except Exception:
        if not PINNED and is_as_good_as_plain(PROGRAMS[name]):
            pytest.xfail(f"plain torch.compile of torch {torch.__version__} does this in another way")
        raise


def is_as_good_as_plain(found):
    """Whether the compiled step is right by now, or plain `torch.compile` refuses the program, or gets it wrong."""
    eager = run(found.make, False)
    return is_right(eager, run(found.make, COMPILED)) or not is_right(eager, run_plain(found.make), NUMBERS)


def is_right(eager, other, only=()):
    try:
        compare(eager, other, only)
    except AssertionError:
        return False
    return other.error is None


def in_lockstep(found):
    eager, compiled = run(found.make, False), run(found.make, COMPILED)
    if found.wrong is not None:
        for trace in (eager, compiled):
            assert trace.error is not None
            assert matches(found.wrong, trace.error), trace.error
        return
    if found.eager is not None:
        assert eager.error is not None
        assert matches(found.eager, eager.error), eager.error
        assert compiled.error is None
        assert all(record["own tensors kept"] for record in compiled.records) or "buffer" in found.make.__name__
        plain = run_plain(found.make)
        assert plain.error is None
        compare(plain, compiled, ("metrics", "moved"))
        return
    if eager.error is not None:
        raise eager.error
    compare(eager, compiled)
    if found.refused is not None:
        assert compiled.error is not None, "is not refused"
        assert matches(found.refused, compiled.error), compiled.error
        return
    if compiled.error is not None:
        raise compiled.error
    if found.traces is not None:
        assert compiled.traces <= found.traces


@pytest.mark.skipif(not PINNED, reason="another release")
@pytest.mark.parametrize("name", [name for name in CHOSEN if PROGRAMS[name].refused and not PROGRAMS[name].ours])
def test_plain_compile_refuses_too(name):
    assert run_plain(PROGRAMS[name].make).error is not None


@pytest.mark.skipif(not PINNED, reason="another release")
@pytest.mark.parametrize("name", [name for name, found in PROGRAMS.items() if found.known])
def test_plain_compile_is_wrong_too(name):
    eager, plain = run(PROGRAMS[name].make, False), run_plain(PROGRAMS[name].make)
    assert plain.error is None
    with pytest.raises(AssertionError):
        compare(eager, plain, NUMBERS)
