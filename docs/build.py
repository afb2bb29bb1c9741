"""Builds the API reference from the docstrings of the public modules: ``python docs/build.py [FOLDER]``.

Whatever pdoc warns of is an error, and so are public names without a docstring.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import pdoc

EVALUATION = ("assignment", "corpus", "importance", "intervals", "kept", "likelihood", "optimize", "search", "text")
MODULES = [
    "mdkern",
    "mdkern.schedule",
    "mdkern.decoders",
    "mdkern.compat",
    *(f"mdkern.compat.{name}" for name in ("llada", "dream", "fast_dllm")),
    "mdkern.models",
    "mdkern.kernels",
    "mdkern.engine.graphs",
    "mdkern.trace",
    *(f"mdkern.evaluation.{name}" for name in EVALUATION),
]


def prepare(name: str) -> list[str]:
    """Ready a module for pdoc. Returns those of its public names that have no docstring."""
    module = import_module(name)
    bare = []
    for public in module.__all__:
        thing: Any = getattr(module, public)
        if hasattr(thing, "_fields"):  # pdoc cannot see what module a NamedTuple's annotations belong to
            thing.__new__.__annotations__ = get_type_hints(thing)
        if callable(thing) and not (thing.__doc__ or "").strip():
            bare.append(f"{name}.{public}")
    return bare


def main(folder: Path) -> None:
    warnings.simplefilter("error")
    bare = [public for name in MODULES for public in prepare(name)]
    if bare:
        raise SystemExit(f"no docstring: {', '.join(bare)}")
    pdoc.render.configure(docformat="google", footer_text=f"mdkern {import_module('mdkern').__version__}")
    only = [part for name in MODULES for part in (name, rf"!{name}\..*")]
    pdoc.pdoc(*only, output_directory=folder)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/docs"))
