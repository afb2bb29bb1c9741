"""Kernels that are compiled side by side, for a GPU that is not there: run by the tests in a process of its own."""

# mypy: ignore-errors

from __future__ import annotations

import threading
from functools import partial
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.build import compile_module_from_src

from mdkern.kernels import compile_ahead
from mdkern.kernels.backbone import triton_combine, triton_swiglu

DTYPES = torch.half, torch.float
LAUNCHER = """
#include <Python.h>
static PyObject *number(PyObject *module, PyObject *nothing) { return PyLong_FromLong(%d); }
static PyMethodDef functions[] = {{"number", number, METH_NOARGS, NULL}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "launcher", NULL, -1, functions};
PyMODINIT_FUNC PyInit_launcher(void) { return PyModule_Create(&definition); }
"""
events: list[tuple[str, str]] = []  # what happened, to which kernel or in which thread


def launcher(source, metadata):
    return lambda *_: events.append(("launches", source.name))


def load(*_) -> tuple[object, int, int, int, int]:
    events.append(("loads", threading.current_thread().name))
    return object(), 1, 32, 0, 1024


class Driver:
    """Of an H200."""

    launcher_cls = staticmethod(launcher)
    utils = SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": 232448}, load_binary=load)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compiled(src, metadata, metadata_group, times, cache_hit) -> None:
    events.append(("compiles", src.name))


def names(kind: str) -> list[str]:
    return sorted(name for what, name in events if what == kind)


def step() -> None:
    rows, weights = torch.randn(4, 64).bfloat16(), torch.rand(2, 2)
    triton_combine.combine(rows, torch.tensor([[0, 1], [2, 3]]), weights)
    for _ in range(3):
        triton_swiglu.swiglu(rows, rows)
    triton_swiglu.swiglu(rows.float(), rows.float())


def postponed(there: torch.device) -> None:
    """Work is done when its kernels have been compiled, with those of the next rehearsal or when it is needed."""
    compile_ahead.can_compile_ahead = lambda device: True
    places, weights = torch.tensor([[0, 1], [2, 3]]), torch.rand(2, 2)
    works = [partial(triton_combine.combine, torch.randn(4, 64, dtype=dtype), places, weights) for dtype in DTYPES]
    for number, work in enumerate(works):
        launched, compiled = len(names("launches")), len(names("compiles"))
        later = compile_ahead.when_compiled(number, work, there)
        assert (len(names("launches")), len(names("compiles"))) == (launched, compiled)
        if number == 0:
            with compile_ahead.launches_compile(there):
                later.finish()
                assert len(names("launches")) == launched, "nothing is needed during a rehearsal"
        for _ in range(2):
            later.finish()
            assert len(names("launches")) == launched + 1
        assert names("loads").count(threading.current_thread().name) == 0
        assert compile_ahead.when_compiled(number, work, there) is None
        assert len(names("launches")) == launched + 2, "from then on it is done at once"
    later = compile_ahead.when_compiled(2, work, there)
    elsewhere = threading.Thread(target=later.finish)
    elsewhere.start()
    elsewhere.join()
    assert len(names("launches")) == launched + 3, "another thread needs it"


def launchers_apart(there: torch.device) -> None:
    """C extensions of one name, as launchers are, keep their own functions when they are loaded again."""
    with compile_ahead.launches_compile(there):
        loaded = [compile_module_from_src(LAUNCHER % number, "launcher") for _ in range(2) for number in (0, 1)]
    assert [module.number() for module in loaded] == [0, 1, 0, 1]


def main() -> None:
    driver.set_active(Driver())
    triton.knobs.compilation.listener = compiled
    here, there = threading.current_thread().name, torch.device("cpu")
    with compile_ahead.launches_compile(there):
        step()
        half = torch.randn(2, 64).half()
        elsewhere = threading.Thread(target=triton_swiglu.swiglu, args=(half, half))
        elsewhere.start()
        elsewhere.join()
        assert names("launches") == ["swiglu_kernel"], "only other threads launch"
    assert names("compiles") == ["combine_kernel", "swiglu_kernel", "swiglu_kernel", "swiglu_kernel"], events
    assert len(names("loads")) == 4, "each is ready to be launched"
    assert names("loads").count(here) == 0, "and was made so in a thread"
    postponed(there)
    launchers_apart(there)
    before = len(names("launches"))
    step()
    assert len(names("compiles")) == len(names("loads")) == 6, "launches find what was compiled"
    assert len(names("launches")) == before + 5


if __name__ == "__main__":
    main()
