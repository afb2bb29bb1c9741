"""CUDA graphs of the sampler's step: captured on first use (`capture.py`), kept, and replayed for every tick.

What is captured: one whole step, that is a forward pass of a denoiser (backbone and head) for one batch size, with the
bookkeeping before and after it (`reveal_tick` of `planned.py`, `decode_tick` of `stepwise.py`, `cached_tick` of
`cached.py`). It reads and writes the tensors of a `Workspace`: the sampler's state (`state.py`), a buffer of ticks or
the progress of the slots, and the KV cache, all at fixed addresses. The packing of ticks, stopping criteria and logits
processors stay outside.

A call of `sample` leases a workspace, copies its request into it and replays. Graphs are kept after the call and serve
later calls of the same shapes, as long as the model is the same object with the same settings and its weights at the
same addresses. Weights that change in place are seen. The number of graphs kept is bounded; `held` lists them and
`clear` gives their memory back. The limits: docs/notes/graphs.md.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mdkern.engine.capture import LOCK, CaptureError, capture, rehearse
from mdkern.engine.device_loop import DeviceLoop, make_loop
from mdkern.engine.request import Request
from mdkern.engine.state import SamplerState
from mdkern.kernels.invariant import is_batch_invariant
from mdkern.models import Denoiser
from mdkern.models.around import AroundDenoiser
from mdkern.models.denoiser import PREPARED, QUANTISED_HEADS, Head
from mdkern.models.fingerprint import Mark, describe, fingerprint, forget

__all__ = ["clear", "held"]

logger = logging.getLogger(__name__)

Part = TypeVar("Part")

MOST_WORKSPACES = 4  # idle workspaces that are kept
MOST_GRAPHS = 32  # graphs of a workspace
MOST_UNUSED = 1 << 30  # bytes of a workspace's parts that the last call did not use; with more, all are dropped
TICKS_AHEAD = 32  # replays between two CUDA events
EVENTS_AHEAD = 4  # CUDA events by which the host may be ahead of the device

_idle: list[Workspace] = []  # the most recently used last
_refused: dict[tuple[int, Hashable], Any] = {}  # what could not be captured, by model and mark, so as to warn once


@dataclass(eq=False)
class Graph:
    """One captured step."""

    name: str  # of the denoiser
    captured: torch.cuda.CUDAGraph
    model: Callable[[], Any]  # gives the model; a weak reference if the graph is kept after the call
    mark: Hashable  # what the capture assumes about the denoiser, see `mark_of`; None: the graph serves one call
    bias: Tensor  # a copy of the head's bias, which each call refreshes
    memory: int  # bytes by which the capture increased PyTorch's reserved memory
    loop: DeviceLoop | None = None  # repeats the step on the device


@dataclass(eq=False)
class Workspace:
    """State, tick buffers and the graphs captured over them, for calls of one shape."""

    key: tuple[Hashable, ...]
    state: SamplerState
    parts: dict[Hashable, Any] = field(default_factory=dict)  # everything else that the graphs read and write
    used: set[Hashable] = field(default_factory=set)  # keys of the parts that the current or the last call used
    graphs: OrderedDict[Hashable, Graph] = field(default_factory=OrderedDict)
    sizes: set[int] = field(default_factory=set)  # sizes of the tick buffers, see `round_up`
    marks: dict[int, Mark | None] = field(default_factory=dict)  # `mark_of` of this call's prepared denoisers
    pool: Any = None  # memory that the graphs share, as they never run at the same time

    def forget_the_dead(self) -> None:
        """Drop the graphs of models that no longer exist, and those that no later call could recognise."""
        for key, graph in list(self.graphs.items()):
            if graph.mark is None or graph.model() is None:
                del self.graphs[key]

    def begin(self, request: Request) -> None:
        """Load a request, and drop what no call can use.

        If more than `MOST_UNUSED` bytes of parts were not used by the last call, all parts and graphs are dropped.
        Calls of one kind thus keep theirs, however large they are.
        """
        self.state.load(request)
        self.marks.clear()
        self.forget_the_dead()
        if sum(bytes_of(part) for key, part in self.parts.items() if key not in self.used) > MOST_UNUSED:
            self.graphs.clear()  # they contain the addresses of the parts
            self.parts.clear()
            self.sizes.clear()
        self.used.clear()

    def round_up(self, size: int) -> int:
        """The size of a tick buffer for `size` entries, so that graphs are captured for few shapes.

        It is a power of two, at least 4, or twice that if there is a buffer of that size already.
        """
        least = 1 << max(2, (size - 1).bit_length())
        found = least if least in self.sizes or 2 * least not in self.sizes else 2 * least
        self.sizes.add(found)
        return found

    def memory(self) -> int:
        """Bytes of the state and the parts."""
        return sum(map(bytes_of, (self.state, *self.parts.values())))

    def part(self, key: Hashable, make: Callable[[], Part]) -> Part:
        """The part of this key, made on first use and kept at its addresses."""
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
        rehearsed: bool = True,
    ) -> Graph | None:
        """The graph of `step`: one captured earlier if it still holds, else a new one.

        Args:
            denoiser: the denoiser that the step runs.
            key: distinguishes this step from the denoiser's other ones.
            step: runs the step with the head that it is given. It is run a few times to warm up.
            idle: called before each run of the warm-up, to point the step at scratch data. A step advances its state,
                and repeated steps without it would read past the end of the ticks.
            loop_while: also make a device-side loop that runs while this tensor's first entry is not 0. It is not made
                for a head that is divided over processes: a graph with NCCL's kernels can't be the body of a loop.
            rehearsed: whether the step, the denoiser apart, may be rehearsed: it keeps nothing for the next time.

        Returns:
            None if the step could not be captured. A warning has then given the reason, once for each model.
        """
        model = model_of(denoiser)
        loop_while = None if denoiser.head.shard is not None else loop_while
        if id(denoiser) not in self.marks:
            content = mark_of(denoiser)
            self.marks[id(denoiser)] = None if content is None else Mark(content)
        mark = self.marks[id(denoiser)]
        if (id(model), mark) in _refused:
            return None
        key = id(model), mark, key
        graph = self.graphs.pop(key, None)
        if graph is None or graph.model() is not model:
            graph = None  # gives its memory back to the pool before the next capture
            with torch.inference_mode(False):
                bias = torch.empty_like(denoiser.head.bias)
            bias.copy_(denoiser.head.bias)
            head = replace(denoiser.head, bias=bias)
            if not self.graphs:  # a pool does not outlive its last graph
                self.pool = torch.cuda.graph_pool_handle()
            rehearsal, room = None, 0
            if rehearsed and denoiser.keeps_nothing and head.shard is None:
                try:
                    rehearsal, room = rehearse(lambda: step(head), idle, self.pool, bias.device)
                except CaptureError as error:  # the step itself will meet the reason
                    logger.debug("a step could not be rehearsed: %s", error)
                    self.pool = torch.cuda.graph_pool_handle()
            try:
                captured, memory = capture(lambda: step(head), idle, self.pool, bias.device, loop_while is not None)
            except CaptureError as error:
                self.pool = torch.cuda.graph_pool_handle()
                refuse(denoiser, mark, error)
                return None
            del rehearsal  # the capture has its memory
            alive = weakref.ref(model) if mark is not None else lambda: model
            loop = None if loop_while is None else make_loop(captured, loop_while)
            graph = Graph(denoiser.name, captured, alive, mark, bias, room + memory, loop)
        graph.bias.copy_(denoiser.head.bias)
        self.graphs[key] = graph
        while len(self.graphs) > MOST_GRAPHS:
            self.graphs.popitem(last=False)
        return graph


def refuse(denoiser: Denoiser, mark: Hashable, error: Exception) -> None:
    """Warn that a model can't be captured, and remember it for as long as the model exists."""
    model = model_of(denoiser)
    key = id(model), mark
    try:
        _refused[key] = weakref.ref(model, lambda _: _refused.pop(key, None))  # a later object may get the same id
    except TypeError:  # objects with `__slots__`, for one
        _refused[key] = model
    torch.cuda.synchronize(denoiser.device)
    reason = (str(error).strip() or type(error.__cause__ or error).__name__).splitlines()[0]
    warnings.warn(
        f"{denoiser.name} can't be captured in a CUDA graph and runs eagerly, which is slower: {reason}", stacklevel=6
    )


class Pacer:
    """Keeps the host a bounded number of replays ahead of the device, so that progress is right and Ctrl-C prompt."""

    def __init__(self) -> None:
        self.count = 0
        self.events: deque[torch.cuda.Event] = deque()

    def replayed(self) -> bool:
        """Count a replay. Returns whether the host synchronised with the device at this one."""
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
    """A workspace loaded with the request. It is kept for the next call unless this one fails.

    It has room for at least `most` sequences, so that all groups of a run can share it.
    """
    count, length = request.input_ids.shape
    room = 1 << max(4, (max(count, most) - 1).bit_length())  # a power of two, so that similar calls share graphs
    key = request.device, room, length, request.attention_mask is not None
    with LOCK:
        found = next((workspace for workspace in reversed(_idle) if workspace.key == key), None)
        if found is not None:
            _idle.remove(found)
    if found is None:
        with torch.inference_mode(False):  # later calls may be outside of inference mode
            state = SamplerState.allocate(room, length, request.attention_mask is not None, request.device)
        found = Workspace(key, state)
    try:
        found.begin(request)
        yield found
    except BaseException:
        with suppress(RuntimeError):
            torch.cuda.synchronize(request.device)  # steps that are still running may write to its memory
        raise
    found.forget_the_dead()
    torch.cuda.current_stream(request.device).synchronize()  # the next call may be on another stream
    with LOCK:
        _idle.append(found)
        del _idle[:-MOST_WORKSPACES]


def model_of(denoiser: Denoiser) -> Any:
    """The object with which a denoiser's graphs are dropped: the model that was adapted, or the denoiser itself."""
    return getattr(denoiser, "model", denoiser)


def held() -> list[tuple[str, int]]:
    """What is kept between calls, as pairs of a name and bytes.

    The name is the denoiser's for each graph, ``"state"`` for what graphs read and write, and ``"prepared weights"``
    for copies of weights. Graphs of one call share much of their memory.
    """
    with LOCK:
        kept = [(graph.name, graph.memory) for workspace in _idle for graph in workspace.graphs.values()]
        kept += [("state", workspace.memory()) for workspace in _idle]
        return kept + [
            ("prepared weights", nested_bytes(tensors)) for tensors in [*PREPARED.values(), *QUANTISED_HEADS.values()]
        ]


def nested_bytes(tensors: Any) -> int:
    return tensors.nbytes if isinstance(tensors, Tensor) else sum(map(nested_bytes, tensors or ()))


def bytes_of(thing: Any) -> int:
    """Bytes of an object's tensors, its ticks included."""
    tensors = [value for value in vars(thing).values() if isinstance(value, Tensor)]
    return nested_bytes(tensors) + (bytes_of(thing.ticks) if hasattr(thing, "ticks") else 0)


def clear() -> None:
    """Give back the memory of all graphs that no call is using. Models that could not be captured are tried again.

    What is known of models is forgotten, too: it holds the weights that a model had when it was last sampled from.
    """
    with LOCK:
        _idle.clear()
        _refused.clear()
        PREPARED.clear()
        QUANTISED_HEADS.clear()
        forget()


def mark_of(denoiser: Denoiser) -> Hashable:
    """What a captured step assumes not to change: in the model, in the denoiser around it, and in the process.

    None for a model that cannot be examined.
    """
    if isinstance(denoiser, AroundDenoiser):
        inner = mark_of(denoiser.inner)
        return None if inner is None else (inner, denoiser.mark())
    model = fingerprint(model_of(denoiser))
    if model is None:
        return None
    apart = "model", "name", "head", *denoiser.marked
    around = {name: value for name, value in vars(denoiser).items() if name not in apart}
    modules = tuple(fingerprint(value) for value in around.values() if isinstance(value, nn.Module))
    head = denoiser.head.weight, denoiser.head.scale, denoiser.head.soft_cap  # each call copies the bias
    return type(denoiser), model, describe(around), modules, describe(head), process_settings()


def process_settings() -> Hashable:
    """What a captured step assumes of the process."""
    precision = torch.backends.cuda.matmul.allow_tf32, is_batch_invariant()
    return torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), *precision
