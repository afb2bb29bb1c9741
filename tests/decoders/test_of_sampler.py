"""`of="sampler"`: positions ranked by the distribution that tokens are drawn from, against Dream's rule written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import mdkern
from mdkern.decoders import Edit, Entropy, EntropyBound, Factor, Margin, PositionAware, ReMDM, Threshold, TopProbability

pytestmark = pytest.mark.filterwarnings("ignore:.*runs by its logits")

VOCAB, LENGTH, STEPS = 12, 24, 6
# Of a model that does not look at the text: positions of few likely tokens and positions of many.
LOGITS = (
    torch.randn(LENGTH, VOCAB, generator=torch.Generator().manual_seed(7)) * torch.linspace(0.3, 2.0, LENGTH)[:, None]
)


def dream_confidence(
    logits: list[float], temperature: float, top_p: float | None, top_k: int | None, alg: str
) -> float:
    """Confidence of one position as Dream's `sample_tokens` has it (Ye et al., 2508.15487), tokens being greedy or not
    looked at: temperature, then top_p, then top_k, then a softmax of what is left."""
    if temperature > 0:
        logits = [x / temperature for x in logits]
    if top_p is not None and top_p < 1:
        order = sorted(range(len(logits)), key=lambda i: -logits[i])
        total, seen, removed = sum(math.exp(x) for x in logits), 0.0, set()
        for i in order:
            if seen > top_p:
                removed.add(i)
            seen += math.exp(logits[i]) / total
        logits = [-math.inf if i in removed else x for i, x in enumerate(logits)]
    if top_k is not None:
        kth = sorted(logits)[-top_k]
        logits = [-math.inf if x < kth else x for x in logits]
    total = sum(math.exp(x) for x in logits)
    probs = sorted((math.exp(x) / total for x in logits), reverse=True)
    if alg == "maskgit_plus":
        return probs[0]
    if alg == "topk_margin":
        return probs[0] - probs[1]
    return sum(p * math.log(p + 1e-10) for p in probs)


def dream_reveals(confidence: list[float]) -> list[int]:
    """The step at which each position is revealed: at each, the surest ``int(masked * (1 - s / t))``."""
    times = [1 + (1e-3 - 1) * i / STEPS for i in range(STEPS + 1)]
    left, reveal = list(range(LENGTH)), [-1] * LENGTH
    for step in range(STEPS):
        number = len(left) if step == STEPS - 1 else int(len(left) * (1 - times[step + 1] / times[step]))
        for position in sorted(left, key=lambda i: -confidence[i])[:number]:
            reveal[position] = step
            left.remove(position)
    return reveal


def reveals(decoder: Any, **options: Any) -> list[int]:
    denoiser = mdkern.adapt(lambda ids: LOGITS.expand(len(ids), -1, -1), vocab_size=VOCAB, mask_id=VOCAB)
    options |= {"decoder": decoder, "return_history": True, "progress": False}
    outcome = mdkern.sample(denoiser, length=LENGTH, steps=STEPS, seed=1, **options)
    return outcome.history.step[0].tolist()


DREAM = [("entropy", Entropy, {"temperature": 0.2, "top_p": 0.95})]  # the published settings
DREAM += [
    ("entropy", Entropy, {"temperature": 0.7, "top_k": 3}),
    ("entropy", Entropy, {"temperature": 0, "top_p": 0.9}),
]
DREAM += [("topk_margin", Margin, {"temperature": 0.2, "top_p": 0.95}), ("topk_margin", Margin, {"temperature": 1.5})]
DREAM += [("maskgit_plus", TopProbability, {"temperature": 0, "top_p": 0.9})]


@pytest.mark.parametrize(("alg", "kind", "options"), DREAM, ids=str)
def test_the_positions_that_dream_reveals_are_revealed(alg: str, kind: Any, options: dict[str, Any]) -> None:
    temperature, top_p, top_k = (options.get(name) for name in ("temperature", "top_p", "top_k"))
    assert temperature is not None
    confidence = [dream_confidence(row, temperature, top_p, top_k, alg) for row in LOGITS.double().tolist()]
    assert reveals(kind(quota="dream", of="sampler"), **options) == dream_reveals(confidence)


def test_at_dreams_settings_the_models_own_distribution_ranks_otherwise() -> None:
    options = {"temperature": 0.2, "top_p": 0.95}
    assert reveals(Entropy(quota="dream"), **options) != reveals(Entropy(quota="dream", of="sampler"), **options)


def test_without_temperature_and_filters_both_are_the_same() -> None:
    for kind in (Entropy, Margin, TopProbability):
        assert reveals(kind(of="sampler")) == reveals(kind())


@pytest.mark.parametrize(("threshold", "passes"), [(0.97, 1), (0.995, 4)])
def test_a_threshold_is_of_the_samplers_probability(threshold: float, passes: int) -> None:
    """Tokens of probability 0.9 and 0.1; 0.81 / 0.82 = 0.988 and 0.012 at a temperature of 0.5."""
    logits = torch.tensor([0.9, 0.1]).log()
    denoiser = mdkern.adapt(lambda ids: logits.expand(*ids.shape, 2), vocab_size=2, mask_id=2)
    decoder = Threshold(threshold, of="sampler")
    outcome = mdkern.sample(
        denoiser, num_samples=8, length=4, steps=4, temperature=0.5, decoder=decoder, seed=3, progress=False
    )
    likely = (outcome.sequences == 0).all(-1)
    assert likely.any()
    (nfe,) = outcome.nfe.values()
    assert (nfe[likely] >= passes).all()
    assert int(nfe[likely].min()) == passes


@pytest.mark.parametrize(
    "make",
    [
        Entropy,
        Margin,
        TopProbability,
        Threshold,
        Factor,
        EntropyBound,
        Edit,
        ReMDM,
        lambda of: PositionAware(torch.ones(3) / 3, of=of),
    ],
)
def test_another_distribution_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="of must be one of model, sampler, not 'both'"):
        make(of="both")


def test_the_nucleus_of_remdm_is_asked_for_by_name() -> None:
    """Tokens of probability 0.6, 0.3 and 0.1: of a nucleus of 0.8 the second one crosses it."""
    logits = torch.tensor([0.6, 0.3, 0.1]).log()
    denoiser = mdkern.adapt(lambda ids: logits.expand(*ids.shape, 3), vocab_size=3, mask_id=3)
    for rule, tokens in (("reach", {0, 1}), ("within", {0})):
        out = mdkern.sample(denoiser, length=64, top_p=0.8, top_p_rule=rule, seed=0, progress=False)
        assert set(out.sequences.flatten().tolist()) == tokens
    with pytest.raises(ValueError, match="top_p_rule must be one of reach, within, not 'up to'"):
        mdkern.sample(denoiser, length=64, top_p=0.8, top_p_rule="up to", progress=False)
    with pytest.raises(ValueError, match="give a top_p"):
        mdkern.sample(denoiser, length=64, top_p_rule="within", progress=False)
