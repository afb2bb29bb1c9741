"""`select`: choose the positions of each sequence that are revealed now and write their tokens, in one launch.

This file has the contract and the reference in plain PyTorch; `triton_select` is the GPU kernel.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from mdkern.kernels import noise
from mdkern.kernels.checks import check_tensor, check_written
from mdkern.kernels.loop.grid import fixed_bound, fixed_point, steps_below_best
from mdkern.kernels.operator import operator

Rule = Literal["top_k", "threshold", "factor", "entropy_bound"]
RULES: tuple[str, ...] = get_args(Rule)


def select_reference(
    scores: Tensor,
    candidates: Tensor,
    tokens: Tensor,
    input_ids: Tensor,
    quota: Tensor | None,
    seed: Tensor | None,
    keys: Tensor | None,
    rule: str,
    bound: float,
    temperature: float,
) -> Tensor:
    """`select` in plain PyTorch, by sorting."""
    able = candidates & (tokens >= 0)
    worth = (-scores if rule == "entropy_bound" else scores).nan_to_num(
        nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf
    )
    if temperature > 0.0:
        assert seed is not None
        assert keys is not None
        sample, position, step = keys.unbind(-1)
        worth = worth / temperature + noise.gumbel(
            seed, sample, position, step, torch.zeros_like(sample), noise.POSITION
        )
    if worth.numel():
        worth = steps_below_best(worth, able)
    # Best first; among equals the lower index first; entries that may not be chosen last.
    order = worth.argsort(dim=-1, descending=True, stable=True)
    able_first = able.gather(-1, order)
    behind = able.sum(-1, keepdim=True) + (~able_first).cumsum(-1)
    rank_of_sorted = torch.where(able_first, able_first.cumsum(-1), behind) - 1
    rank = torch.empty_like(order).scatter_(-1, order, rank_of_sorted)
    order = torch.empty_like(order).scatter_(-1, rank_of_sorted, order)
    best_first = worth.gather(-1, order)
    place = torch.arange(1, scores.shape[1] + 1, device=scores.device)
    if rule == "top_k":
        assert quota is not None
        chosen = rank < quota[:, None]
    elif rule == "threshold":
        chosen = (scores >= bound) | (rank == 0)
    elif rule == "factor":
        passes = (place + 1) * (1.0 - best_first) < bound
        chosen = (rank < passes.int().cumprod(-1).sum(-1, keepdim=True)) | (rank == 0)
    else:
        entropy = fixed_point(-best_first)
        passes = entropy.cumsum(-1) - entropy <= fixed_bound(bound)
        chosen = (rank < passes.int().cumprod(-1).sum(-1, keepdim=True)) | (rank == 0)
    chosen &= able
    row, entry = chosen.nonzero(as_tuple=True)
    input_ids[row, entry] = tokens[row, entry]
    return chosen


def select_fake(scores: Tensor, *_: object) -> Tensor:
    return torch.empty(scores.shape, dtype=torch.bool, device=scores.device)


select_operator = operator(
    select_reference, select_fake, "mdkern.kernels.loop.triton_select:select", mutates=("input_ids",), name="select"
)


def select(
    scores: Tensor,  # [B, R]
    candidates: Tensor,  # [B, R]
    tokens: Tensor,  # [B, R]
    input_ids: Tensor,  # [B, L]
    rule: Rule,
    *,
    quota: Tensor | None = None,  # [B]
    bound: float = 0.0,
    temperature: float = 0.0,
    seed: Tensor | None = None,  # []
    keys: Tensor | None = None,  # [B, R, 3]
) -> Tensor:
    """Choose positions by their scores and reveal them: ``input_ids[b, r] = tokens[b, r]``.

    The rules, for the scores c of a sequence in descending order (of equal ones the lower r first):

    - ``top_k``: the `quota` best.
    - ``threshold``: all with ``c >= bound``, and always the best.
    - ``factor``: the longest prefix whose n-th score, counted from 1, has ``(n + 1) * (1 - c) < bound``, and always the
      best. Scores are probabilities. Fast-dLLM, Wu et al., 2505.22618.
    - ``entropy_bound``: scores are entropies in nats, and smaller is better: the longest prefix, ascending, with
      ``sum - largest <= bound``, and always the best. Sums are exact, of multiples of 2^-32. Ben-Hamu et al.,
      2505.24857.

    Scores that differ by rounding errors alone count as equal: they are first rounded to the grid of
    `mdkern.kernels.loop.grid.steps_below_best`. Only ``c >= bound`` compares the scores as they are.

    Args:
        scores: float32 ``[B, R]``. NaN counts as the worst.
        candidates: bool ``[B, R]``: which entries may be chosen. An entry with a negative token is never chosen.
        tokens: int64 ``[B, R]``.
        input_ids: int64 ``[B, L]``, L at least R, contiguous, written in place.
        rule: ``"top_k"``, ``"threshold"``, ``"factor"`` or ``"entropy_bound"``.
        bound: the parameter of the last three.
        quota: int32 or int64 ``[B]``, for ``top_k``; below 0 counts as 0.
        temperature: with ``top_k``, draw the positions without replacement from ``softmax(scores / temperature)``.
        seed, keys: int64 scalar and int64 ``[B, R, 3]`` (sample, position, step), for a `temperature` above 0.

    Returns:
        bool ``[B, R]``: the entries revealed.

    Raises:
        ValueError: a rule, shape, dtype, device or number that does not fit; on a GPU, a sequence of more than 65,535
            entries.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, not {rule!r}")
    if scores.ndim != 2 or input_ids.ndim != 2 or input_ids.shape[1] < scores.shape[1]:
        raise ValueError(
            f"scores and input_ids must be [B, R] and [B, L] with L at least R, not {list(scores.shape)} and "
            f"{list(input_ids.shape)}"
        )
    rows, entries = scores.shape
    check_tensor("scores", scores, (rows, entries), torch.float32, scores.device)
    check_tensor("candidates", candidates, (rows, entries), torch.bool, scores.device)
    check_tensor("tokens", tokens, (rows, entries), torch.int64, scores.device)
    check_tensor("input_ids", input_ids, (rows, input_ids.shape[1]), torch.int64, scores.device)
    check_written("input_ids", input_ids)
    check_tensor("quota", quota, (rows,), (torch.int64, torch.int32), scores.device)
    check_tensor("seed", seed, (), torch.int64, scores.device)
    check_tensor("keys", keys, (rows, entries, 3), torch.int64, scores.device)
    if (quota is None) == (rule == "top_k"):
        raise ValueError("quota goes with rule='top_k', and only with it")
    if math.isnan(bound):
        raise ValueError("bound must be a number, not NaN")
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a finite number of at least 0, not {temperature}")
    if temperature > 0.0 and (rule != "top_k" or seed is None or keys is None):
        raise ValueError("a temperature above 0 needs rule='top_k', seed and keys")
    revealed: Tensor = select_operator(
        scores, candidates, tokens, input_ids, quota, seed, keys, rule, float(bound), float(temperature)
    )
    return revealed
