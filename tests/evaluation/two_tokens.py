"""Two binary tokens whose conditionals are given: every likelihood can be worked out by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from mdkern import Denoiser, adapt

MASK = 2
ALONE = {0: 0.6, 1: 0.3}  # p(x_i = 1) while both are masked
GIVEN = {(0, 0): 0.5, (0, 1): 0.9, (1, 0): 0.2, (1, 1): 0.7}  # p(x_i = 1) given the other one: (i, the other)
TEXTS = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
BOUND = [1.094628, 3.016143, 1.382310, 1.088417]  # mean over both orders of -log p, in nats
ORDER_10 = [1.049822, 3.506558, 1.049822, 1.309333]  # position 1 first, as by top probability: .7 > .6
BOTH_AT_ONCE = [1.272966, 2.120264, 0.867501, 1.714798]


def logits(input_ids: Tensor) -> Tensor:
    rows = []
    for ids in input_ids.tolist():
        ones = [ALONE[i] if ids[1 - i] == MASK else GIVEN[i, ids[1 - i]] for i in (0, 1)]
        rows.append([[1.0 - p, p] for p in ones])
    return torch.tensor(rows).log()


def denoiser() -> Denoiser:
    return adapt(logits, vocab_size=2, mask_id=MASK)
