"""The package as a whole: its public surface, its floor plan, what it imports."""

from __future__ import annotations

import ast
import json
import pathlib
import subprocess
import sys

import funcfreeze as ff

PACKAGE = pathlib.Path(ff.__file__).parent

FLOORS = [
    ["tracing", "seeding"],
    ["schedules", "merge"],
    ["declare"],
    ["model"],
    ["gradients"],
    ["optim"],
    ["loops", "computation"],
    ["compile"],
    ["step"],
    ["alternating"],
    ["proof", "checkpoint"],
    ["fitting"],
    ["demos"],
    ["cli"],
]
"""From the ground up: a room imports from its own floor's folder or from floors below, never from above."""


ROOMS = {name for names in FLOORS for name in names}


def modules_of(package: str, path: pathlib.Path) -> set[str]:
    """The modules of a package that a file imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] == package}


def imports(path: pathlib.Path) -> set[str]:
    """The rooms of the package that a file imports from."""
    parts = [name.split(".") for name in modules_of("funcfreeze", path)]
    return {names[1] for names in parts if len(names) > 1 and (names[1] in ROOMS or names[1] == "__version__")}


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


BEHIND_EXTRAS = {"proof": {"sympy"}, "checkpoint": {"safetensors", "numpy"}}
"""What rooms import inside of functions: sympy comes with torch, numpy is there if somebody draws from it."""


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
                assert top in allowed | BEHIND_EXTRAS.get(room(path), set()), f"{path}: {name}"


def test_the_public_surface():
    public = {name for name in vars(ff) if not name.startswith("_")}
    modules = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()}
    assert public - modules | {"checkpoint", "merge", "optim", "schedules", "backward", "verify"} == {
        "Alternation",
        "Fitted",
        "Half",
        "LossScale",
        "Microbatches",
        "Plan",
        "Route",
        "RouteError",
        "State",
        "Step",
        "alternate",
        "apply_updates",
        "backward",
        "checkpoint",
        "combine",
        "ema",
        "fit",
        "grad",
        "grad_and_value",
        "kind",
        "merge",
        "optim",
        "path",
        "plan",
        "regex",
        "schedules",
        "verify",
        "verify_equations",
        "where",
    }
    assert callable(ff.backward)
    assert callable(ff.verify)


FRESH = """
import json, sys
import funcfreeze as ff, funcfreeze.proof.equations
import torch
net = torch.nn.Linear(2, 1)
ff.combine({'l': net(torch.ones(1, 2)).sum()}, {'l': '*'}, net).backward()
print(json.dumps([*sys.modules]))
"""


def test_neither_extras_nor_the_compiler_are_imported_by_what_does_without():
    """The package with its equations, and a loop of one's own with `ff.combine`, in a process of its own."""
    run = subprocess.run([sys.executable, "-c", FRESH], check=True, capture_output=True, text=True)
    imported = set(json.loads(run.stdout))
    assert "funcfreeze.proof.equations" in imported
    assert not imported & {"typer", "rich", "sklearn", "matplotlib", "sympy", "torch._dynamo"}


def test_no_file_is_a_god():
    for path in [*PACKAGE.rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path


def test_the_bench_imports_in_no_circle():
    root = PACKAGE.parent / "bench"
    files = {".".join(path.relative_to(root.parent).with_suffix("").parts): path for path in root.rglob("*.py")}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    needs = {name: {other for other in modules_of("bench", path) if other in files} for name, path in files.items()}
    while needs:
        free = {name for name, others in needs.items() if not others & needs.keys() - {name}}
        assert free, f"these import each other: {sorted(needs)}"
        needs = {name: others for name, others in needs.items() if name not in free}
