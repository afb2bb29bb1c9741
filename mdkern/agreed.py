"""Resolves a call of `sample`; if its output layers are divided over processes, together with the other processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mdkern.digest import digest
from mdkern.distributed import request_digests
from mdkern.engine.request import Request
from mdkern.engine.resolve import resolve
from mdkern.models.sharded import ShardedDenoiser, sharded_over
from mdkern.ranks import check_equal


def resolve_agreed(heavy: Any, light: Any, schedule: Any, **arguments: Any) -> Request:
    """`resolve`, or, with divided output layers, the same on all processes and with rank 0's seed.

    Raises:
        ValueError: as `resolve`; the call differs between the processes, and the message names where and in what.
        An error on one process is raised on all.
    """
    models = list(heavy.values()) if isinstance(heavy, Mapping) else [heavy, light]
    shard = sharded_over(model for model in models if isinstance(model, ShardedDenoiser))
    if shard is None:
        return resolve(heavy, light, schedule, **arguments)
    with shard.ranks.together():
        request = resolve(heavy, light, schedule, **arguments)
        facts = request_digests(request, models=False) | {"seed": digest(arguments.get("seed"))}
    calls = shard.ranks.gather((facts, request.seed))
    check_equal([theirs for theirs, _ in calls])
    return replace(request, seed=calls[0][1])
