"""Runs a Gluon kernel for Hopper on the CPU, as it is written: its functions as plain Python, its warps as threads.

Only what `hopper_joint` and the kernels of attention use is here. What the device does later is done as late as it may
be: a multiplication reads shared memory when it is waited for, and so does a bulk store; so a buffer that is given back
too early spoils the result. A kernel that would hang makes the threads wait in vain, which is an error.
"""

# mypy: ignore-errors

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

PATIENCE = 20.0  # seconds until a thread that waits is taken for hanging


class Element:
    """A type of numbers, as kernels see it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.torch, self.primitive_bitwidth = dtype, 8 * dtype.itemsize


class Block(torch.Tensor):
    """A tensor in registers."""

    def split(self):
        return self.unbind(-1)

    def to(self, kind, bitcast=False):
        kind = kind.torch if isinstance(kind, Element) else kind
        return super().view(kind) if bitcast else super().to(kind)


class Pointer:
    def __init__(self, tensor: Tensor, at: Any = 0) -> None:
        self.tensor, self.at = tensor, at

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.tensor, self.at + more)

    def __sub__(self, less: Any) -> Pointer:
        return Pointer(self.tensor, self.at - less)

    def load(self, mask: Any = True, other: float = 0.0) -> Tensor:
        mask = torch.as_tensor(mask)
        assert torch.as_tensor((self.at >= 0) & (self.at < len(self.tensor)) | ~mask).all(), "a wild read"
        found = self.tensor[torch.where(mask, self.at, 0)]
        return torch.where(mask, found, torch.full_like(found, other)).as_subclass(Block)


class Shared:
    """A view of shared memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def shape(self):
        return tuple(self.tensor.shape)

    @property
    def dtype(self):
        return Element(self.tensor.dtype)

    def index(self, at):
        return Shared(self.tensor[at])

    def slice(self, start, length, dim=0):
        return Shared(self.tensor.narrow(dim, start, length))

    def permute(self, order):
        return Shared(self.tensor.permute(order))

    def reshape(self, shape):
        return Shared(self.tensor.view(shape))

    def store(self, value):
        self.tensor.copy_(value)


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes have come."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = self.missing = self.bytes = self.phase = 0

    def arrive(self, more_bytes: int = 0, arrivals: int = 1) -> None:
        with self.changed:
            self.missing -= arrivals
            self.bytes += more_bytes
            assert self.missing >= 0, "more arrivals than the barrier counts"
            if self.missing == 0 and self.bytes == 0:
                self.phase += 1
                self.missing = self.count
                self.changed.notify_all()

    def init(self, count):
        self.count = self.missing = count

    def wait(self, parity):
        with self.changed:
            assert self.changed.wait_for(lambda: self.phase % 2 != parity, PATIENCE), "the kernel hangs"


class Matrix:
    """What a descriptor of TMA describes."""

    def __init__(self, descriptor: Any) -> None:
        base = descriptor.base
        self.all = base.as_strided(tuple(descriptor.shape), tuple(descriptor.strides), base.storage_offset())
        self.block_shape, self.layout, self.dtype = list(descriptor.block_shape), None, Element(base.dtype)

    def part(self, corner):
        """Of a block: what lies in the matrix, and where that is in the block."""
        there, place = [], []
        for at, size, n in zip(corner, self.block_shape, self.all.shape):
            begin, end = min(max(at, 0), n), min(max(at + size, 0), n)
            there.append(slice(begin, end))
            place.append(slice(begin - at, end - at) if begin < end else slice(0, 0))
        return self.all[tuple(there)], tuple(place)


class Warps(threading.local):
    """What a warpgroup has begun and not waited for."""

    def __init__(self) -> None:
        self.products, self.stores = deque(), deque()


def where(chosen, one, other):
    if isinstance(chosen, Tensor):
        return torch.where(chosen, one, other)
    return one if chosen else one * 0 + other


def in_assembly(code, constraints, args, dtype, is_pure, pack):
    """What the pieces of machine code of the kernels of attention mean."""
    if "prmt" in code:
        return (128 * args[0]).round().to(dtype)
    if "sat" in code:
        return (args[0] * args[1] + args[2]).clamp(0, 1)
    return args[0] * args[1]


class Device:
    """One multiprocessor, whose programs run one after the other."""

    def __init__(self, earlier: Callable[[], None]) -> None:
        self.warps, self.program, self.earlier = Warps(), 0, earlier

    def allocate(self, element, shape, layout):
        if layout == "barriers":
            return SimpleNamespace(index=[Barrier() for _ in range(shape[0])].__getitem__)
        return Shared(torch.full(shape, torch.nan, dtype=element.torch))

    def copy_in(self, matrix, corner, barrier, buffer):
        assert buffer.shape == tuple(matrix.block_shape)
        block = torch.zeros(matrix.block_shape, dtype=matrix.dtype.torch)
        part, place = matrix.part(corner)
        block[place] = part
        buffer.store(block)
        barrier.arrive(-block.numel() * block.element_size(), arrivals=0)

    def copy_out(self, matrix, corner, buffer):
        def store():
            part, place = matrix.part(corner)
            part.copy_(buffer.tensor[place])

        assert buffer.shape == tuple(matrix.block_shape)
        self.warps.stores.append(store)

    def store_wait(self, pending):
        while len(self.warps.stores) > pending:
            self.warps.stores.popleft()()

    def multiply(self, left, right, sums, use_acc=True, is_async=False):
        assert is_async
        left = Shared(left) if isinstance(left, Tensor) else left  # in registers
        result = torch.full_like(sums, torch.nan)

        def product():
            made = left.tensor.float() @ right.tensor.float()
            result.copy_(sums + made if use_acc else made)

        self.warps.products.append(product)
        return result

    def multiply_wait(self, pending, deps):
        while len(self.warps.products) > pending:
            self.warps.products.popleft()()
        return deps[0] if len(deps) == 1 else deps

    def specialize(self, functions, _warps, _registers):
        problems = []

        def run(function, args):
            try:
                function(*args)
                assert not self.warps.products
                assert not self.warps.stores
            except BaseException as problem:
                problems.append(problem)

        threads = [threading.Thread(target=run, args=pair) for pair in functions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if problems:
            raise problems[0]

    def names(self) -> dict[str, Any]:
        """What stands for the names that a kernel's module imports."""
        language = SimpleNamespace(
            program_id=lambda _: self.program,
            static_range=range,
            minimum=min,
            zeros=lambda shape, _, layout: torch.zeros(shape).as_subclass(Block),
            arange=lambda start, end, layout: torch.arange(start, end).as_subclass(Block),
            load=lambda pointer, **options: pointer.load(**options),
            where=where,
            full=lambda shape, value, kind, layout: torch.full(shape, value, dtype=kind.torch).as_subclass(Block),
            max=lambda x, dim: x.amax(dim),
            sum=lambda x, dim: x.sum(dim),
            maximum=torch.maximum,
            convert_layout=lambda x, *_: x,
            inline_asm_elementwise=in_assembly,
            DotOperandLayout=lambda *_: None,
            BlockedLayout=lambda *_: None,
            NVMMASharedLayout=SimpleNamespace(get_default_for=lambda *_: None),
            exp2=torch.exp2,
            ceil=torch.ceil,
            float32=Element(torch.float32),
            int8=Element(torch.int8),
            int64=Element(torch.int64),
            float8e4nv=Element(torch.float8_e4m3fn),
            SliceLayout=lambda *_: None,
            NVMMADistributedLayout=lambda *_: None,
            allocate_shared_memory=self.allocate,
            warp_specialize=self.specialize,
        )
        barriers = SimpleNamespace(
            MBarrierLayout=lambda: "barriers",
            init=lambda barrier, count: barrier.init(count),
            wait=lambda barrier, parity: barrier.wait(parity),
            expect=lambda barrier, size: barrier.arrive(size),
            arrive=lambda barrier: barrier.arrive(),
        )
        copies = SimpleNamespace(
            async_copy_global_to_shared=self.copy_in,
            async_copy_shared_to_global=self.copy_out,
            store_wait=self.store_wait,
        )
        return {
            "gl": language,
            "mbarrier": barriers,
            "tma": copies,
            "warpgroup_mma": self.multiply,
            "warpgroup_mma_wait": self.multiply_wait,
            "fence_async_shared": lambda: None,
            "gdc_wait": self.earlier,
            "gdc_launch_dependents": lambda: None,
        }


def in_python(function: Any, names: dict[str, Any], done: dict[Any, Any]) -> Any:
    """A function of a kernel as plain Python, and all that it calls."""
    plain = getattr(function, "fn", function)
    if plain not in done:
        own = dict(plain.__globals__)
        done[plain] = FunctionType(plain.__code__, own, plain.__name__, plain.__defaults__, plain.__closure__)
        for name, value in list(own.items()):
            if name in names:
                own[name] = names[name]
            elif type(value).__name__ in ("JITFunction", "GluonJITFunction"):
                own[name] = in_python(value, names, done)
            elif type(value).__name__ == "constexpr":
                own[name] = value.value
    return done[plain]


class OnCpu:
    """A kernel that is launched on the CPU: ``OnCpu(kernel)[grid](...)``.

    `earlier` is what the kernel before it does: it is done when a program waits for that.
    """

    def __init__(self, kernel: Any, earlier: Callable[[], None] = lambda: None) -> None:
        self.kernel, self.earlier = kernel, earlier

    def __getitem__(self, grid):
        def launch(*args, num_warps, maxnreg, launch_pdl=False, **constants):
            device = Device(self.earlier)
            function = in_python(self.kernel, device.names(), {})
            for device.program in range(grid[0]):
                function(*map(self.given, args), **constants)

        return launch

    @staticmethod
    def given(value):
        if isinstance(value, Tensor):
            span = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride()))
            return Pointer(value.as_strided((span,), (1,)))  # as it lies in memory
        return Matrix(value) if hasattr(value, "block_shape") else value
