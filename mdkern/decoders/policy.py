"""Small networks that score the masked positions of a block by what the model says of them, and their files.

The inputs are row statistics (Learn2PD, 2509.25188, has the confidences alone) and what they are among: the block's
other positions. `python -m training.policy` trains them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from mdkern.decoders.base import Proposal
from mdkern.files import replacing, write_whole

FORMAT = 1
WEIGHTS, DESCRIPTION = "weights.safetensors", "policy.json"
FILTER, ORDER = KINDS = "filter", "order"
LARGEST_LOGIT = 12.0
FEATURES = (
    "logit",  # ln(p / (1 - p)) of the proposed token, within +-12
    "largest logit",  # the same of the most probable token
    "margin",  # difference of the two largest probabilities
    "entropy",  # over that of a uniform distribution
    "offset",  # position in the block, over its length
    "masked share",  # masked positions of the block, over its length
    "masked to the left",  # of them those to the left of this one
    "known to the left",  # 1 if the position to the left is not masked, or not in the block
    "best logit",  # largest "logit" of the block's masked positions
    "mean probability",  # mean p of the block's masked positions
)

_moved: WeakKeyDictionary[Policy, dict[torch.device, Policy]] = WeakKeyDictionary()


def features(masked: Tensor, offset: Tensor, proposal: Proposal, outcomes: int, length: int | Tensor) -> Tensor:
    """`FEATURES` of each position of blocks, float32 ``[B, R, 10]``; 0 where it is not masked.

    Args:
        masked: bool ``[B, R]``.
        offset: int64 ``[B, R]``, position counted from the start of the block.
        proposal: with top1, top2 and entropy; not read where nothing is masked.
        outcomes: number of ids that the model can produce.
        length: of the whole block, also where the text ends in it, or int64 ``[B, 1]``.
    """
    top1, top2, entropy = proposal.top1, proposal.top2, proposal.entropy
    assert top1 is not None
    assert top2 is not None
    assert entropy is not None
    logit = torch.where(masked, logit_of(proposal.probability), -LARGEST_LOGIT)
    probability = torch.where(masked, proposal.probability, 0.0)
    count = masked.sum(-1, keepdim=True)
    left = masked.cumsum(-1) - masked.long()
    known = ~torch.cat((torch.zeros_like(masked[:, :1]), masked[:, :-1]), dim=1)
    columns = (
        logit,
        logit_of(top1),
        top1 - top2,
        entropy / math.log(max(2, outcomes)),
        offset / length,
        (count / length).expand_as(logit),
        left / length,
        known.float(),
        logit.amax(-1, keepdim=True).expand_as(logit),
        (probability.sum(-1, keepdim=True) / count.clamp(min=1)).expand_as(logit),
    )
    return torch.where(masked[..., None], torch.stack(columns, dim=-1), 0.0)


def logit_of(p: Tensor) -> Tensor:
    """``ln(p / (1 - p))``, within `LARGEST_LOGIT` of 0, also where rounding has left p above 1."""
    return torch.logit(p.clamp(0.0, 1.0)).clamp(-LARGEST_LOGIT, LARGEST_LOGIT)


@dataclass(frozen=True, eq=False)
class Policy:
    """A network from `features` to a score, and what it was trained for.

    Its tensors may be changed in place, also while graphs are kept.

    Attributes:
        layers: weight ``[out, in]`` and bias ``[out]`` of each linear layer, float32. There is a GELU between them.
        mean, deviation: float32 ``[10]``; features are standardised by them.
        bound: the default of `Learned.bound`.
        kind: ``"filter"``: the score is the logit of the chance that the proposed token is right. ``"order"``: the
            larger, the earlier the position.
        block_length: of the blocks that it was trained in; None: any, and the length of a block is the number of
            positions that are masked when it begins.
        vocab_size: number of ids of its model, the mask included.
        model_sha256: of the weights of its model, in hexadecimal; "" if it is not known.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    mean: Tensor
    deviation: Tensor
    bound: float
    kind: str
    block_length: int | None
    vocab_size: int
    model_sha256: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {self.kind!r}")
        for name, least in (("block_length", 1), ("vocab_size", 2)):
            value = getattr(self, name)
            if name == "block_length" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
        check_bound(self.kind, self.bound)
        width = len(FEATURES)
        shapes = [tuple(self.mean.shape), tuple(self.deviation.shape)]
        for weight, bias in self.layers:
            if weight.ndim != 2 or tuple(bias.shape) != tuple(weight.shape[:1]) or weight.shape[1] != width:
                raise ValueError(f"layers must be [out, in] with biases [out], the first of {len(FEATURES)} features")
            width = weight.shape[0]
        if width != 1 or not self.layers or shapes != [(len(FEATURES),)] * 2:
            raise ValueError(f"mean and deviation must be [{len(FEATURES)}], and the last layer must have one output")
        tensors = self.tensors()
        if not all(tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in tensors):
            raise ValueError("weights, mean and deviation must be finite and float32")
        if not bool((self.deviation > 0).all()):
            raise ValueError("deviation must be above 0")

    def tensors(self) -> list[Tensor]:
        return [self.mean, self.deviation, *(tensor for layer in self.layers for tensor in layer)]

    def score(self, inputs: Tensor) -> Tensor:
        """float32 ``[...]`` of features ``[..., 10]``."""
        x = (inputs - self.mean) / self.deviation
        for number, (weight, bias) in enumerate(self.layers):
            x = F.linear(F.gelu(x) if number else x, weight, bias)
        return x[..., 0]

    def on(self, device: torch.device) -> Policy:
        """This policy on a device, the same object at every call, so that graphs know it."""
        if self.mean.device == device:
            return self
        there = _moved.setdefault(self, {})
        if device not in there:
            layers = tuple((weight.to(device), bias.to(device)) for weight, bias in self.layers)
            there[device] = replace(self, layers=layers, mean=self.mean.to(device), deviation=self.deviation.to(device))
        return there[device]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `WEIGHTS` and `DESCRIPTION`, each whole or not at all; one without the other is never loaded."""
        from safetensors.torch import save

        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        named = {f"{n}.{part}": x for n, layer in enumerate(self.layers) for part, x in zip(("weight", "bias"), layer)}
        content = save({name: tensor.detach().cpu().contiguous() for name, tensor in named.items()})
        with replacing(place / WEIGHTS) as file:
            file.write(content)
        described: dict[str, Any] = {
            "format": FORMAT,
            "features": FEATURES,
            "mean": self.mean.tolist(),
            "deviation": self.deviation.tolist(),
            "weights_sha256": hashlib.sha256(content).hexdigest(),
        }
        described |= {name: getattr(self, name) for name in DESCRIBED}
        write_whole(place / DESCRIPTION, json.dumps(described, indent=1) + "\n")

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> Policy:
        """Read what `save` wrote.

        Raises:
            ValueError: files that are missing, damaged, or of other features.
        """
        from safetensors.torch import load

        place = Path(folder)
        try:
            described = json.loads((place / DESCRIPTION).read_text(encoding="utf-8"))
            content = (place / WEIGHTS).read_bytes()
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} holds no policy that can be read: {error}") from error
        if not isinstance(described, dict) or described.get("format") != FORMAT:
            raise ValueError(f"{place / DESCRIPTION} is of another format than {FORMAT}")
        if described.get("features") != list(FEATURES):
            raise ValueError(f"{folder} is a policy of other inputs ({described.get('features')}): train it anew")
        if described.get("weights_sha256") != hashlib.sha256(content).hexdigest():
            raise ValueError(f"{place / WEIGHTS} is not the file that {DESCRIPTION} describes")
        try:
            named = load(content)
            layers = tuple((named[f"{n}.weight"], named[f"{n}.bias"]) for n in range(len(named) // 2))
            known = {name: described[name] for name in DESCRIBED}
            mean, deviation = (torch.tensor(described[name], dtype=torch.float32) for name in ("mean", "deviation"))
            return Policy(layers, mean, deviation, **known)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder} holds a damaged policy: {error}") from error


DESCRIBED = "bound", "kind", "block_length", "vocab_size", "model_sha256"


def check_bound(kind: str, bound: Any) -> None:
    """Refuse a bound that the kind cannot have."""
    if isinstance(bound, bool) or not isinstance(bound, int | float) or not bound > 0.0 or math.isinf(bound):
        raise ValueError(f"bound must be a finite number above 0, not {bound!r}")
    if kind == FILTER and bound >= 1.0:
        raise ValueError(f"bound must lie between 0 and 1, as it is a chance, not {bound!r}")
