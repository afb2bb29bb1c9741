"""What is built for others holds all that they need: the wheel samples, the sdist is the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.own_process import ROOT

SAMPLE = """
import mdkern
heavy, light, _ = mdkern.load_pair()
out = mdkern.sample(heavy, light, "L1 H1", length=8, num_samples=1, seed=0)
print(mdkern.__file__, *out.sequences.shape)
"""


ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("setuptools") is None, reason="needs setuptools"),
]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What a Python prints, errors included."""
    environment = ENVIRONMENT | environment
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def files_of(folder: Path, *parts: str) -> set[Path]:
    """Relative to `folder`, what a clone has there, or in one of its folders."""
    left_out = {"__pycache__", "build", "dist"}
    found = (path.relative_to(folder) for path in folder.joinpath(*parts).rglob("*") if path.is_file())
    return {path for path in found if not any(part in left_out or part.startswith(".") for part in path.parts)}


def build(kind: str, folder: Path) -> Path:
    """A wheel or an sdist made by this environment's setuptools, without a network, of a copy of the repository."""
    source = folder / "source"
    left_out = shutil.ignore_patterns(".git", ".venv*", ".*_cache", "__pycache__", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=left_out)
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    assert "warning" not in run("-W", "default", "-c", code, folder, cwd=source).lower()
    (archive,) = (path for path in folder.iterdir() if path.is_file())
    return archive


def test_an_unpacked_wheel_samples_from_the_shipped_pair(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.unpack_archive(build("wheel", tmp_path), bare, "zip")
    assert files_of(bare, "mdkern") == files_of(ROOT, "mdkern")
    printed = run("-c", SAMPLE, cwd=tmp_path, PYTHONPATH=str(bare))
    assert printed.split()[-3:] == [str(bare / "mdkern" / "__init__.py"), "1", "8"]


def test_the_unpacked_sdist_is_the_repository(tmp_path: Path) -> None:
    shutil.unpack_archive(build("sdist", tmp_path), tmp_path / "bare", "gztar")
    (sources,) = (tmp_path / "bare").iterdir()
    ours = files_of(tmp_path / "source")
    assert ours <= files_of(sources)
    assert {"benchmarks", "csrc", "docs", "mdkern", "tests", "training"} <= {path.parts[0] for path in ours}
    whole = "tests/test_imports.py::test_no_module_imports_itself_by_way_of_others"
    tests = ("tests/test_schedule.py", whole, "tests/engine/test_device_loop.py")
    assert " passed" in run("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=sources)
