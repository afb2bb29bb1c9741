"""The baselines are right, and the sampler agrees with them in distribution on the shipped pair."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mdkern
from mdkern.profiling.eager import categorical, ddpm, ddpm_cache
from tests.references.enumeration import LENGTH, MASK, ToyDenoiser, chi_square_p, exact_distribution

JUDGE = Path(__file__).parents[2] / "benchmarks" / "judge"


def test_categorical_draws_its_weights() -> None:
    weights = torch.tensor([0.5, 0.2, 0.0, 1.3])
    drawn = categorical(weights.expand(200_000, 4), torch.Generator().manual_seed(0))
    expected = {(i,): float(w / weights.sum()) for i, w in enumerate(weights)}
    assert chi_square_p(drawn[:, None], expected) > 1e-3


@pytest.mark.filterwarnings("ignore:.*runs by its logits")
@pytest.mark.parametrize("cache", [False, True])
def test_ddpm_is_the_chain(cache: bool) -> None:
    toys = {"H": ToyDenoiser(1), "L": ToyDenoiser(2)}
    denoisers = {name: toy.denoiser() for name, toy in toys.items()}
    sampler = ddpm_cache if cache else ddpm
    options = {"num_samples": 200_000, "length": LENGTH, "steps": 4, "seed": 0, "eps": 0.05}
    sequences, passes = sampler(denoisers, "L1 H2 L1", **options)
    assert passes == {"L": 3, "H": 2}, "the closing pass is the last denoiser's"
    expected = exact_distribution(toys, "LHHL", (MASK,) * LENGTH, 0.05)
    assert chi_square_p(sequences, expected) > 1e-3


@pytest.mark.filterwarnings("ignore:.*runs by its logits")
def test_cache_saves_passes_where_nothing_changes() -> None:
    denoiser = ToyDenoiser(1).denoiser()
    _, every = ddpm(denoiser, num_samples=1, length=LENGTH, steps=100, seed=0)
    _, cached = ddpm_cache(denoiser, num_samples=1, length=LENGTH, steps=100, seed=0)
    assert every == {"H": 101}
    assert cached["H"] <= LENGTH + 2


def two_sample_p(first: Tensor, second: Tensor, classes: int) -> float:
    """p-value of two sets of counts coming from one distribution; classes seen fewer than 10 times pooled."""
    from scipy.stats import chi2_contingency

    table = torch.stack([torch.bincount(x.flatten(), minlength=classes) for x in (first, second)])
    rare = table.sum(0) < 10
    table = torch.cat((table[:, ~rare], table[:, rare].sum(1, keepdim=True)), dim=1)
    return float(chi2_contingency(table[:, table.sum(0) > 0].numpy()).pvalue)


def agreement(ours: Tensor, theirs: Tensor, vocab_size: int) -> dict[str, float]:
    """p-values of token and bigram frequencies, and the distance of the mean judge likelihoods in standard errors.

    Tokens of one sample depend on each other, so frequencies are compared on a thinned set: one token and one bigram
    out of every 16 positions, far enough apart for the test's assumption to hold nearly.
    """
    from transformers import GPT2LMHeadModel

    from mdkern.evaluation.text import judge as score

    judge = GPT2LMHeadModel.from_pretrained(JUDGE, dtype=torch.float32).to(ours.device).eval()
    scores = [score(judge, x).nats_per_token() for x in (ours, theirs)]
    error = math.sqrt(sum(float(s.var()) / len(s) for s in scores))
    thin = [x[:, 8::16].cpu() for x in (ours, theirs)]
    bigram = [(x[:, 8:-1:16] * vocab_size + x[:, 9::16]).cpu() % 1009 for x in (ours, theirs)]  # hashed: few repeat
    return {
        "tokens": two_sample_p(thin[0], thin[1], vocab_size),
        "bigrams": two_sample_p(bigram[0], bigram[1], 1009),
        "judge_distance": float(scores[0].mean() - scores[1].mean()) / error,
        "judge_ours": float(scores[0].mean()),
        "judge_baseline": float(scores[1].mean()),
    }


def check_agreement(found: dict[str, float]) -> None:
    assert found["tokens"] > 1e-3, found
    assert found["bigrams"] > 1e-3, found
    assert abs(found["judge_distance"]) < 2, found


@pytest.mark.slow
def test_sampler_agrees_with_ddpm_on_the_shipped_pair() -> None:
    """256 short samples each, in 6 steps; the same at full length runs on a GPU."""
    heavy, light, tokenizer = mdkern.load_pair("cpu")
    options = {"num_samples": 256, "length": 16, "steps": 6}
    ours = mdkern.sample(heavy, light, "L2 H2 L2", seed=1, batch_size=64, **options).sequences
    theirs, _ = ddpm(heavy, light, "L2 H2 L2", seed=2, dtype=torch.float64, **options)
    check_agreement(agreement(ours, theirs, len(tokenizer)))
    cold = mdkern.sample(heavy, light, "L2 H2 L2", seed=1, batch_size=64, temperature=0.7, **options).sequences
    assert abs(agreement(cold, theirs, len(tokenizer))["judge_distance"]) > 4, "a lowered temperature would be seen"


@pytest.mark.gpu
def test_sampler_agrees_with_ddpm_at_full_length() -> None:
    heavy, light, tokenizer = mdkern.load_pair("cuda")
    options = {"num_samples": 512, "length": 256, "steps": 256}
    ours = mdkern.sample(heavy, light, "L32 H192 L32", seed=1, batch_size=256, **options).sequences
    exact, _ = ddpm(heavy, light, "L32 H192 L32", seed=2, dtype=torch.float64, **options)
    found = agreement(ours, exact, len(tokenizer))
    print("mdkern and ddpm in float64:", found)
    check_agreement(found)
    usual, _ = ddpm(heavy, light, "L32 H192 L32", seed=3, **options)
    biased = agreement(usual, exact, len(tokenizer))
    print("ddpm in float32 and in float64:", biased)
    assert biased["judge_distance"] < -2, "the float32 categorical cuts the tail, and this test can see it"
