"""The package as it is installed and imported: what an import costs, where it is found, and its version."""

from __future__ import annotations

import ast
import importlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

import mdkern
from mdkern import threads

ROOT = Path(__file__).parent.parent
HEAVY_IMPORTS = {"torch", "transformers", "triton", "numpy", "safetensors", "tqdm", "huggingface_hub"}


def python(code: str, folder: Path, *arguments: str, **environment: str) -> str:
    """What a new Python prints, run in a folder."""
    kept = {name: value for name, value in os.environ.items() if name not in threads.CHOSEN_BY_THE_USER}
    found = subprocess.run(
        [sys.executable, *arguments, "-c", code], cwd=folder, env=kept | environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import mdkern",
        "import mdkern.cli.main as cli; cli.build_parser().format_help()",
        "import mdkern.schedule, mdkern.threads, training",
    ],
)
def test_imports_that_must_be_cheap_load_no_heavy_package(code: str) -> None:
    loaded = set(json.loads(python(f"{code}\nimport json, sys\nprint(json.dumps(list(sys.modules)))", ROOT)))
    assert "mdkern" in loaded
    assert not loaded & HEAVY_IMPORTS


def test_every_public_name_is_that_of_the_module_that_defines_it() -> None:
    """The imports that mypy reads, the table that Python reads and ``__all__`` say the same."""
    tree = ast.parse(Path(mdkern.__file__).read_text())
    (typed,) = [node for node in tree.body if isinstance(node, ast.If)]
    declared = {alias.name: node.module for node in typed.body for alias in node.names}
    assert sorted(declared) == mdkern.__all__
    assert declared == {name: home for home, names in mdkern._HOMES.items() for name in names}
    for name, home in declared.items():
        value = getattr(mdkern, name)
        assert value is getattr(importlib.import_module(home), name)
    assert set(mdkern.__all__) <= set(dir(mdkern))


def test_modules_are_attributes_and_unknown_names_are_not() -> None:
    code = "import mdkern; print(mdkern.schedule.Schedule.__name__, hasattr(mdkern, 'sampel'))"
    assert python(code, ROOT).split() == ["Schedule", "False"]
    assert not hasattr(mdkern, "__main__")  # importing it would run the command line


def test_the_version_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "mdkern.__version__"}


@pytest.mark.skipif(find_spec("setuptools") is None, reason="needs setuptools")
def test_an_editable_clone_is_found_from_the_folder_above_it(tmp_path: Path) -> None:
    """There Python sees a folder ``mdkern``, the clone, which is no package."""
    clone, installed = tmp_path / "mdkern", tmp_path / "site"
    (clone / "mdkern").mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", "mdkern/__init__.py", "mdkern/threads.py"):
        shutil.copy(ROOT / name, clone / name)
    build = "import sys; from setuptools import build_meta; print(build_meta.build_editable(sys.argv[1]))"
    wheel = python(f"import sys; sys.argv = ['', {str(tmp_path)!r}]; {build}", clone).split()[-1]
    shutil.unpack_archive(tmp_path / wheel, installed, "zip")
    alone = f"import sys, site; sys.path = [path for path in sys.path if path != {str(ROOT)!r}]"  # not this clone
    use = f"{alone}; site.addsitedir({str(installed)!r}); import mdkern, importlib.metadata as m"
    built = f"next(iter(m.distributions(name='mdkern', path=[{str(installed)!r}]))).version"
    found, module, distribution = python(
        f"{use}; print(mdkern.__file__, mdkern.__version__, {built})", tmp_path
    ).split()
    assert Path(found) == clone / "mdkern" / "__init__.py"
    assert module == distribution == mdkern.__version__


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"), ({"GOMP_SPINCOUNT": "9"}, "None")],
)
def test_threads_sleep_while_they_wait_unless_the_user_has_chosen(environment: dict[str, str], expected: str) -> None:
    """In each way to start a program of ours, before PyTorch is loaded."""
    watch = """
import os, sys
class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))
            os._exit(0)
sys.meta_path.insert(0, Watch())
"""
    command = "import mdkern.cli.main as cli; cli.main(['sample', '--seed', '0'])"
    training = "import training.train"
    benchmark = "import benchmarks.bench_distributed"
    for code in (command, training, benchmark):
        assert python(watch + code, ROOT, **environment).split() == [expected]


def test_a_program_that_imports_mdkern_decides_for_itself() -> None:
    code = "import os, mdkern; mdkern.Schedule; print(os.environ.get('OMP_WAIT_POLICY'))"
    assert python(code, ROOT).strip() == "None"
