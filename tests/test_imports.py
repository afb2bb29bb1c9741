"""Modules import each other in one direction, and Triton is imported only where there is a GPU to compile for."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.own_process import ROOT

PACKAGES = ("mdkern", "training", "benchmarks")
# By importing and imported module: imports inside a function that may close a circle, and why.
ALLOWED = {
    ("mdkern.models.dit", "mdkern.models.checkpoint"): "people look for `from_pretrained` on the class that it makes",
    ("mdkern.models.dit_fused", "mdkern.models.dit"): "it knows the modules that it may stand in for by their classes",
    ("mdkern.kernels.head.launch", "mdkern.kernels.head.launch_filter"): "filtered draws have kernels of their own",
    ("mdkern.schedule", "mdkern.evaluation.optimize"): "people look for fitted schedules beside the hand-made ones",
    ("mdkern.models.hf.split", "mdkern.models.hf.probe"): "a model that has changed since it was split is probed again",
}


def module_files() -> dict[str, Path]:
    """By dotted name, every module of the repository's packages."""
    files = {}
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def import_statements(tree: ast.AST, inside: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Imports that run, each with whether it runs in a function only; those for type checkers never run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, inside
        yield from import_statements(node, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@cache
def statements(source: str) -> list[tuple[ast.Import | ast.ImportFrom, bool]]:
    return list(import_statements(ast.parse(source)))


def imported(node: ast.Import | ast.ImportFrom, package: str) -> Iterator[str]:
    """Dotted names that a statement in a module of `package` may load; some are not modules but names in one."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
    home = ".".join([*above, *([node.module] if node.module else [])])
    yield from (f"{home}.{alias.name}" for alias in node.names)


def graph(sources: Mapping[str, str], packages: set[str], allowed: set[tuple[str, str]]) -> dict[str, set[str]]:
    """By module, those that it imports, less the `allowed` pairs where they are in a function."""
    edges: dict[str, set[str]] = {name: set() for name in sources}
    for name, source in sources.items():
        package = name if name in packages else name.rpartition(".")[0]
        for node, inside in statements(source):
            for target in imported(node, package):
                while target and target not in sources:
                    target = target.rpartition(".")[0]
                if target not in ("", name) and not (inside and (name, target) in allowed):
                    edges[name].add(target)
    return edges


def circle(edges: Mapping[str, set[str]]) -> list[str]:
    """Modules each of which the next one imports, the first one again at the end; empty if there is no circle."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        modules: list[str] = error.args[1]
        return modules
    return []


def own_graph(allowed: set[tuple[str, str]]) -> dict[str, set[str]]:
    files = module_files()
    packages = {name for name, path in files.items() if path.name == "__init__.py"}
    return graph({name: path.read_text() for name, path in files.items()}, packages, allowed)


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert circle(own_graph(set(ALLOWED))) == []


@pytest.mark.parametrize("pair", ALLOWED)
def test_each_exception_is_needed(pair: tuple[str, str]) -> None:
    assert circle(own_graph(set(ALLOWED) - {pair})) != []


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        ("import p.b", "from p import a", True),
        ("from .b import f", "from . import a", True),
        ("def f():\n  from p.b import g", "import p.a", True),
        ("if TYPE_CHECKING:\n  from p.b import g", "import p.a", False),
        ("import p.b", "import os", False),
    ],
)
def test_circles_are_found(first: str, second: str, found: bool) -> None:
    edges = graph({"p": "", "p.a": first, "p.b": second}, {"p"}, set())
    assert (circle(edges) != []) == found
    inside = graph({"p": "", "p.a": first, "p.b": second}, {"p"}, {("p.a", "p.b")})
    assert (circle(inside) != []) == (found and "def" not in first)


def modules_after(*steps: str) -> list[set[str]]:
    """Those that a new process has loaded after each step of some code."""
    told = "print(json.dumps([*sys.modules]))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-c", "\n".join(["import json, sys", *(f"{step}; {told}" for step in steps)])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [set(json.loads(line)) for line in done.stdout.splitlines()]


def test_neither_a_first_call_nor_a_public_name_imports_what_takes_seconds() -> None:
    """Not the compiler, which PyTorch imports of its own accord at the first call of an operator, nor all of
    transformers, whatever the model; and nothing imports Triton."""
    called, named = modules_after(
        "import mdkern; pair = mdkern.load_pair('cpu'); mdkern.sample(pair.heavy, length=8, num_samples=1, steps=2)",
        "[getattr(mdkern, name) for name in mdkern.__all__]",
    )
    assert "mdkern.engine.stepwise" in called
    assert not {"torch._dynamo", "sympy", "triton", "transformers.cache_utils"} & called
    assert "mdkern.models.float8_head" in named
    assert not [name for name in named if name.partition(".")[0] == "triton"]
