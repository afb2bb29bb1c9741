"""The device-side loop's condition: what is shipped is what its source says, for every GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from mdkern.engine.device_loop import PTX, check

SOURCE = Path(__file__).parents[2] / "csrc" / "loop_condition.cu"
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


def instructions(ptx: str) -> list[str]:
    """Without comments and the compiler's version of the language."""
    lines = (line.split("//")[0].strip() for line in ptx.splitlines())
    return [line for line in lines if line and not line.startswith(".version")]


def compile_source(folder: Path, *options: str) -> Path:
    out = folder / "out"
    subprocess.run(["nvcc", *options, "-rdc=true", str(SOURCE), "-o", str(out)], check=True, timeout=200)
    return out


@needs_nvcc
def test_the_shipped_ptx_is_the_source_compiled(tmp_path: Path) -> None:
    built = compile_source(tmp_path, "-arch=compute_80", "-ptx").read_text()
    assert instructions(PTX.read_text()) == instructions(built), "make csrc"
    assert any("cudaGraphSetConditional" in line for line in instructions(built))


@needs_nvcc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_it_compiles_for_every_gpu(tmp_path: Path, architecture: str) -> None:
    assert compile_source(tmp_path, f"-arch={architecture}", "-cubin").stat().st_size > 0


def test_a_drivers_refusal_is_an_error() -> None:
    class Refusal:
        name = "CUDA_ERROR_NOT_SUPPORTED"

        def __int__(self) -> int:
            return 801

    class Success(Refusal):
        def __int__(self) -> int:
            return 0

    assert check((Success(), 5)) == 5
    assert check((Success(),)) is None
    with pytest.raises(RuntimeError, match="CUDA_ERROR_NOT_SUPPORTED"):
        check((Refusal(),))
