"""The entry point of the command `funcfreeze`. It starts without the packages of the `demo` extra, to say so."""

from __future__ import annotations

import io
import sys

PACKAGES = {
    "typer": "typer",
    "rich": "rich",
    "safetensors": "safetensors",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "threadpoolctl": "threadpoolctl",
}
"""What the `demo` extra brings: module -> package."""


def main() -> None:
    """Run the command, or say in one line which package it lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a narrow encoding shows "?" for "±" and does not end the command
    try:
        from funcfreeze.demos.commands import app

        app()
    except ModuleNotFoundError as error:
        package = PACKAGES.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        sys.exit(f'funcfreeze: the command needs {package}, which is not installed: pip install "funcfreeze[demo]"')


if __name__ == "__main__":
    main()
