"""What a user's merge rules and transforms read from Python, where Dynamo does not look: compared before every step.

They run in our own part of the graph. What they compute with tensors is in it, and tensors that they did not make are
read anew; a number is part of the trace, so that another number is another trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from funcfreeze.compile.named import Reading, Walk, transforms_within
from funcfreeze.computation.back_door import raise_misuse
from funcfreeze.computation.computation import Computation


class Readings:
    """What a computation's own functions of the user's read.

    Args:
        computation: with merge rules and a transform.
    """

    def __init__(self, computation: Computation) -> None:
        rules = [overlap.rule.decide for overlap in computation.evaluation.plan.merge]
        self._functions = [*rules, *transforms_within(computation.transform)]
        self._known: list[list[Reading]] = []

    def number(self) -> int:
        """A number for what there is to read now."""
        if not self._functions:
            return 0
        present, _ = self._now()
        if present not in self._known:
            self._known.append(present)
        return 1 + self._known.index(present)

    @contextmanager
    def refusing_writes(self) -> Iterator[None]:
        """Refuse what they write to while they are traced, which no later step would do; it is taken back.

        Raises:
            RuntimeError: naming what.
        """
        before, undo = self._now()
        try:
            yield
        finally:
            after, _ = self._now()
            if after != before:
                for take_back in undo:
                    take_back()
        if after != before:
            known = {reading.where: reading.value for reading in before}
            where = [reading.where for reading in after if known.get(reading.where) != reading.value]
            raise_misuse([_write_problem(list(dict.fromkeys(where)))])

    def _now(self) -> tuple[list[Reading], list[Callable[[], None]]]:
        """All that can be seen of it now, and how to bring that back."""
        walk = Walk()
        for function in self._functions:
            walk.call(function)
        return walk.found, walk.undo


def _write_problem(where: Sequence[str]) -> str:
    return (
        f"{', '.join(where) or 'what it reads'} changed while a merge rule or a transform was traced: a compiled step "
        "would do that once and never again. What changes from step to step belongs in its state (`init`); what it "
        "sets up in its first call, in its constructor; or build the Step with compile=False"
    )
