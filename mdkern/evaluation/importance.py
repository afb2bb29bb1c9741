"""At which times the heavy model is needed: how far the light one is from it, over the diffusion time t.

There are three measures, two of Sedykh et al. (2604.02340) and one of the sampler itself, each with its standard error:

- *loss difference* (eq. 6): ``E |L_light(z_t) - L_heavy(z_t)|`` on the same corrupted texts, where L is the mean
  cross-entropy of the masked tokens of a text;
- *KL* (eq. 7): the mean over masked positions of KL(heavy || light), minus the KL between two heavy models of different
  seeds if there is a second one;
- *path KL*: KL(heavy || light) along texts that the heavy model samples, at the positions that each step reveals.
  By the chain rule, its sum over the steps of a segment is the KL divergence, over whole reveal paths, between the
  heavy sampler and the one that runs the light model in that segment.

All use the fused `divergence` operator, which needs no memory of rows x vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mdkern.decoders import Ancestral
from mdkern.engine.resolve import check_count
from mdkern.engine.resolve_models import resolve_models
from mdkern.evaluation.intervals import Estimate, estimate
from mdkern.evaluation.kept import Kept
from mdkern.evaluation.likelihood import DEFAULT_BATCH_SIZE, Texts, resolve_texts
from mdkern.evaluation.scores import masked_hidden, rounded_once, sum_by_text, target_log_prob
from mdkern.kernels import divergence, noise
from mdkern.models import Denoiser
from mdkern.sampling import sample
from mdkern.schedule import Schedule, check_segments

__all__ = ["ImportanceAt", "PathImportanceAt", "importance", "path_importance"]


@dataclass(frozen=True)
class ImportanceAt:
    """The measures at one diffusion time, in nats a masked token."""

    t: float
    heavy_loss: Estimate
    light_loss: Estimate
    loss_difference: Estimate  # eq. 6
    kl: Estimate  # KL(heavy || light)
    baseline_kl: Estimate | None = None  # KL(heavy || another heavy)

    @property
    def relative_kl(self) -> float:
        """Eq. 7: the KL minus that of the baseline pair."""
        return self.kl.mean - (self.baseline_kl.mean if self.baseline_kl is not None else 0.0)

    @classmethod
    def read(cls, entry: dict[str, Any]) -> ImportanceAt:
        """From ``dataclasses.asdict`` of one."""
        return cls(**with_estimates(entry))


@dataclass(frozen=True)
class PathImportanceAt:
    """The path KL of a run of steps, in nats a text."""

    first: int
    stop: int
    revealed_kl: Estimate  # sum over the positions revealed in these steps (the closing pass is greedy: not counted)
    masked_kl: Estimate  # mean over all positions masked at the first of these steps

    @classmethod
    def read(cls, entry: dict[str, Any]) -> PathImportanceAt:
        """From ``dataclasses.asdict`` of one."""
        return cls(**with_estimates(entry))


def with_estimates(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: Estimate(**value) if isinstance(value, dict) else value for name, value in entry.items()}


def importance(
    heavy: Any,
    light: Any,
    *,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    baseline: Any = None,
    times: Sequence[float] | int = 20,
    batch_size: int = DEFAULT_BATCH_SIZE,
    seed: int | None = 0,
    progress: bool | None = None,
    kept: Kept | None = None,
) -> list[ImportanceAt]:
    """Loss difference and KL between two models over the diffusion time, on the same corrupted texts.

    Args:
        heavy, light: as for `mdkern.sample`.
        input_ids: int64 ``[N, L]``, whole texts; the paper takes 500.
        attention_mask: ``[N, L]`` of 0 and 1, 0 at padding.
        baseline: a second heavy model, trained with another seed, for the KL between two equally good models.
        times: diffusion times in (0, 1], which are the shares that are masked; a number n means ``(i + 1/2) / n``.
        batch_size: texts in a forward pass.
        seed: keys the masks, together with the number of the text, the number of the time and the position.
        progress: show a progress bar; None: only on a terminal.
        kept: a file for the results, of these arguments alone; what it has is not measured again.

    Raises:
        ValueError, TypeError: arguments that do not fit, before any forward pass.
    """
    models = {"H": heavy, "L": light} | ({} if baseline is None else {"B": baseline})
    denoisers, _ = resolve_models(models, None, Schedule.from_segments(list(models)))
    texts = resolve_texts(denoisers, input_ids, None, attention_mask, seed, None)
    grid = resolve_times(times)
    batch_size = check_count("batch_size", batch_size)
    denoisers = rounded_once(denoisers, batch_size * input_ids.shape[1])
    found = []
    with torch.no_grad(), tqdm(grid, desc="importance", disable=None if progress is None else not progress) as bar:
        for number, t in enumerate(bar):
            known = None if kept is None else kept.get(f"time {number}")
            at = at_time(denoisers, texts, number, t, batch_size) if known is None else ImportanceAt.read(known)
            if kept is not None and known is None:
                kept.put(f"time {number}", asdict(at))
            found.append(at)
    return found


def at_time(denoisers: dict[str, Denoiser], texts: Texts, number: int, t: float, batch_size: int) -> ImportanceAt:
    """The comparison at one time, which is the `number`-th."""
    columns: list[dict[str, Tensor]] = []
    for text in torch.arange(len(texts.input_ids), device=texts.input_ids.device).split(batch_size):
        masked = bernoulli_mask(texts.seed, texts.sample_ids[text], texts.position[text], number, t)
        masked &= texts.wanted[text]
        attended = None if texts.attention_mask is None else texts.attention_mask[text]
        columns.append(compare(denoisers, texts.input_ids[text], masked, attended, t))
    whole = {name: torch.cat([part[name] for part in columns]) for name in columns[0]}
    whole = {name: values[values.isfinite()] for name, values in whole.items()}  # texts with nothing masked
    if not len(whole["kl"]):
        raise ValueError(f"times={t} masks nothing in any text: give a larger time or more texts")
    difference = estimate((whole["L"] - whole["H"]).abs())
    at = ImportanceAt(t, estimate(whole["H"]), estimate(whole["L"]), difference, estimate(whole["kl"]))
    return replace(at, baseline_kl=estimate(whole["baseline"])) if "baseline" in whole else at


def resolve_times(times: Sequence[float] | int) -> list[float]:
    if isinstance(times, int):
        count = check_count("times", times)
        return [(index + 0.5) / count for index in range(count)]
    grid = [float(t) for t in times]
    if not grid or not all(0.0 < t <= 1.0 for t in grid):
        raise ValueError(f"times must lie in (0, 1], at least one: {times}")
    return grid


def bernoulli_mask(seed: Tensor, sample: Tensor, position: Tensor, number: int, t: float) -> Tensor:
    """bool ``[B, L]``: each position masked with probability t, keyed by (seed, sample, position, number)."""
    zero = torch.zeros_like(position)
    bits = noise.random_bits(seed, sample[:, None], position, zero + number, zero, noise.MASK_PLACE)
    return noise.uniform(*bits) < t


def compare(
    denoisers: dict[str, Denoiser], ids: Tensor, masked: Tensor, attention_mask: Tensor | None, t: float
) -> dict[str, Tensor]:
    """Means over the masked positions of each text, float64 ``[B]``: the losses by name, ``kl`` and ``baseline``.

    They are NaN for texts with nothing masked.
    """
    row = masked.flatten().nonzero()[:, 0]
    true, at = ids.flatten()[row], torch.full((len(ids),), t, device=ids.device)
    hidden = {name: masked_hidden(model, ids, masked, at, attention_mask) for name, model in denoisers.items()}
    values = {name: -target_log_prob(model.head, hidden[name], row, true) for name, model in denoisers.items()}
    for key, name in (("kl", "L"), ("baseline", "B")):
        if name in denoisers:
            values[key] = row_kl(denoisers["H"], hidden["H"], denoisers[name], hidden[name], row)
    return {name: sum_by_text(of_rows, row, ids) / masked.sum(-1) for name, of_rows in values.items()}


def row_kl(heavy: Denoiser, hidden: Tensor, light: Denoiser, light_hidden: Tensor, row: Tensor) -> Tensor:
    """KL(heavy || light) at rows of hidden states ``[N, D]``, float32 ``[M]``."""
    p, q = heavy.head, light.head
    return divergence(
        hidden,
        p.weight,
        p.bias,
        light_hidden,
        q.weight,
        q.bias,
        row,
        scale=p.scale,
        soft_cap=p.soft_cap,
        weight_scale=p.weight_scale,
        other_scale=q.scale,
        other_soft_cap=q.soft_cap,
        other_weight_scale=q.weight_scale,
    ).kl


def path_importance(
    heavy: Any,
    light: Any,
    *,
    num_samples: int = 64,
    length: int | None = None,
    steps: int | None = None,
    segments: int = 10,
    batch_size: int = DEFAULT_BATCH_SIZE,
    seed: int | None = 0,
    progress: bool | None = None,
    kept: Kept | None = None,
) -> list[PathImportanceAt]:
    """KL(heavy || light) along the heavy model's own ancestral samples, by segments of the steps.

    The paths are those of ``sample(heavy, num_samples=..., seed=...)``. A finished sample, with the step at which each
    position was revealed, determines every state that it passed through. Both models run a pass for each state in which
    something is revealed.

    Args:
        heavy, light, num_samples, length, steps, seed, progress: as for `mdkern.sample`.
        segments: number of equal parts of the steps, each of which gives one entry of the result.
        batch_size: states in a forward pass.
        kept: as of `importance`.
    """
    denoisers, _ = resolve_models({"H": heavy, "L": light}, None, Schedule.from_segments(["H", "L"]))
    segments, batch_size = check_count("segments", segments), check_count("batch_size", batch_size)
    longest = denoisers["H"].max_length if length is None else length
    check_segments(segments, longest if steps is None else steps)
    known = [None if kept is None else kept.get(f"segment {number}") for number in range(segments)]
    if all(known):
        return [PathImportanceAt.read(entry) for entry in known if entry]
    out = sample(
        denoisers["H"],
        num_samples=num_samples,
        length=length,
        steps=steps,
        seed=seed,
        return_history=True,
        progress=progress,
    )
    assert out.sequences is not None
    assert out.history is not None
    ids, step, total = out.sequences, out.history.step, out.history.steps
    edges = [round(total * index / segments) for index in range(segments + 1)]
    times = Ancestral().times(total).to(ids.device)
    p, q = rounded_once(denoisers, batch_size * ids.shape[1]).values()
    found = []
    with torch.no_grad(), tqdm(range(segments), desc="path", disable=None if progress is None else not progress) as bar:
        for number in bar:
            if (entry := known[number]) is not None:
                found.append(PathImportanceAt.read(entry))
                continue
            first, stop = edges[number], edges[number + 1]
            revealed = path_kl(p, q, ids, step, first, stop, times, batch_size)
            masked = masked_kl(p, q, ids, step, first, times, batch_size)
            found.append(PathImportanceAt(first, stop, estimate(revealed), estimate(masked)))
            if kept is not None:
                kept.put(f"segment {number}", asdict(found[-1]))
    return found


def path_kl(
    p: Denoiser, q: Denoiser, ids: Tensor, step: Tensor, first: int, stop: int, times: Tensor, batch_size: int
) -> Tensor:
    """KL(p || q) summed over the positions revealed at steps ``first <= i < stop``, float64 ``[N]``."""
    owner, column = ((step >= first) & (step < stop)).nonzero(as_tuple=True)
    events = torch.stack((owner, step[owner, column]), 1).unique(dim=0)
    kl = torch.zeros(len(ids), dtype=torch.float64, device=ids.device)
    for text, at in (part.unbind(1) for part in events.split(batch_size)):
        masked, revealed = step[text] >= at[:, None], step[text] == at[:, None]
        kl.index_add_(0, text, state_kl(p, q, ids[text], masked, revealed, times[at]))
    return kl


def masked_kl(p: Denoiser, q: Denoiser, ids: Tensor, step: Tensor, at: int, times: Tensor, batch_size: int) -> Tensor:
    """Mean over the positions still masked at step `at` of KL(p || q), float64; texts that have none are left out."""
    means = []
    for text in (step >= at).any(-1).nonzero()[:, 0].split(batch_size):
        masked = step[text] >= at
        means.append(state_kl(p, q, ids[text], masked, masked, times[at].expand(len(text))) / masked.sum(-1))
    return torch.cat(means)


def state_kl(p: Denoiser, q: Denoiser, ids: Tensor, masked: Tensor, rows: Tensor, t: Tensor) -> Tensor:
    """KL(p || q) summed over the True entries of ``rows [B, L]``, float64 ``[B]``, of texts with `masked` masked."""
    row = rows.flatten().nonzero()[:, 0]
    hidden, other = (masked_hidden(model, ids, masked, t) for model in (p, q))
    return sum_by_text(row_kl(p, hidden, q, other, row), row, ids)
