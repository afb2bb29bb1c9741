"""Triton's interpreter, mended and faster, for the kernels' tests on the CPU."""

# mypy: ignore-errors

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture(autouse=True, scope="module")
def mend_interpreter() -> None:
    """Triton 3.6's interpreter asks of NumPy what NumPy 2.4 no longer does, multiplies bfloat16 and e4m3 as integers,
    reduces with a function of one's own element by element, and loses the carry when it rounds to e4m3.

    And it spends half of its time on what nobody needs: it prepares Triton's language anew at every call of a function
    inside a kernel, where a launch can do it for all; makes a table of all types whenever it asks for one; and computes
    of sums and products of integers whether they overflow, only to drop the answer."""
    patch_language = interpreter._patch_lang
    whole = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    find_type = interpreter._get_np_dtype
    find_known_type = cache(find_type)
    patch_tensor = interpreter._patch_lang_tensor
    convert_float = interpreter._convert_float

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        def values(x: Any) -> Any:
            if x.dtype == tl.bfloat16:
                return (x.data.astype(numpy.uint32) << 16).view(numpy.float32)
            if x.dtype == tl.float8e4nv:
                return torch.from_numpy(x.data.copy()).view(torch.float8_e4m3fn).float().numpy()
            return x.data.astype(numpy.float32)

        return interpreter.TensorHandle(values(a) @ values(b) + d.data, d.dtype.scalar)

    def reduce_by_halves(self: Any, inputs: tuple[Any, ...]) -> list[Any]:
        values = [numpy.moveaxis(x.handle.data, self.axis, 0) for x in inputs]
        while len(values[0]) > 1:
            half = len(values[0]) // 2
            halves = [self.to_tensor(v[part], x.dtype) for part in (slice(half), slice(half, None))
                      for v, x in zip(values, inputs)]  # fmt: skip
            values = [x.handle.data for x in self.combine_fn.fn(*halves)]
        return [self.to_tensor(v[0], x.dtype) for v, x in zip(values, inputs)]

    def convert(value: Any, source: Any, target: Any, rounding: Any) -> Any:
        if target != tl.float8e4nv or source != tl.float32:
            return convert_float(value, source, target, rounding)
        inside = torch.from_numpy(value.copy()).clamp(-448, 448)  # as the instruction does, cvt.rn.satfinite
        return inside.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    def numpy_type(kind: Any) -> Any:  # those of pointers have no hash
        return (find_type if kind.scalar.is_ptr() else find_known_type)(kind.scalar)

    def call_inside(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)

    options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    interpreter.interpreter_builder.options = options
    interpreter._get_np_dtype = numpy_type
    interpreter._patch_lang = lambda _: patch_language(whole)
    interpreter.InterpretedFunction.__call__ = call_inside
    interpreter._convert_float = convert
    interpreter._patch_lang_tensor = patched
    interpreter.InterpreterBuilder.create_dot = dot
    interpreter.ReduceOps.generic_reduce = reduce_by_halves
