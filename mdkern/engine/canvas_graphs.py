"""CUDA graphs of the passes of a canvas workspace: the encoder over so many tokens after so many, and a step.

A graph contains the length of what is in the cache, so that there is one for each length. What else changes from call
to call it reads from tensors of its own, which `find` fills.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mdkern.engine.capture import CaptureError, capture
from mdkern.engine.device_loop import DeviceLoop, make_loop

MOST_GRAPHS = 32  # of a workspace
MOST_SEEN = 1024  # keys that are remembered without a graph

Inputs = Mapping[str, Tensor]


def can_capture(device: torch.device) -> bool:
    return device.type == "cuda"


class CapturedPass(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]  # what it reads that is not the workspace's
    loop: DeviceLoop | None  # repeats it on the device


class CapturedPasses:
    """The graphs, by key, the most recently used last."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.possible = can_capture(device)
        self.found: OrderedDict[Hashable, CapturedPass] = OrderedDict()
        self.seen: OrderedDict[Hashable, None] = OrderedDict()
        self.pool: Any = None
        self.refused: set[str] = set()  # kinds of passes that cannot be captured
        self.warm = False  # a step has run, so that its kernels are compiled

    def find(self, key: Hashable, inputs: Inputs) -> CapturedPass | None:
        """The pass of this key, with these inputs copied to where it reads them."""
        found = self.found.get(key)
        if found is not None:
            self.found.move_to_end(key)
            for name, tensor in inputs.items():
                found.inputs[name].copy_(tensor)
        return found

    def is_repeated(self, key: Hashable) -> bool:
        """Whether this key has come before: a length that comes once is not worth a capture."""
        repeated = key in self.seen
        self.seen[key] = None
        self.seen.move_to_end(key)
        while len(self.seen) > MOST_SEEN:
            self.seen.popitem(last=False)
        return repeated

    def capture(
        self,
        key: Hashable,
        inputs: Inputs,
        run: Callable[[Inputs], None],
        kind: str,
        loop_while: Tensor | None = None,
    ) -> CapturedPass | None:
        """Capture ``run(inputs)`` with copies of the inputs. None, after one warning for its kind, if it can't be.

        Args:
            loop_while: also make a device-side loop that runs while this int64 tensor's first entry is not 0.
        """
        if kind in self.refused:
            return None
        if not self.found:  # a pool does not outlive its last graph
            self.pool = torch.cuda.graph_pool_handle()
        own = {name: tensor.clone() for name, tensor in inputs.items()}
        looped = loop_while is not None
        try:
            graph, _ = capture(lambda: run(own), lambda: None, self.pool, self.device, looped, warm_ups=0)
        except CaptureError as error:
            self.refused.add(kind)
            self.pool = torch.cuda.graph_pool_handle()
            reason = (str(error).strip() or "no reason given").splitlines()[0]
            warnings.warn(f"{kind} can't be captured in a CUDA graph and runs eagerly, slower: {reason}", stacklevel=6)
            return None
        loop = None if loop_while is None else make_loop(graph, loop_while)
        self.found[key] = CapturedPass(graph, own, loop)
        while len(self.found) > MOST_GRAPHS:
            self.found.popitem(last=False)
        return self.found[key]


def mask_tensors(masks: Any) -> dict[str, Tensor]:
    """The tensors among the masks by kind of layer."""
    return {name: mask for name, mask in masks.items() if isinstance(mask, Tensor)} if isinstance(masks, dict) else {}


def masks_of(masks: Any, tensors: Inputs) -> Any:
    """The masks with these tensors in the places of their own."""
    return {name: tensors.get(name, mask) for name, mask in masks.items()} if isinstance(masks, dict) else masks


def signature(inputs: Inputs) -> Hashable:
    return tuple(sorted((name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in inputs.items()))
