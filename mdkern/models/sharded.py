"""`shard_head`: a denoiser whose output layer is divided over the processes of a `torch.distributed` group.

Every process runs the whole backbone on the same sequences, and the output layer for its part of the vocabulary only.
Of the results, each row's maximum, sums and candidate for the token are exchanged, 32 bytes a row and process
(`mdkern.kernels.head.sharded`), so all processes reveal the same tokens, and they are the ones that one GPU reveals.

    torchrun --nproc-per-node 4 script.py

with, in ``script.py``::

    torch.distributed.init_process_group("nccl")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    denoiser = mdkern.shard_head(model)  # the same model on every rank, each on its own GPU
    out = mdkern.sample(denoiser, num_samples=16, seed=0)  # the same call on every rank, the same samples on every rank
    mdkern.graphs.clear()  # before the group is destroyed: graphs that were captured use it
    torch.distributed.destroy_process_group()
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from mdkern.digest import model_digest
from mdkern.kernels.head.sharded import shard_of
from mdkern.models.adapters import adapt
from mdkern.models.around import AroundDenoiser
from mdkern.models.denoiser import Denoiser, Head, Live
from mdkern.models.shard import Shard
from mdkern.ranks import Ranks, check_equal


class ShardedDenoiser(AroundDenoiser):
    """A denoiser with the output layer of another one's head only in part."""

    def __init__(self, inner: Denoiser, shard: Shard) -> None:
        super().__init__(inner)
        self.shard = shard
        self.description = f"{inner.description}, its vocabulary divided over {shard.count} processes"

    @Live
    def head(self) -> Head:
        """The whole bias, and the weight's rows of this process's ids."""
        whole, part = self.inner.head, slice(self.shard.first, self.shard.stop)
        assert whole.weight is not None
        weight_scale = None if whole.weight_scale is None else whole.weight_scale[part]
        return replace(whole, weight=whole.weight[part], weight_scale=weight_scale, shard=self.shard)

    def mark(self) -> Hashable:
        return id(self.shard)


def shard_head(model: Any, group: Any = None) -> ShardedDenoiser:
    """Divide a model's output layer over processes, so that each computes the logits of its part of the vocabulary.

    Call it on every process of the group, with the same model on the process's own device; then call `mdkern.sample` or
    `mdkern.sample_groups` with its result on every one of them, with the same arguments. All of them return the same
    samples: those of one process, except where two ids' scores are as close as float32 rounds them.

    Decoders of all kinds, blocks, caches, guidance, CUDA graphs (with NCCL) and every temperature are available.
    Refused are `top_k`, `top_p` and `min_p`, as where they cut is found by a search through all logits of a row, which
    no process has; and logits processors, which want all logits.

    Args:
        model: a model that `mdkern.adapt` takes and can split, or a `Denoiser`.
        group: a `torch.distributed` group, of NCCL for GPUs. None: the default group.

    Raises:
        RuntimeError: there is no process group.
        ValueError: the model has no output layer of its own (it runs by its logits); the group can't exchange tensors
            of its device; or the models differ between the processes, in which case the message says where.
    """
    denoiser = adapt(model)
    if isinstance(denoiser, ShardedDenoiser):
        raise ValueError("the model's output layer is divided already: give shard_head the model itself")
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("shard_head needs torch.distributed.init_process_group() to be called first")
    ranks = Ranks(group=group, what="shard_head")
    group = dist.group.WORLD if group is None else group
    with ranks.together():
        head = denoiser.head
        if head.weight is None:
            raise ValueError(
                f"{denoiser.name} {denoiser.description}: shard_head needs an output layer that can be divided"
            )
        if head.weight.is_cuda and str(dist.get_backend(group)) == "gloo":
            raise ValueError("shard_head needs a group of NCCL for a model on a GPU, not of gloo")
        facts = {"model": model_digest(denoiser), "device": denoiser.device.type}
    check_equal(ranks.gather(facts))
    shard = Shard(*shard_of(head.padded_vocab_size, ranks.rank, ranks.count), group, ranks)
    with torch.cuda.device(denoiser.device) if denoiser.device.type == "cuda" else torch.no_grad():
        shard.gather(torch.zeros(1, device=denoiser.device))  # connects the GPUs, which can't be done in a CUDA graph
    return ShardedDenoiser(denoiser, shard)


def sharded_over(denoisers: Iterable[Any]) -> Shard | None:
    """The shard of those whose output layer is divided, or None.

    Raises:
        ValueError: it is divided in some and not in others, or over other processes.
    """
    shards = [denoiser.shard if isinstance(denoiser, ShardedDenoiser) else None for denoiser in denoisers]
    groups = {None if shard is None else shard.group for shard in shards}
    if len(groups) > 1:
        raise ValueError("models of one call must all be divided over the same processes: shard_head each of them")
    return next((shard for shard in shards if shard is not None), None)


def refuse_sharded(denoisers: Iterable[Any], what: str) -> None:
    """Refuse divided output layers for `what`, which can't use them."""
    if any(isinstance(denoiser, ShardedDenoiser) for denoiser in denoisers):
        raise ValueError(f"{what} needs a whole output layer: give it the model itself, not the result of shard_head")
