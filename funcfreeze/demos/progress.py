"""How far a long computation is: a live bar in a terminal, a few plain lines anywhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

Show = Callable[[float, str], None]
"""`show(share, text)`: what share of the work is done, and what is going on."""

LINES = 10
"""How many lines there are without a terminal."""


@contextmanager
def progress(console: Console, title: str) -> Iterator[Show]:
    """Show progress while the block runs: it gets `show(share, text)`, to be called as often as is convenient."""
    if console.is_interactive:
        with _bar(console, title) as show:
            yield show
    else:
        yield _plain(console, title)


@contextmanager
def _bar(console: Console, title: str) -> Iterator[Show]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=1.0, text="")
        yield lambda share, text: bar.update(task, completed=share, text=text)


def _plain(console: Console, title: str) -> Show:
    shown = 0

    def show(share: float, text: str) -> None:
        nonlocal shown
        if (reached := int(share * LINES)) > shown:
            shown = reached
            console.print(f"{title} {share:4.0%}  {text}".rstrip(), markup=False, highlight=False, soft_wrap=True)

    return show
