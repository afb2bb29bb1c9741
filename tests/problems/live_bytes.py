"""Counts the bytes of tensors that exist at a time, without any memory for them: with fake tensors."""

# mypy: ignore-errors

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While it is entered: the bytes of the storages that operators have made and that are still in use."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, Any] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in given | self.known.keys():
                    self.add(storage)
        return output

    def add(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()

        def gone(_: Any) -> None:
            del self.known[key]
            self.now -= size

        self.known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


class Skipped:
    """Stands for a Triton kernel: launching it does nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None
