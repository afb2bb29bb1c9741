"""DMax's soft parallel decoding as its code runs it, for one sequence: plain Python, float64, no code of the package.

The model is a function from input vectors to logits. Of the code's rules those are kept that do not depend on the batch
and cannot leave masks: a block is over only without masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.references import decoding_rules as rules

Vector = Sequence[float]
LogitsOf = Callable[[list[Vector]], Sequence[Sequence[float]]]


@dataclass
class Outcome:
    ids: list[int]
    passes: int = 0
    inputs: list[list[Vector]] = field(default_factory=list)  # of each pass


def soft_input(token: Vector, mask: Vector, p: float) -> list[float]:
    mixed = [p * a + (1 - p) * b for a, b in zip(token, mask)]
    size = p * math.hypot(*token) + (1 - p) * math.hypot(*mask)
    return [x * size / (math.hypot(*mixed) + 1e-6) for x in mixed]


def decode(
    logits_of: LogitsOf,
    embedding: Sequence[Vector],
    ids: Sequence[int],
    *,
    mask_id: int,
    block_length: int,
    threshold: float,
    confident: float,
    soft: bool,
) -> Outcome:
    """Decode one sequence in blocks that are counted from its first mask."""
    out = Outcome(list(ids))
    wanted = [token == mask_id for token in ids]
    for first in range(wanted.index(True), len(ids), block_length):
        block = range(first, min(first + block_length, len(ids)))
        if not any(wanted[i] for i in block):
            continue
        inputs: list[Vector] = [embedding[token] for token in out.ids]
        for number in range(1, block_length + 1):
            rows = [rules.row_statistics(row) for row in logits_of(inputs)]
            out.inputs.append(inputs)
            out.passes += 1
            masked = [token == mask_id and wanted[i] for i, token in enumerate(out.ids)]
            revealed = [wanted[i] and not masked[i] for i in range(len(ids))]
            updates = rules.soft_parallel(rows, masked, block, threshold)
            updates |= rules.revisions(rows, out.ids, revealed, block)
            for i, token in updates.items():
                out.ids[i] = token
            done = all(out.ids[i] != mask_id for i in block if wanted[i])
            sure = rules.is_settled(rows, wanted, block, confident)
            if done and (sure or not updates or number == block_length):
                break
            inputs = [embedding[token] for token in out.ids]
            for i in block:
                if soft and wanted[i] and out.ids[i] != mask_id:
                    inputs[i] = soft_input(embedding[out.ids[i]], embedding[mask_id], rows[i].probability)
    return out
