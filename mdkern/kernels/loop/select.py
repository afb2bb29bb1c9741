"""`select`: which candidate positions of each sequence are revealed now, and their tokens written, in one launch.

The contract, and the operator in plain PyTorch; `triton_select` runs it on a GPU.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mdkern.kernels import noise
from mdkern.kernels.device import has_triton
from mdkern.kernels.loop.fixed_point import fixed_bound, fixed_point

Rule = Literal["top_k", "threshold", "factor", "entropy_bound"]
RULES: tuple[str, ...] = get_args(Rule)


def select_reference(
    scores: Tensor,
    candidates: Tensor,
    tokens: Tensor,
    input_ids: Tensor,
    masked: Tensor | None,
    remaining: Tensor | None,
    positions: Tensor | None,
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
    # Best first, the lower index first among equals, those that may not be chosen last.
    order = worth.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, able.gather(-1, order).int().argsort(dim=-1, descending=True, stable=True))
    rank = order.argsort(dim=-1)
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
    column = entry if positions is None else positions[row, entry].long()
    input_ids[row, column] = tokens[row, entry]
    if masked is not None:
        masked[row, column] = False
    if remaining is not None:
        remaining -= chosen.sum(-1)
    return chosen


@torch.library.custom_op("mdkern::select", mutates_args=("input_ids", "masked", "remaining"))
def _select(
    scores: Tensor,
    candidates: Tensor,
    tokens: Tensor,
    input_ids: Tensor,
    masked: Tensor | None,
    remaining: Tensor | None,
    positions: Tensor | None,
    quota: Tensor | None,
    seed: Tensor | None,
    keys: Tensor | None,
    rule: str,
    bound: float,
    temperature: float,
) -> Tensor:
    return select_reference(
        scores,
        candidates,
        tokens,
        input_ids,
        masked,
        remaining,
        positions,
        quota,
        seed,
        keys,
        rule,
        bound,
        temperature,
    )


@_select.register_kernel("cuda")
def _on_gpu(scores: Tensor, *arguments: Any) -> Tensor:
    if not has_triton(scores.device):
        return select_reference(scores, *arguments)
    from mdkern.kernels.loop import triton_select  # imports Triton, which is no business of a machine without a GPU

    return triton_select.select(scores, *arguments)


@_select.register_fake
def _fake(
    scores: Tensor,
    candidates: Tensor,
    tokens: Tensor,
    input_ids: Tensor,
    masked: Tensor | None,
    remaining: Tensor | None,
    positions: Tensor | None,
    quota: Tensor | None,
    seed: Tensor | None,
    keys: Tensor | None,
    rule: str,
    bound: float,
    temperature: float,
) -> Tensor:
    return torch.empty(scores.shape, dtype=torch.bool, device=scores.device)


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
    positions: Tensor | None = None,  # [B, R]
    masked: Tensor | None = None,  # [B, L]
    remaining: Tensor | None = None,  # [B]
) -> Tensor:
    """Choose positions by their scores and reveal them: ``input_ids[b, positions[b, r]] = tokens[b, r]``.

    Rules, of a sequence with scores c in descending order (ties: the lower r first), `bound` being their parameter:

    - ``top_k``: the `quota` best.
    - ``threshold``: all with ``c >= bound``, at least the best.
    - ``factor``: the longest prefix in which the n-th (from 1) has ``(n + 1) * (1 - c) < bound``, at least the best.
      Scores are probabilities. Fast-dLLM, Wu et al., 2505.22618.
    - ``entropy_bound``: scores are entropies in nats, the smaller the better: the longest prefix, ascending, with
      ``sum - largest <= bound``, at least the best. Sums are exact, of multiples of 2^-32. Ben-Hamu et al., 2505.24857.

    Args:
        scores: float32 ``[B, R]``. NaN counts as the worst.
        candidates: bool ``[B, R]``: which entries may be chosen. One whose token is negative never is.
        tokens: int64 ``[B, R]``.
        input_ids: int64 ``[B, L]``, written in place.
        rule, bound: see above.
        quota: int32 or int64 ``[B]``, for ``top_k``; at least 0.
        temperature: with ``top_k``, draw the positions without replacement from ``softmax(scores / temperature)``.
        seed, keys: int64 scalar and int64 ``[B, R, 3]`` (sample, position, step), for a `temperature` above 0.
        positions: int32 or int64 ``[B, R]``, column of each entry in `input_ids`. None: r itself.
        masked: bool ``[B, L]``, set to False in place where revealed.
        remaining: int64 ``[B]``, lessened in place by the number revealed.

    Returns:
        bool ``[B, R]``: the entries revealed.

    Raises:
        ValueError: a rule, shape or dtype that does not fit; on a GPU, more than 65,535 entries a sequence.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, not {rule!r}")
    shape = tuple(scores.shape)
    if scores.ndim != 2 or scores.dtype != torch.float32:
        raise ValueError(f"scores must be float32 [B, R], not {scores.dtype} {shape}")
    expected = {
        "candidates": (candidates, shape, (torch.bool,)),
        "tokens": (tokens, shape, (torch.int64,)),
        "input_ids": (input_ids, (shape[0], input_ids.shape[-1]), (torch.int64,)),
        "quota": (quota, shape[:1], (torch.int32, torch.int64)),
        "positions": (positions, shape, (torch.int32, torch.int64)),
        "keys": (keys, (*shape, 3), (torch.int64,)),
        "masked": (masked, tuple(input_ids.shape), (torch.bool,)),
        "remaining": (remaining, shape[:1], (torch.int64,)),
    }
    for name, (tensor, wanted, dtypes) in expected.items():
        if tensor is not None and (tuple(tensor.shape) != wanted or tensor.dtype not in dtypes):
            raise ValueError(f"{name} must be {dtypes[0]} {list(wanted)}, not {tensor.dtype} {list(tensor.shape)}")
    if (quota is None) == (rule == "top_k"):
        raise ValueError("quota goes with rule='top_k', and only with it")
    if temperature < 0.0 or (temperature > 0.0 and (rule != "top_k" or seed is None or keys is None)):
        raise ValueError("a temperature above 0 needs rule='top_k', seed and keys")
    return _select(
        scores,
        candidates,
        tokens,
        input_ids,
        masked,
        remaining,
        positions,
        quota,
        seed,
        keys,
        rule,
        float(bound),
        float(temperature),
    )
