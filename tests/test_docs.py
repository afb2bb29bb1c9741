"""The API reference: built from the docstrings without a warning, of public names only, whose references are right."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType

import pytest

import mdkern

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "docs" / "build.py"


@pytest.mark.slow
def test_the_reference_shows_the_public_names_and_no_others(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, BUILD, tmp_path], check=True, cwd=ROOT, env=environment)
    pages = {page.relative_to(tmp_path).with_suffix("") for page in tmp_path.rglob("*.html")}
    expected = {Path(*name.split(".")) for name in runpy.run_path(str(BUILD))["MODULES"]}
    assert pages - {Path("index")} == expected
    shown = set(re.findall(r'<section id="(\w+)">', (tmp_path / "mdkern.html").read_text()))
    assert shown == {name for name in mdkern.__all__ if not isinstance(getattr(mdkern, name), ModuleType)}


def test_a_public_name_without_a_docstring_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("bare")
    module.__dict__.update(
        __all__=["told", "untold"], told=test_every_name_in_a_docstring_is_there, untold=lambda: None
    )
    monkeypatch.setitem(sys.modules, "bare", module)
    assert runpy.run_path(str(BUILD))["prepare"]("bare") == ["bare.untold"]


def test_every_name_in_a_docstring_is_there() -> None:
    """Those that are written in full, as `mdkern.models.adapt`."""
    names = {
        name
        for path in (ROOT / "mdkern").rglob("*.py")
        for name in re.findall(r"`(mdkern(?:\.\w+)+)(?:\(\))?`", path.read_text())
    }
    assert len(names) > 20
    for name in sorted(names):
        resolve_name(name)
