"""CUDA graphs of the sampler's step: captured on first use, kept, replayed tick after tick.

A graph is captured for a denoiser and a batch size over a `Workspace`: state and ticks at fixed addresses. A call of
`sample` leases a workspace, copies its request into it and replays. Graphs outlive the call and serve the next one that
has the same shapes, as long as the model is the same object with the same weights' addresses and settings; weights
changed in place are seen. What is kept is bounded, `held` shows it and `clear` gives it back.
"""

from __future__ import annotations

import gc
import logging
import threading
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mdkern.engine.device_loop import DeviceLoop, make_loop
from mdkern.engine.request import Request
from mdkern.engine.state import SamplerState
from mdkern.models import Denoiser
from mdkern.models.denoiser import PREPARED, Head
from mdkern.models.fingerprint import describe, fingerprint

Part = TypeVar("Part")
logger = logging.getLogger(__name__)

WARM_UPS = 2  # runs of a step before it is captured
MOST_WORKSPACES = 4  # idle ones kept
MOST_GRAPHS = 32  # of a workspace
MOST_UNUSED = 1 << 30  # bytes of a workspace's parts that the last call did without: with more the next starts anew
TICKS_AHEAD = 32  # replays between two events; the host runs at most four events ahead of the device
EVENTS_AHEAD = 4

_idle: list[Workspace] = []  # the most recently used last
_lock = threading.Lock()  # of `_idle`, and of capturing: one capture at a time in a process
_refused: dict[tuple[int, Hashable], Any] = {}  # what could not be captured, by model and mark: warned of once


@dataclass(eq=False)
class Graph:
    """One captured step."""

    name: str  # of the denoiser
    captured: torch.cuda.CUDAGraph
    model: Callable[[], Any]  # a weak reference where the graph outlives the call
    mark: Hashable  # what was taken for constant of the denoiser; None where nothing can be told of it
    bias: Tensor  # the head's, a copy of our own that each call refreshes
    memory: int  # bytes that capturing it added to what PyTorch reserves
    loop: DeviceLoop | None = None  # the step again and again


@dataclass(eq=False)
class Workspace:
    """State, tick buffers and the graphs captured over them, for calls of one shape."""

    key: tuple[Hashable, ...]
    state: SamplerState
    parts: dict[Hashable, Any] = field(default_factory=dict)  # what else the graphs read and write
    used: set[Hashable] = field(default_factory=set)  # keys of the parts that the call, or the last one, asked for
    graphs: OrderedDict[Hashable, Graph] = field(default_factory=OrderedDict)
    sizes: set[int] = field(default_factory=set)  # that tick buffers have, see `round_up`
    marks: dict[int, Hashable] = field(default_factory=dict)  # of this call's denoisers, as they are prepared for it
    pool: Any = None  # memory that the graphs share: they never run at the same time

    def forget_the_dead(self) -> None:
        """Drop the graphs of models that are no more, or that no later call could recognise."""
        for key, graph in list(self.graphs.items()):
            if graph.mark is None or graph.model() is None:
                del self.graphs[key]

    def begin(self, request: Request) -> None:
        """Load a request, and drop what no call can use.

        Where parts have piled up that the last call did without, all parts and graphs go. So calls of one kind keep
        theirs, however large.
        """
        self.state.load(request)
        self.marks.clear()
        self.forget_the_dead()
        if sum(bytes_of(part) for key, part in self.parts.items() if key not in self.used) > MOST_UNUSED:
            self.graphs.clear()  # they hold the parts' addresses, so they go together
            self.parts.clear()
            self.sizes.clear()
        self.used.clear()

    def round_up(self, size: int) -> int:
        """The size of a tick buffer for `size` entries, so that graphs are captured for few shapes.

        A power of two, at least 4; or twice that where a buffer has it already.
        """
        least = 1 << max(2, (size - 1).bit_length())
        found = least if least in self.sizes or 2 * least not in self.sizes else 2 * least
        self.sizes.add(found)
        return found

    def memory(self) -> int:
        """Bytes of the state and the parts."""
        return sum(map(bytes_of, (self.state, *self.parts.values())))

    def part(self, key: Hashable, make: Callable[[], Part]) -> Part:
        """What was made under this key, made on first use: it stays at its addresses."""
        self.used.add(key)
        if key not in self.parts:
            with torch.inference_mode(False):
                self.parts[key] = make()
        part: Part = self.parts[key]
        return part

    def graph(
        self,
        denoiser: Denoiser,
        key: Hashable,
        step: Callable[[Head], None],
        idle: Callable[[], None],
        loop_while: Tensor | None = None,
    ) -> Graph | None:
        """The graph of `step`, captured if there is none that serves.

        Args:
            denoiser: whose step it is.
            key: what distinguishes it from the denoiser's other steps.
            step: runs the step; given the head to use. It is run a few times to warm up.
            idle: called before each of those runs, to make the step work on scratch: a step moves its state on, past
                the end of what it reads if it were run again and again.
            loop_while: make a loop of the step, too, that runs while this tensor's first entry is not 0.

        Returns:
            None if it could not be captured; then a warning has named the reason, once for the model.
        """
        model = model_of(denoiser)
        if id(denoiser) not in self.marks:
            self.marks[id(denoiser)] = mark_of(denoiser)
        mark = self.marks[id(denoiser)]
        if (id(model), mark) in _refused:
            return None
        key = id(model), mark, key
        graph = self.graphs.pop(key, None)
        if graph is None or graph.model() is not model:
            graph = None  # its memory goes back to the pool first
            with torch.inference_mode(False):
                bias = torch.empty_like(denoiser.head.bias)
            bias.copy_(denoiser.head.bias)
            head = replace(denoiser.head, bias=bias)
            if not self.graphs:  # a pool ends with its last graph
                self.pool = torch.cuda.graph_pool_handle()
            try:
                captured, memory = capture(lambda: step(head), idle, self.pool, bias.device, loop_while is not None)
            except CaptureError as error:
                refuse(denoiser, mark, error)
                return None
            alive = weakref.ref(model) if mark is not None else lambda: model
            loop = None if loop_while is None else make_loop(captured, loop_while)
            graph = Graph(denoiser.name, captured, alive, mark, bias, memory, loop)
        graph.bias.copy_(denoiser.head.bias)
        self.graphs[key] = graph
        while len(self.graphs) > MOST_GRAPHS:
            self.graphs.popitem(last=False)
        return graph


class CaptureError(RuntimeError):
    """A step that runs, but not in a capture."""


def warm_up(step: Callable[[], None], idle: Callable[[], None]) -> None:
    """Run a step so that kernels are compiled and algorithms chosen, each time from the idle state."""
    for _ in range(WARM_UPS):
        idle()
        step()


def capture(
    step: Callable[[], None],
    idle: Callable[[], None],
    pool: Any,
    device: torch.device,
    keep_graph: bool = False,
) -> tuple[torch.cuda.CUDAGraph, int]:
    """Capture `step` on a stream of its own, after it has been warmed up.

    Not by `torch.cuda.graph`, which also collects garbage and empties the allocator's cache of the whole process.

    Returns:
        The graph, and the bytes by which PyTorch's reserved memory grew.
    """
    with _lock, torch.cuda.device(device):
        stream, current = capture_stream(device), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            warm_up(step, idle)
            torch.cuda.synchronize()
            before = torch.cuda.memory_reserved()
            graph = torch.cuda.CUDAGraph(keep_graph=keep_graph)
            with no_collection():
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    step()
                    graph.capture_end()
                except BaseException as error:
                    leave(graph, device, pool)
                    if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
                        raise CaptureError(str(error)) from error
                    raise
        current.wait_stream(stream)
        memory = torch.cuda.memory_reserved() - before
    logger.debug("captured a graph on %s: %.1f MiB", device, memory / 2**20)
    return graph, memory


@contextmanager
def no_collection() -> Iterator[None]:
    """Without garbage collection: it could destroy an old graph in this thread, which makes a capture invalid."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def leave(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any) -> None:
    """End a capture that has failed."""
    try:
        graph.capture_end()  # the stream must leave it
    except RuntimeError:  # the stream's capture is invalid: PyTorch's allocator and generator are still in it
        # PyTorch's own names: where they are no more, the allocator keeps the pool's memory, and no other harm is done.
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(device.index, pool)
            torch._C._cuda_releasePool(device.index, pool)
        with suppress(RuntimeError):
            nothing = torch.zeros(1, device=device)
            valid = torch.cuda.CUDAGraph()
            valid.capture_begin(capture_error_mode="thread_local")
            nothing.zero_()
            valid.capture_end()  # this the generator leaves: else every draw of random numbers would be refused


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps 32 MiB of workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


def refuse(denoiser: Denoiser, mark: Hashable, error: Exception) -> None:
    """Remember for the life of a model that it can't be captured, and warn."""
    model = model_of(denoiser)
    key = id(model), mark
    try:
        _refused[key] = weakref.ref(model, lambda _: _refused.pop(key, None))  # its id may become another one's
    except TypeError:  # objects with `__slots__`, for one
        _refused[key] = model
    torch.cuda.synchronize(denoiser.device)
    reason = (str(error).strip() or type(error.__cause__ or error).__name__).splitlines()[0]
    warnings.warn(
        f"{denoiser.name} can't be captured in a CUDA graph and runs eagerly, which is slower: {reason}", stacklevel=6
    )


class Pacer:
    """Keeps the host a bounded number of replays ahead of the device, so that progress is true and Ctrl-C prompt."""

    def __init__(self) -> None:
        self.count = 0
        self.events: deque[torch.cuda.Event] = deque()

    def replayed(self) -> bool:
        """Count a replay; whether it is one at which the host looked up."""
        self.count += 1
        if self.count % TICKS_AHEAD:
            return False
        event = torch.cuda.Event()
        event.record()
        self.events.append(event)
        if len(self.events) > EVENTS_AHEAD:
            self.events.popleft().synchronize()
        return True


@contextmanager
def lease(request: Request, most: int = 0) -> Iterator[Workspace]:
    """A workspace for the request, loaded with it; kept for the next call unless this one fails.

    It has room for `most` sequences at least, so that a run's groups share one.
    """
    count, length = request.input_ids.shape
    room = 1 << max(4, (max(count, most) - 1).bit_length())  # so that calls of nearly the same size share graphs
    key = request.device, room, length, request.attention_mask is not None
    with _lock:
        found = next((workspace for workspace in reversed(_idle) if workspace.key == key), None)
        if found is not None:
            _idle.remove(found)
    if found is None:
        with torch.inference_mode(False):  # it outlasts the call
            state = SamplerState.allocate(room, length, request.attention_mask is not None, request.device)
        found = Workspace(key, state)
    try:
        found.begin(request)
        yield found
    except BaseException:
        with suppress(RuntimeError):
            torch.cuda.synchronize(request.device)  # before memory goes back that steps still under way write to
        raise
    found.forget_the_dead()
    torch.cuda.current_stream(request.device).synchronize()  # the next call may be on another stream
    with _lock:
        _idle.append(found)
        del _idle[:-MOST_WORKSPACES]


def model_of(denoiser: Denoiser) -> Any:
    """The object whose life the graphs of a denoiser share: people's own model, or the denoiser itself."""
    return getattr(denoiser, "model", denoiser)


def held() -> list[tuple[str, int]]:
    """Denoiser and bytes of every graph that is kept between calls, and of what they work on: "state" and bytes,
    "prepared weights" and bytes.

    Graphs of one call share much of their memory.
    """
    with _lock:
        kept = [(graph.name, graph.memory) for workspace in _idle for graph in workspace.graphs.values()]
        kept += [("state", workspace.memory()) for workspace in _idle]
        return kept + [("prepared weights", nested_bytes(tensors)) for tensors in list(PREPARED.values())]


def nested_bytes(tensors: Any) -> int:
    return tensors.nbytes if isinstance(tensors, Tensor) else sum(map(nested_bytes, tensors or ()))


def bytes_of(thing: Any) -> int:
    """Of the tensors that an object has, and of those of its ticks if it has any."""
    tensors = [value for value in vars(thing).values() if isinstance(value, Tensor)]
    return nested_bytes(tensors) + (bytes_of(thing.ticks) if hasattr(thing, "ticks") else 0)


def clear() -> None:
    """Give back the memory of all graphs that no call is using, and try again what could not be captured."""
    with _lock:
        _idle.clear()
        _refused.clear()
        PREPARED.clear()


def mark_of(denoiser: Denoiser) -> Hashable:
    """What a captured step takes for constant: of the model, of the denoiser around it, and of the process.

    None where nothing can be told of the model.
    """
    model = fingerprint(model_of(denoiser))
    if model is None:
        return None
    around = {name: value for name, value in vars(denoiser).items() if name not in ("model", "name", "head")}
    modules = tuple(fingerprint(value) for value in around.values() if isinstance(value, nn.Module))
    head = denoiser.head.weight, denoiser.head.scale, denoiser.head.soft_cap  # the bias is copied anew in each call
    process = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), torch.backends.cuda.matmul.allow_tf32
    return type(denoiser), model, describe(around), modules, describe(head), process
