"""The loops of LLaDA, Fast-dLLM and Dream, for one text, greedily: plain Python around `decoding_rules`.

`logits_of` maps a list of ids to a list of logits for each position, those of the mask being -inf. They were written
down from the papers' code without sharing any with it or with the package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.references import decoding_rules as rules

LogitsOf = Callable[[list[int]], list[list[float]]]


def rows_of(logits: list[list[float]]) -> list[rules.Row]:
    return [rules.row_statistics(row) for row in logits]


def guided(logits_of: LogitsOf, ids: list[int], prompt: int, mask: int, scale: float) -> list[list[float]]:
    """Logits of the text, moved away from those of the text without its prompt."""
    logits = logits_of(ids)
    if scale == 0.0:
        return logits
    without = logits_of([mask] * prompt + ids[prompt:])
    return [
        [u if c == u else u + (scale + 1.0) * (c - u) for c, u in zip(with_it, without_it)]
        for with_it, without_it in zip(logits, without)
    ]


def in_blocks(
    logits_of: LogitsOf,
    prompt: list[int],
    mask: int,
    length: int,
    block_length: int,
    steps: int,
    choose: Callable[..., dict[int, int]],
    scale: float = 0.0,
) -> tuple[list[int], int]:
    """The text and its number of passes; ``choose(rows, masked, block, quota)`` says what is revealed at a step."""
    ids, passes = prompt + [mask] * length, 0
    for start in range(len(prompt), len(ids), block_length):
        block = range(start, start + block_length)
        quotas = rules.llada_quotas(block_length, steps // (length // block_length))
        while any(ids[i] == mask for i in block):
            rows = rows_of(guided(logits_of, ids, len(prompt), mask, scale))
            quota = quotas.pop(0) if quotas else 0
            passes += 1
            for i, token in choose(rows, [token == mask for token in ids], block, quota).items():
                ids[i] = token
    return ids, passes


def llada(rows: list[rules.Row], masked: list[bool], block: range, quota: int) -> dict[int, int]:
    return rules.top_probability(rows, masked, block, quota)


def dream(
    logits_of: LogitsOf, prompt: list[int], mask: int, length: int, steps: int, rule: str, eps: float
) -> list[list[int]]:
    """Dream's text after each step. `logits_of` gives logits in their places, not shifted."""
    ids, times, states = prompt + [mask] * length, torch.linspace(1, eps, steps + 1), []
    for step in range(steps):
        masked = [token == mask for token in ids]
        share = 1.0 - times[step + 1] / times[step]  # float32, as its rounding matters
        quota = sum(masked) if step == steps - 1 else int(torch.tensor(float(sum(masked))) * share)
        rows = rows_of(logits_of(ids))
        for i, token in getattr(rules, rule)(rows, masked, range(len(ids)), quota).items():
            ids[i] = token
        states.append(list(ids))
    return states


def paced_threshold(
    logits_of: LogitsOf, prompt: list[int], mask: int, length: int, steps: int, bound: float
) -> list[int]:
    """Fast-dLLM's ``confidence_threshold`` for Dream: what a step may reveal and does not is left to the next one."""
    ids, left_over, step = prompt + [mask] * length, 0, 0
    while mask in ids:
        allowed = left_over + (length // steps if step < steps else 0)
        rows = rows_of(logits_of(ids))
        order = rules.best({i: rows[i].probability for i, token in enumerate(ids) if token == mask}, allowed)
        sure = [i for number, i in enumerate(order) if number == 0 or rows[i].probability >= bound]
        for i in sure:
            ids[i] = rows[i].token
        left_over, step = allowed - len(sure), step + 1
    return ids


def logits_function(model: Any, words: int, mask: int, shifted: bool = False) -> LogitsOf:
    """`logits_of` of a model in float32."""

    def logits_of(ids: list[int]) -> list[list[float]]:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :, :words].clone()
        logits[:, mask] = -torch.inf
        rows: list[list[float]] = logits.tolist()
        return [rows[0], *rows[:-1]] if shifted else rows

    return logits_of
