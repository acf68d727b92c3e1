"""The commands of `funcfreeze`. What a command needs beyond typer and rich is imported when it runs."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    name="funcfreeze",
    help="Train one model with several losses, where each loss may update only some of the parameters.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",  # the lines of a docstring are joined to paragraphs
    pretty_exceptions_enable=False,  # `main` turns a missing package into one line
)
demo = typer.Typer()
verify = typer.Typer(help="Prove the engines equal to the mathematics.", no_args_is_help=True)
app.add_typer(demo, name="demo")
app.add_typer(verify, name="verify")

Seeds = Annotated[int, typer.Option(min=1, help="Train and measure for this many seeds, 0, 1, ...")]
Out = Annotated[Path, typer.Option(help="The folder for curves.png, plan.json and results.json.")]
Steps = Annotated[int, typer.Option(min=1, help="Training steps of each run.")]
Seconds = Annotated[float, typer.Option(min=0.0, help="How long to measure the speed of a step.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"funcfreeze {version_of('funcfreeze')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Takes what stands before the command."""


@demo.callback(invoke_without_command=True)
def demo_adversarial(
    context: typer.Context,
    out: Out = Path("runs/demo"),
    seeds: Seeds = 5,
    steps: Steps = 800,
    speed_seconds: Seconds = 8.0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a training that was stopped.")] = False,
) -> None:
    """Digits classified by an encoder that hides a nuisance domain, with the speed of a step beside it.

    Prints which loss updates what, proves the step equal to the recipe, trains a baseline and the adversarial run on
    scikit-learn's digits, and times one step against the recipe and a gradient-reversal layer. Under a minute.
    """
    if context.invoked_subcommand is not None:
        _refuse_options(context)
        return
    from funcfreeze.demos.adversarial import Settings, Stopped
    from funcfreeze.demos.shows import show_adversarial
    from funcfreeze.demos.speed import Size

    show = partial(show_adversarial, seconds=speed_seconds, size=Size(), resume=resume)
    try:
        ok = show(Console(), out, range(seeds), Settings(steps=steps))
    except Stopped as stopped:
        typer.echo(f"funcfreeze: stopped by {stopped}; the same command with --resume goes on", err=True)
        raise typer.Exit(1) from None
    except ValueError as error:
        if not resume:
            raise
        typer.echo(f"funcfreeze: {error}\nResume with the --steps it was started with, or leave --resume out", err=True)
        raise typer.Exit(1) from error
    except OSError as error:
        where = error.filename or out
        typer.echo(f"funcfreeze: cannot write {where}: {error.strerror}; give another folder with --out DIR", err=True)
        raise typer.Exit(1) from error
    if not ok:
        typer.echo("funcfreeze: the step is not equal to the recipe (see the report above); nothing trained", err=True)
        raise typer.Exit(1)


@demo.command("finetune")
def demo_finetune(
    seeds: Seeds = 3,
    steps: Steps = 400,
) -> None:
    """A new head for new digits over a frozen body: only the head's weights are computed and moved."""
    from funcfreeze.demos.shows import show_finetune

    show_finetune(Console(), range(seeds), steps)


@app.command("checkpoint")
def look_at_checkpoints(
    folder: Annotated[Path, typer.Argument(help="A checkpoint, or the folder of a run's checkpoints.")],
    other: Annotated[Path | None, typer.Argument(help="Another checkpoint, to compare the first with.")] = None,
) -> None:
    """What is in checkpoints, whether they are whole, and how two of them differ by path.

    Exits with 1 if one is damaged.
    """
    from funcfreeze.demos.checkpoints import show_checkpoints, show_differences

    try:
        if other is not None:
            show_differences(Console(), folder, other)
        elif not show_checkpoints(Console(), folder):
            raise typer.Exit(1)
    except ValueError as error:
        typer.echo(f"funcfreeze: {error}", err=True)
        raise typer.Exit(1) from error


@verify.command("seeds")
def verify_seeds() -> None:
    """Check the cases one can work out with pencil and paper, differentiated symbolically, on every engine."""
    from funcfreeze.demos.seeds import seed_reports

    reports = seed_reports()
    for report in reports:
        typer.echo(f"{report}\n")
    if not all(report.ok for report in reports):
        typer.echo("funcfreeze: not every case came out as differentiated by hand (see above)", err=True)
        raise typer.Exit(1)


def _refuse_options(context: typer.Context) -> None:
    """Options of `demo` itself mean nothing to its subcommands: refuse them rather than ignore them."""
    given = [f"--{name.replace('_', '-')}" for name in context.params if _was_typed(context, name)]
    if given:
        raise typer.BadParameter(f"{', '.join(given)}: write options after {context.invoked_subcommand!r}")


def _was_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
