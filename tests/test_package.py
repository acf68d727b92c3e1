"""The package as a whole: its public surface, its floor plan, what it imports."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import funcfreeze as ff

PACKAGE = pathlib.Path(ff.__file__).parent

FLOORS = [
    {"selectors", "schedules", "pytree", "report"},
    {"routes"},
    {"plan_table"},
    {"plan"},
    {"functional", "optim", "symbolic"},
    {"gradients"},
    {"state", "differentiate", "backward", "loss_scale"},
    {"specification", "equations"},
    {"computation"},
    {"compile"},
    {"step"},
    {"recipe"},
    {"verify"},
    {"demos"},
    {"cli"},
]
"""From the ground up: a room imports from its own floor's folder or from floors below, never from above."""


def imports(path: pathlib.Path) -> set[str]:
    """The rooms of the package that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "funcfreeze"
                else [node.module]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] if "." in name else "" for name in names if name.split(".")[0] == "funcfreeze"}
    return found


def room(path: pathlib.Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def test_imports_point_only_downward():
    level = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    for path in sorted(PACKAGE.rglob("*.py")):
        here = room(path)
        if here == "__init__":
            continue
        assert here in level, f"{here} is on no floor"
        for other in imports(path) - {"", here}:
            if here in ("demos", "cli") and other == "__version__":
                continue
            assert level[other] < level[here], f"{path.name} of {here} imports {other}, which is not below it"


def test_the_core_depends_on_torch_and_optree_alone():
    allowed = {"torch", "optree", "funcfreeze", *sys.stdlib_module_names}
    for path in sorted(PACKAGE.rglob("*.py")):
        if room(path) in ("demos", "cli"):
            continue
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in names:
                top = name.split(".")[0]
                assert top in allowed or (top == "sympy" and room(path) in ("symbolic", "equations")), f"{path}: {name}"


def test_the_public_surface():
    public = {name for name in vars(ff) if not name.startswith("_")}
    modules = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()}
    assert public - modules | {"optim", "backward", "verify"} == {
        "LossScale",
        "Plan",
        "Route",
        "RouteError",
        "State",
        "Step",
        "apply_updates",
        "backward",
        "grad",
        "grad_and_value",
        "kind",
        "optim",
        "path",
        "regex",
        "verify",
        "verify_equations",
        "where",
    }
    assert callable(ff.backward)
    assert callable(ff.verify)


def test_importing_takes_no_extra():
    code = (
        "import sys, funcfreeze; bad = {'typer', 'rich', 'sklearn', 'matplotlib', 'sympy'} & set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_file_is_a_god():
    for path in [*PACKAGE.rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path
