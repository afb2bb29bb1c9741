"""Runs many schedules on the same seeds. Schedules that begin with the same models share those passes.

With a planned decoder, when a position is revealed does not depend on the models, so the state after some segments
is the same for every schedule that begins with them. Schedules are run in lexicographic order, depth first, and the
state after each segment is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mdkern.decoders import Planned
from mdkern.engine import planned
from mdkern.engine.failures import has_failed
from mdkern.engine.graphs import lease
from mdkern.engine.groups import device_of, prepared
from mdkern.engine.hooks import Drafts
from mdkern.engine.resolve import resolve
from mdkern.engine.state import SamplerState
from mdkern.schedule import Schedule

Models = tuple[str, ...]  # the model of each of the equal segments


def run_schedules(
    models: Mapping[str, Any], schedules: Sequence[Models], *, cuda_graphs: bool = True, **arguments: Any
) -> Iterator[tuple[Models, Tensor]]:
    """Samples of every schedule, the same as ``sample(models, Schedule.from_segments(...), ...)`` gives.

    Args:
        models: by name, as for `sample`.
        schedules: the names of the models of equal segments, each with the same number of segments.
        arguments: as for `sample`, except `stop_at_eos`, stopping criteria and streamers, which are refused.

    Yields:
        A schedule and its samples, int64 ``[N, L]``, in lexicographic order.

    Raises:
        ValueError: schedules of different lengths; a decoder that looks at the model, whose states depend on it.
    """
    if len({len(schedule) for schedule in schedules}) > 1:
        raise ValueError("schedules must have the same number of segments")
    refused = {"stop_at_eos", "stopping_criteria", "streamer", "return_history", "batch_invariant"} & arguments.keys()
    if refused:
        raise ValueError(f"{refused.pop()} is not for runs of many schedules: call sample for one")
    if not schedules:
        return
    used = list(dict.fromkeys(name for schedule in schedules for name in schedule))
    request = resolve({name: models[name] for name in used}, Schedule.from_segments(used), **arguments)
    if not isinstance(request.decoder, Planned):
        raise ValueError(f"{type(request.decoder).__name__} looks at the model, so schedules share no states")
    count, segments = len(request.input_ids), len(schedules[0])
    with device_of(request), torch.no_grad():
        request = prepared(request, count)
        graphed = cuda_graphs and request.device.type == "cuda" and request.logits_processor is None
        with lease(request, count) if graphed else nullcontext() as workspace, tqdm(disable=True) as bar:
            state = SamplerState.of(request) if workspace is None else workspace.state
            drafts = Drafts(None, request.input_ids, ~request.masked, request.attention_mask)
            plan = planned.draw_plan(request, state)
            steps = request.steps[:, None]
            # Rounded as a schedule of shares rounds its edges; the closing pass belongs to the last segment.
            edges = [(2 * steps * part + segments) // (2 * segments) for part in range(segments)] + [steps + 1]
            kept, done = [state.input_ids[:count].clone()], Models()
            for schedule in sorted(schedules):
                shared = alike(schedule, done)
                del kept[shared + 1 :]
                state.input_ids[:count] = kept[-1]
                for part, name in enumerate(schedule[shared:], shared):
                    span = edges[part], edges[part + 1]
                    planned.run_steps(request, request.denoisers[name], state, plan, *span, workspace, bar, drafts)
                    if has_failed(state):
                        raise FloatingPointError(f"model {name} gave NaN or infinite logits in {' '.join(schedule)}")
                    kept.append(state.input_ids[:count].clone())
                done = schedule
                yield schedule, kept[-1].clone()


def alike(one: Models, other: Models) -> int:
    """Number of segments at the beginning in which two schedules agree."""
    return next((part for part, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def share_of_passes(schedules: Sequence[Models]) -> float:
    """Number of segments that are run, divided by their number if each schedule were run by itself."""
    done, run, total = Models(), 0, 0
    for schedule in sorted(schedules):
        run += len(schedule) - alike(schedule, done)
        total += len(schedule)
        done = schedule
    return run / total
