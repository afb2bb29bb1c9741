"""Improves a policy in use by an evolution strategy: small changes are kept by what they make of whole runs.

How good a filter is on single states does not tell how good the texts are that it writes: every position is tested in
every pass, and a wrong token early changes all that follows. An evolution strategy (Salimans et al., 1703.03864) needs
no more than the value of whole runs. Its changes come in pairs of opposite sign, and their values count by rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mdkern
from mdkern.decoders import Learned, Policy
from mdkern.evaluation.text import judge
from mdkern.files import write_whole
from mdkern.models import Denoiser


@dataclass(frozen=True)
class Strategy:
    rounds: int = 12
    pairs: int = 16
    deviation: float = 0.1  # of the changes; inputs are standardised
    rate: float = 0.3


def parameters_of(policy: Policy) -> Tensor:
    """Its weights and biases in one vector."""
    return torch.cat([tensor.flatten() for layer in policy.layers for tensor in layer])


def set_parameters(policy: Policy, vector: Tensor) -> None:
    """Change weights and biases in place, so that captured steps go on with the new ones."""
    tensors = [tensor for layer in policy.layers for tensor in layer]
    for tensor, values in zip(tensors, vector.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(values.view_as(tensor))


def utilities(values: Tensor) -> Tensor:
    """Ranks of ``values [n]``, evenly from -1/2 for the smallest to 1/2; equal values have equal ones."""
    less, equal = (values[:, None] > values).sum(1), (values[:, None] == values).sum(1)
    return (less + (equal - 1) / 2).double() / max(1, len(values) - 1) - 0.5


def improve(
    policy: Policy, value_of: Callable[[Policy], float], path: Path, seed: int = 0, strategy: Strategy | None = None
) -> list[dict[str, Any]]:
    """Improve a policy in place; it ends with the best parameters that a round began with, or that the last one gave.

    Args:
        value_of: the value of a policy, the larger the better, the same at every call.
        path: a file that is written whole after each round. If it is there, its rounds are not run again.

    Returns:
        Of each round and of the end, the parameters and their value.
    """
    s = strategy or Strategy()
    known = {"seed": seed, "strategy": vars(s)}
    history: list[dict[str, Any]] = []
    now = parameters_of(policy)
    if path.exists():
        found = json.loads(path.read_text())
        if {name: found.get(name) for name in known} != known or len(found["start"]) != len(now):
            raise ValueError(f"{path} is of another run: remove it, or give another --out")
        history, now = found["history"], torch.tensor(found["now"]).to(now)
        start = found["start"]
    else:
        start = now.tolist()
    while len(history) <= s.rounds:
        set_parameters(policy, now)
        history.append({"value": value_of(policy), "parameters": now.tolist()})
        if len(history) <= s.rounds:
            generator = torch.Generator().manual_seed(seed + 1_000_003 * len(history))
            changes = torch.randn(s.pairs, len(now), generator=generator).to(now)
            values = []
            for change in torch.cat((changes, -changes)):
                set_parameters(policy, now + s.deviation * change)
                values.append(value_of(policy))
            worth = utilities(torch.tensor(values)).to(now)
            now = now + s.rate * ((worth[: s.pairs] - worth[s.pairs :])[:, None] * changes).mean(0)
        write_whole(path, json.dumps(known | {"start": start, "now": now.tolist(), "history": history}) + "\n")
    best = max(history, key=lambda entry: entry["value"])
    set_parameters(policy, torch.tensor(best["parameters"]).to(now))
    return history


def value_in_use(
    denoiser: Denoiser, judging: Any, input_ids: Tensor, price: float, **options: Any
) -> Callable[[Policy], float]:
    """The value of a policy: a judge's log-likelihood per token of whole texts, less `price` times passes per token.

    Args:
        judging: a causal model of transformers with the denoiser's tokenizer.
        input_ids: int64 ``[N, L]``, with masks.
        options: further arguments of `mdkern.sample`, the seed among them.
    """
    written = int((input_ids == denoiser.mask_id).sum())

    def value(policy: Policy) -> float:
        decoder = Learned(policy, 0.5, fresh_noise=False)
        out = mdkern.sample(denoiser, input_ids=input_ids, decoder=decoder, progress=False, **options)
        assert out.sequences is not None
        assert out.nfe is not None
        passes = sum(int(count.sum()) for count in out.nfe.values())
        return -float(judge(judging, out.sequences).nats_per_token().mean()) - price * passes / written

    return value
