"""A toy denoiser small enough to enumerate: its logits are a fixed random function of the whole partly masked state."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import torch
from scipy.stats import chisquare
from torch import Tensor

from mdkern import Denoiser, adapt

VOCAB, MASK, LENGTH = 4, 4, 3  # ids 0..3 and the mask: every state is a number in base 5


class ToyDenoiser:
    """Logits ``[B, L, V]`` looked up by state; with time conditioning also bent by t."""

    def __init__(self, seed: int, time_conditioning: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = 1.5 * torch.randn((VOCAB + 1) ** LENGTH, LENGTH, VOCAB, generator=generator)
        self.bend = 2.0 * torch.randn(LENGTH, VOCAB, generator=generator)
        self.time_conditioning = time_conditioning

    def logits(self, input_ids: Tensor, t: Tensor) -> Tensor:
        state = (input_ids * (VOCAB + 1) ** torch.arange(LENGTH)).sum(-1)
        logits = self.table[state]
        return logits + t[:, None, None].float() * self.bend if self.time_conditioning else logits

    def denoiser(self) -> Denoiser:
        def with_time(input_ids: Tensor, t: Tensor) -> Tensor:
            return self.logits(input_ids, t)

        def without_time(input_ids: Tensor) -> Tensor:
            return self.logits(input_ids, torch.zeros(input_ids.shape[0]))

        return adapt(with_time if self.time_conditioning else without_time, vocab_size=VOCAB, mask_id=MASK)


def exact_distribution(
    models: Mapping[str, ToyDenoiser], model_of_step: str, start: tuple[int, ...], eps: float, temperature: float = 1.0
) -> dict[tuple[int, ...], float]:
    """Probability of every final sequence: the step-by-step Markov chain, every transition enumerated, in float64.

    `model_of_step` names the model of each step; the closing argmax pass is the last one's.
    """
    steps = len(model_of_step)
    times = np.linspace(1.0, eps, steps + 1)
    states = {start: 1.0}
    for step, name in enumerate(model_of_step):
        reveal = (times[step] - times[step + 1]) / times[step]
        following: dict[tuple[int, ...], float] = {}
        for state, weight in states.items():
            ids = torch.tensor([state])
            logits = models[name].logits(ids, torch.tensor([times[step]]))[0].double() / temperature
            p = logits.softmax(-1).numpy()
            choices = [
                [(token, 1.0)]
                if token != MASK
                else [(MASK, 1.0 - reveal), *((v, reveal * p[position, v]) for v in range(VOCAB))]
                for position, token in enumerate(state)
            ]
            for combination in itertools.product(*choices):
                outcome = tuple(token for token, _ in combination)
                probability = weight * float(np.prod([chance for _, chance in combination]))
                following[outcome] = following.get(outcome, 0.0) + probability
        states = following
    final: dict[tuple[int, ...], float] = {}
    for state, weight in states.items():
        greedy = models[model_of_step[-1]].logits(torch.tensor([state]), torch.tensor([eps]))[0].argmax(-1).tolist()
        closed = tuple(g if token == MASK else token for token, g in zip(state, greedy))
        final[closed] = final.get(closed, 0.0) + weight
    return final


def chi_square_p(sequences: Tensor, expected: Mapping[tuple[int, ...], float]) -> float:
    """p-value of the counts of sequences ``[N, L]`` against the expected probabilities; impossible outcomes give 0."""
    outcomes, counts = np.unique(sequences.numpy(), axis=0, return_counts=True)
    seen = {tuple(int(v) for v in outcome): int(count) for outcome, count in zip(outcomes, counts)}
    if any(outcome not in expected for outcome in seen):
        return 0.0
    total = len(sequences)
    observed = np.array([seen.get(outcome, 0) for outcome in expected])
    wanted = total * np.array(list(expected.values()))
    rare = wanted < 5  # pooled, as the test wants
    observed = np.append(observed[~rare], observed[rare].sum())
    wanted = np.append(wanted[~rare], wanted[rare].sum())
    if wanted[-1] < 1e-9:
        observed, wanted = observed[:-1], wanted[:-1]
    return float(chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue)
