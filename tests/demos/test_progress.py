"""A bar in a terminal, plain lines anywhere else."""

import io

from rich.console import Console

from funcfreeze.demos.progress import LINES, progress


def shown(**options):
    out = io.StringIO()
    console = Console(file=out, width=80, **options)
    with progress(console, "training") as show:
        for done in range(101):
            show(done / 100, "seed 0 [bold]")
    return out.getvalue()


def test_without_a_terminal_there_are_a_few_plain_lines():
    text = shown()
    assert "\x1b" not in text
    assert "\r" not in text
    assert len(text.splitlines()) == LINES
    assert text.splitlines()[-1] == "training 100%  seed 0 [bold]"


def test_in_a_terminal_there_is_a_bar():
    text = shown(force_terminal=True, force_interactive=True)
    assert "\x1b" in text
    assert "100%" in text
