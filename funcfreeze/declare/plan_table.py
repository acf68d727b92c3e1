"""A plan as a text table: parameters against losses, collapsed to modules when there are many."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Protocol

from funcfreeze.declare.routes import Weight
from funcfreeze.declare.timed_routes import timed_routes
from funcfreeze.declare.timing import Timing

MOST_ROWS = 16
"""A plan with more parameters than this is shown by modules."""


class _Row(Protocol):
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def trainable(self) -> bool: ...
    @property
    def weights(self) -> Mapping[str, tuple[Weight, ...]]: ...
    @property
    def timings(self) -> Mapping[str, tuple[Timing, ...]]: ...
    @property
    def path(self) -> str: ...
    @property
    def elements(self) -> int: ...


@dataclass(frozen=True)
class Group:
    """Parameters that are treated alike: one line of the table."""

    title: str
    rows: Sequence[_Row]


def format_plan(losses: Sequence[str], rows: Sequence[_Row], members: Sequence[tuple[str, int]] = ()) -> str:
    """The table, a legend for weights that are not plain numbers, ties, and what each loss updates and when.

    Args:
        losses: the columns.
        rows: the lines, in which weights go by the names of the columns.
        members: titles for groups of neighbouring columns, with the number of columns in each. A column's own title is
            then what follows the first dot of its name.
    """
    lines = list(group_rows(rows)) if len(rows) > MOST_ROWS else [Group(_title(row), [row]) for row in rows]
    legend: dict[str, str] = {}
    titles = [loss.split(".", 1)[1] for loss in losses] if members else losses
    cells = [["parameter", "elements", *titles, ""]]
    for line in lines:
        first = line.rows[0]
        count = f"{sum(row.elements for row in line.rows):,}"
        shown = [_cell(first.weights.get(loss, ()), legend) for loss in losses]
        cells.append([line.title, count, *shown, _frozen(first)])
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    table = [_over(members, widths)] if members else []
    table += ["  ".join(_aligned(row, widths)).rstrip() for row in cells]
    table += [f"{short} = {_shortened(weight)}" for weight, short in legend.items()]
    table += [f"tied: {' = '.join(row.names)}" for line in lines if len(line.rows) > 1 for row in _tied(line.rows)]
    timed = (f"timed  {loss}: {route}" for loss, route in timed_routes(losses, rows))
    return "\n".join([*table, *_summary(losses, rows), *timed])


def _over(members: Sequence[tuple[str, int]], widths: list[int]) -> str:
    """The line above the columns' titles; the first column of a group is widened where the group's title is longer."""
    parts, at = [" " * (widths[0] + 2 + widths[1])], 2
    for title, number in members:
        span = sum(widths[at : at + number]) + 2 * (number - 1)
        widths[at] += max(0, len(title) - span)
        parts.append(title.rjust(span))
        at += number
    return "  ".join(parts)


def _aligned(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    yield row[0].ljust(widths[0])
    for text, width in zip(row[1:-1], widths[1:-1], strict=True):
        yield text.rjust(width)
    yield row[-1]


def _title(row: _Row) -> str:
    return " = ".join(row.names) or "(the parameter)"


def _tied(rows: Sequence[_Row]) -> list[_Row]:
    return [row for row in rows if len(row.names) > 1]


def _frozen(row: _Row) -> str:
    if not row.trainable:
        return "frozen: requires_grad is False"
    return "" if row.weights else "frozen: no route"


def _treatment(row: _Row) -> tuple[object, ...]:
    return row.trainable, sorted((loss, repr(terms), row.timings.get(loss, ())) for loss, terms in row.weights.items())


def group_rows(rows: Sequence[_Row], prefix: str = "") -> Iterator[Group]:
    """The largest modules, or runs of neighbouring ones, whose parameters are all treated alike."""
    children: dict[str, list[_Row]] = {}
    for row in rows:
        rest = row.path[len(prefix) + 1 :] if prefix else row.path
        children.setdefault(rest.split(".")[0], []).append(row)
    for names, alike in _runs(children):
        inside = [row for name in names for row in children[name]]
        path = f"{prefix}.{_braced(names)}" if prefix else _braced(names)
        if len(inside) == 1:
            yield Group(_title(inside[0]), inside)
        elif alike:
            yield Group(f"{path}.* ({len(inside)})", inside)
        else:
            yield from group_rows(inside, path)


def _runs(children: Mapping[str, Sequence[_Row]]) -> Iterator[tuple[list[str], bool]]:
    """Names of neighbouring children that are treated alike throughout (and whether they are), the others alone."""
    run: list[str] = []
    for name, rows in children.items():
        if run and _alike([*children[run[-1]], *rows]):
            run.append(name)
            continue
        if run:
            yield run, True
        run = [name] if _alike(rows) else []
        if not run:
            yield [name], False
    if run:
        yield run, True


def _alike(rows: Sequence[_Row]) -> bool:
    return all(_treatment(row) == _treatment(rows[0]) for row in rows)


def _braced(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    if all(name.isdigit() for name in names):
        return f"[{names[0]}-{names[-1]}]"
    return "{" + (",".join(names) if len(names) < 4 else f"{names[0]}..{names[-1]}") + "}"


def _cell(terms: Sequence[Weight], legend: dict[str, str]) -> str:
    return "+".join(_term(weight, legend) for weight in terms).replace("+-", "-") or "·"


def _term(weight: Weight, legend: dict[str, str]) -> str:
    """A number as it is; anything longer by a letter that the legend explains."""
    if isinstance(weight, Real):
        return f"{float(weight):g}"
    return legend.setdefault(repr(weight), f"w{len(legend) + 1}")


def _shortened(text: str) -> str:
    """What is longer than two lines (a table of numbers may be) by its beginning and its end."""
    return text if len(text) <= 240 else f"{text[:160]} ... {text[-60:]}"


def _summary(losses: Sequence[str], rows: Sequence[_Row]) -> Iterator[str]:
    every = sum(row.elements for row in rows)
    for loss in losses:
        reached = [row for row in rows if loss in row.weights]
        elements = sum(row.elements for row in reached)
        yield f"{loss} updates {len(reached)} of {len(rows)} parameters ({elements:,} of {every:,} elements)"
    frozen = [row for row in rows if not row.weights]
    if frozen:
        elements = sum(row.elements for row in frozen)
        yield f"frozen: {len(frozen)} of {len(rows)} parameters ({elements:,} of {every:,} elements)"
