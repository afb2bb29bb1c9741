"""Large kernels that are compiled in copies of the process: run by the tests in a process of its own."""

# mypy: ignore-errors

from __future__ import annotations

import mmap
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia import hopper
from triton.runtime import driver
from triton.runtime._async_compile import active_mode

from mdkern.kernels import compile_ahead
from mdkern.kernels.forked import forks
from tests.suites.compiled_ahead import Driver

told: list[tuple[str, bool]] = []  # the kernels of which Triton tells here, and whether they were in its cache

tellings = mmap.mmap(-1, 1)  # how often Triton tells, in copies, too


@gluon.jit
def large_kernel(x, factor: gl.constexpr):
    places = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(x + places, gl.load(x + places) * factor)


@triton.jit
def small_kernel(x, factor: gl.constexpr):
    triton.language.store(x, triton.language.load(x) * factor)


@gluon.jit
def described_large_kernel(x, factor: gl.constexpr):
    tile = gl.allocate_shared_memory(x.dtype, x.block_type.shape, x.layout)
    hopper.tma.async_copy_shared_to_global(x, [factor, 0], tile)
    hopper.tma.store_wait(0)


@triton.jit
def described_kernel(x, factor: gl.constexpr):
    x.store([factor, 0], x.load([0, 0]))


def compiling(source: type, kernel: triton.JITFunction, factor: int, x: str = "*fp32") -> Callable[[], object]:
    built = source(kernel, {"x": x, "factor": "constexpr"}, {"factor": factor})
    work = lambda: triton.compile(built, target=GPUTarget("cuda", 90, 32))  # noqa: E731
    work.launched = kernel
    return work


def compiled(*works: Callable[[], object]) -> list[bytes]:
    """The machine code of kernels that are compiled ahead, with an empty cache. No child is left, dead or alive."""
    codes = {}
    told.clear()
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        try:
            with compile_ahead.launches_compile(torch.device("cpu")):
                for number, work in enumerate(works):
                    note = lambda kernel, number=number: codes.update({number: kernel.asm["cubin"]})  # noqa: E731
                    compile_ahead._rehearsing.launched = work.launched
                    active_mode.get().submit(number, work, note)
        finally:
            compile_ahead._rehearsing.launched = None
            assert active_mode.get() is None
            try:
                os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                pass
            else:
                raise AssertionError("a child is left")
    return [codes[number] for number in range(len(works))]


def large(*factors: int) -> list[Callable[[], object]]:
    return [compiling(GluonASTSource, large_kernel, factor) for factor in factors]


def here(work: Callable[[], object], *extra: Callable[[], object]) -> Callable[[], object]:
    """Compile after something that happens in copies of this process only, and note in which processes."""
    process = os.getpid()

    def run() -> object:
        if os.getpid() != process:
            for act in extra:
                act()
        return work()

    run.launched = work.launched
    return run


def tell(src, cache_hit, **_) -> None:
    told.append((src.name, cache_hit))
    tellings[0] += 1


def launchers() -> None:
    """A launcher that is built beside compilation is told what one is told that is built after it, or there is none."""
    asked: dict[str, list[object]] = {}
    Driver.launcher_cls = staticmethod(
        lambda source, metadata: asked.setdefault(source.name, []).append(metadata.tensordesc_meta or None)
    )
    layout = gl.NVMMASharedLayout.get_default_for([64, 64], gl.float16)
    matrix = "tensordesc<fp16[64, 64]"
    compiled(
        compiling(GluonASTSource, large_kernel, 2),
        compiling(ASTSource, small_kernel, 2),
        compiling(GluonASTSource, described_large_kernel, 2, f"{matrix},{layout!r}>"),
        compiling(ASTSource, described_kernel, 2, f"{matrix}>"),
    )
    assert {name: len(metas) for name, metas in asked.items()} == {
        "large_kernel": 2,
        "small_kernel": 2,
        "described_large_kernel": 2,
        "described_kernel": 1,  # what Triton does not know before
    }
    for early, late in (metas for metas in asked.values() if len(metas) == 2):
        assert early == late, asked
    assert all(len(asked[name][-1]) == 1 for name in ("described_kernel", "described_large_kernel"))


def main() -> None:
    driver.set_active(Driver())
    triton.knobs.compilation.listener = tell
    small = compiling(ASTSource, small_kernel, 2)
    codes = compiled(*large(2, 3), small)
    assert sorted(told) == [("large_kernel", True)] * 2 + [("small_kernel", False)], told
    assert tellings[0] == 3, "copies tell nobody"
    os.environ["MDKERN_FORK"] = "0"
    assert compiled(*large(2, 3), small) == codes
    assert sorted(told) == [("large_kernel", False)] * 2 + [("small_kernel", False)], told
    with patch.object(Driver, "launcher_cls"):
        launchers()
    del os.environ["MDKERN_FORK"]

    found = []
    thread = threading.Thread(target=lambda: found.extend(compiled(*large(2, 3))))
    thread.start()
    thread.join()
    assert found == codes[:2]
    assert told == [("large_kernel", True)] * 2

    for act in (signal.raise_signal, lambda number: 1 / 0):
        (work,) = large(2)
        assert compiled(here(work, lambda act=act: act(signal.SIGKILL))) == codes[:1]
        assert told == [("large_kernel", False)], "this process compiles what a copy could not"
        assert forks.failed
        forks.failed = False

    process, (work,) = os.getpid(), large(2)
    ended = Path(tempfile.mkdtemp()) / "ended"

    def interrupted() -> object:
        if os.getpid() == process:
            return work()
        kernel = work()
        os.kill(process, signal.SIGINT)
        time.sleep(0.05)
        ended.touch()
        return kernel

    interrupted.launched = work.launched
    try:
        compiled(interrupted)
    except KeyboardInterrupt:
        assert ended.exists(), "what has begun is ended"
    else:
        raise AssertionError("nothing interrupts")
    assert compiled(*large(2, 3)) == codes[:2]
    assert told == [("large_kernel", True)] * 2


if __name__ == "__main__":
    main()
