"""The published decoding rules, word by word: plain Python over positions, float64, no code shared with the package.

A text is a list of ids, a distribution a list of logits per position; the rules say which positions are revealed, and
with which tokens, as a dict. Equal scores: the lower position first. Sums are exactly rounded (`math.fsum`), so that
permuted logits have equal statistics and a tie is a tie.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple


class Row(NamedTuple):
    """Statistics of one position."""

    token: int  # most probable, lowest id among equals
    probability: float  # of the token
    top1: float
    top2: float
    entropy: float  # nats


def softmax(logits: Sequence[float]) -> list[float]:
    largest = max(logits)
    weights = [math.exp(logit - largest) for logit in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def row_statistics(logits: Sequence[float]) -> Row:
    p = softmax(logits)
    first, second = sorted(p, reverse=True)[:2]
    token = next(v for v in range(len(p)) if logits[v] == max(logits))
    entropy = -math.fsum(q * math.log(q) for q in p if q > 0.0)
    return Row(token, p[token], first, second, entropy)


def best(scores: dict[int, float], count: int) -> list[int]:
    """The `count` positions with the largest scores."""
    return sorted(scores, key=lambda position: (-scores[position], position))[:count]


# Quotas


def llada_quotas(masks: int, steps: int) -> list[int]:
    """LLaDA: masks split evenly over the steps, the remainder to the first steps."""
    quotas = [masks // steps] * steps
    for step in range(masks % steps):
        quotas[step] += 1
    return quotas


def dream_quota(masks: int, step: int, steps: int, eps: Fraction = Fraction(1, 1000)) -> int:
    """Dream: int(masks (1 - s/t)), t from 1 to eps; the last step takes all. May be 0."""
    if step == steps - 1:
        return masks
    t, s = 1 - step * (1 - eps) / steps, 1 - (step + 1) * (1 - eps) / steps
    return int(masks * (1 - s / t))


# Which positions to reveal. `rows` and `masked` are by position; only positions start..stop-1 compete.


def top_probability(rows: Sequence[Row], masked: Sequence[bool], block: range, quota: int) -> dict[int, int]:
    scores = {i: rows[i].probability for i in block if masked[i]}
    return {i: rows[i].token for i in best(scores, quota)}


def margin(rows: Sequence[Row], masked: Sequence[bool], block: range, quota: int) -> dict[int, int]:
    scores = {i: rows[i].top1 - rows[i].top2 for i in block if masked[i]}
    return {i: rows[i].token for i in best(scores, quota)}


def entropy(rows: Sequence[Row], masked: Sequence[bool], block: range, quota: int) -> dict[int, int]:
    scores = {i: -rows[i].entropy for i in block if masked[i]}
    return {i: rows[i].token for i in best(scores, quota)}


def threshold(rows: Sequence[Row], masked: Sequence[bool], block: range, bound: float) -> dict[int, int]:
    """Fast-dLLM: all with c >= bound, at least the best one."""
    scores = {i: rows[i].probability for i in block if masked[i]}
    sure = [i for i in scores if scores[i] >= bound]
    return {i: rows[i].token for i in sure or best(scores, 1)}


def factor(rows: Sequence[Row], masked: Sequence[bool], block: range, bound: float) -> dict[int, int]:
    """Fast-dLLM: the longest prefix in which each rank n has (n + 1)(1 - c_(n)) < bound, at least one."""
    scores = {i: rows[i].probability for i in block if masked[i]}
    order = best(scores, len(scores))
    length = 0
    for n, i in enumerate(order, start=1):
        if (n + 1) * (1 - scores[i]) >= bound:
            break
        length = n
    return {i: rows[i].token for i in order[: max(length, 1)]}


def factor_in_code(rows: Sequence[Row], masked: Sequence[bool], block: range, bound: float) -> dict[int, int]:
    """Fast-dLLM's code: ranks n = 1, 2, … pass while c >= 1 - bound / (n + 1), the first one always; if only the last
    of all fails, it comes along."""
    order = best({i: rows[i].probability for i in block if masked[i]}, len(block))
    passing = 1
    while passing < len(order) and rows[order[passing]].probability >= 1.0 - bound / (passing + 2):
        passing += 1
    if passing == len(order) - 1:
        passing += 1
    return {i: rows[i].token for i in order[:passing]}


def entropy_bound(rows: Sequence[Row], masked: Sequence[bool], block: range, gamma: float) -> dict[int, int]:
    """EB-Sampler: by ascending entropy the longest prefix with sum H - max H <= gamma, at least one."""
    scores = {i: -rows[i].entropy for i in block if masked[i]}
    order = best(scores, len(scores))
    length = 0
    for n in range(1, len(order) + 1):
        prefix = [rows[i].entropy for i in order[:n]]
        if math.fsum(prefix) - max(prefix) > gamma:
            break
        length = n
    return {i: rows[i].token for i in order[: max(length, 1)]}


def position_aware(
    rows: Sequence[Row],
    masked: Sequence[bool],
    block: range,
    quota: int,
    frequency: Sequence[float],
    lam: float,
    alpha: float,
) -> dict[int, int]:
    """PC-Sampler: exp(-lam i) min(-p log(f + 1e-9), alpha), i from the block's start."""
    scores = {
        i: math.exp(-lam * (i - block.start))
        * min(-rows[i].probability * math.log(frequency[rows[i].token] + 1e-9), alpha)
        for i in block
        if masked[i]
    }
    return {i: rows[i].token for i in best(scores, quota)}


def edit(
    rows: Sequence[Row],
    ids: Sequence[int],
    masked: Sequence[bool],
    revealed: Sequence[bool],
    block: range,
    mask_threshold: float,
    edit_threshold: float,
) -> tuple[dict[int, int], dict[int, int]]:
    """LLaDA 2.1: (masks that become tokens, tokens that change)."""
    scores = {i: rows[i].probability for i in block if masked[i]}
    sure = [i for i in scores if scores[i] > mask_threshold]
    reveals = {i: rows[i].token for i in sure or best(scores, 1)}
    edits = {
        i: rows[i].token
        for i in block
        if revealed[i] and rows[i].probability > edit_threshold and rows[i].token != ids[i]
    }
    return reveals, edits


def soft_parallel(rows: Sequence[Row], masked: Sequence[bool], block: range, bound: float) -> dict[int, int]:
    """DMax: from the left, the masks up to the first with c < bound; if that is the first one, it alone."""
    reveals: dict[int, int] = {}
    for i in block:
        if masked[i]:
            if rows[i].probability < bound and reveals:
                break
            reveals[i] = rows[i].token
            if rows[i].probability < bound:
                break
    return reveals


def revisions(rows: Sequence[Row], ids: Sequence[int], revealed: Sequence[bool], block: range) -> dict[int, int]:
    """DMax: every token of the block that is not the prompt's takes the most probable one; those that change."""
    return {i: rows[i].token for i in block if revealed[i] and rows[i].token != ids[i]}


def is_settled(rows: Sequence[Row], ours: Sequence[bool], block: range, confident: float) -> bool:
    """DMax: every position of the block that is not the prompt's, masked or not, has c >= confident."""
    return all(rows[i].probability >= confident for i in block if ours[i])


def gelu(x: float) -> float:
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


def learned_features(
    rows: Sequence[Row], masked: Sequence[bool], block: range, outcomes: int, length: int
) -> dict[int, list[float]]:
    """The ten inputs of every masked position of a block."""

    def logit(p: float) -> float:
        return 12.0 if p >= 1.0 else min(12.0, max(-12.0, math.log(p / (1 - p))))

    ours = [i for i in block if masked[i]]
    return {
        i: [
            logit(rows[i].probability),
            logit(rows[i].top1),
            rows[i].top1 - rows[i].top2,
            rows[i].entropy / math.log(outcomes),
            (i - block.start) / length,
            len(ours) / length,
            sum(j < i for j in ours) / length,
            float(i == block.start or not masked[i - 1]),
            max(logit(rows[j].probability) for j in ours),
            math.fsum(rows[j].probability for j in ours) / len(ours),
        ]
        for i in ours
    }


class Network(NamedTuple):
    """Weights [out][in] and biases of linear layers, and the inputs' means and deviations."""

    layers: list[tuple[list[list[float]], list[float]]]
    mean: list[float]
    deviation: list[float]

    def score(self, inputs: list[float]) -> float:
        x = [(value - mean) / deviation for value, mean, deviation in zip(inputs, self.mean, self.deviation)]
        for number, (weight, bias) in enumerate(self.layers):
            x = [gelu(value) for value in x] if number else x
            x = [math.fsum(w * value for w, value in zip(row, x)) + b for row, b in zip(weight, bias)]
        return x[0]


def learned_filter(
    rows: Sequence[Row],
    masked: Sequence[bool],
    block: range,
    network: Network,
    outcomes: int,
    length: int,
    chance: float,
) -> dict[int, int]:
    """Learn2PD's rule on other inputs: all that are taken for right, at least the best."""
    inputs = learned_features(rows, masked, block, outcomes, length)
    scores = {i: network.score(values) for i, values in inputs.items()}
    sure = [i for i in scores if 1 / (1 + math.exp(-scores[i])) >= chance]
    return {i: rows[i].token for i in sure or best(scores, 1)}


def learned_order(
    rows: Sequence[Row],
    masked: Sequence[bool],
    block: range,
    network: Network,
    outcomes: int,
    length: int,
    budget: float,
) -> dict[int, int]:
    """The best-scored while what they may be wrong by stays below a budget, at least the best."""
    inputs = learned_features(rows, masked, block, outcomes, length)
    order = best({i: network.score(values) for i, values in inputs.items()}, len(inputs))
    count = 1
    while count < len(order) and math.fsum(1 - rows[i].probability for i in order[: count + 1]) < budget:
        count += 1
    return {i: rows[i].token for i in order[:count]}


def positions_law(scores: dict[int, float], count: int, temperature: float) -> dict[frozenset[int], float]:
    """Probability of each set of positions drawn one by one, without replacement, from softmax(score / temperature)."""
    law: dict[frozenset[int], float] = {}
    for order in itertools.permutations(scores, count):
        chance, left = 1.0, dict(scores)
        for position in order:
            total = math.fsum(math.exp(score / temperature) for score in left.values())
            chance *= math.exp(left.pop(position) / temperature) / total
        law[frozenset(order)] = law.get(frozenset(order), 0.0) + chance
    return law


# ReMDM


class Weights(NamedTuple):
    """Of a masked position: revealed, stays masked. Of a revealed one: put back to mask."""

    revealed: float
    stays: float
    remasked: float


def remdm_alpha(kind: str, time: float, t_on: float, t_off: float, alpha_on: float) -> float:
    if kind != "loop":
        return 1.0 - time
    if time > t_on:
        return (1.0 - time) * alpha_on / (1.0 - t_on)
    if time >= t_off:
        return alpha_on
    return 1.0 - time * (1.0 - alpha_on) / t_off


def remdm(
    kind: str,
    step: int,
    steps: int,
    revealed_with: Sequence[float | None],
    eta: float | None,
    t_on: float = 0.55,
    t_off: float = 0.05,
    alpha_on: float = 0.9,
) -> list[Weights]:
    """Weights of each position; `revealed_with` is the probability its token had when revealed, None where masked."""
    t, s = 1 - step / steps, 1 - (step + 1) / steps
    alpha_t = remdm_alpha(kind, t, t_on, t_off, alpha_on)
    alpha_s = remdm_alpha(kind, s, t_on, t_off, alpha_on)
    sigma_max = min(1.0, (1 - alpha_s) / alpha_t) if alpha_t > 0 else 1.0
    total = math.fsum(math.exp(-p) for p in revealed_with if p is not None)
    out = []
    for p in revealed_with:
        if kind == "conf":
            sigma = 0.0 if p is None else math.exp(-p) / total * sigma_max
        else:
            assert eta is not None
            sigma = {
                "cap": min(eta, sigma_max),
                "rescale": eta * sigma_max,
                "loop": min(eta, sigma_max) if t_off < t <= t_on else 0.0,
            }[kind]
        reveal = (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)
        stay = (1 - alpha_s - sigma * alpha_t) / (1 - alpha_t)
        out.append(Weights(reveal, stay, sigma))
    return out


# Orders that ignore the model


def chain_law(levels: Sequence[float]) -> list[float]:
    """Probability of each reveal step, last the closing pass, of the chain that reveals a masked position at a step
    t -> s with probability (level_t - level_s) / level_t, walked step by step.
    """
    masked, law = 1.0, []
    for now, after in itertools.pairwise(levels):
        reveal = (now - after) / now if now > 0.0 else 0.0
        law.append(masked * reveal)
        masked *= 1.0 - reveal
    return [*law, masked]


def first_hitting(count: int, rng: random.Random) -> list[tuple[float, int]]:
    """(time, position) of each reveal, by the recursion t <- t u^(1/n)."""
    left, time, hits = list(range(count)), 1.0, []
    while left:
        time *= rng.random() ** (1 / len(left))
        hits.append((time, left.pop(rng.randrange(len(left)))))
    return hits


def random_remasking(count: int, steps: int, rng: random.Random) -> list[int]:
    """Reveal step of each position: LLaDA's quotas, the confidence of every mask drawn afresh at every step."""
    step_of, left = [-1] * count, set(range(count))
    for step, quota in enumerate(llada_quotas(count, steps)):
        for position in best({i: rng.random() for i in sorted(left)}, quota):
            step_of[position] = step
            left.remove(position)
    return step_of


def hyperschedule_level(kind: str, width: int) -> Callable[[float, int, int], float]:
    """Noise level of position i of n at time t."""

    def level(time: float, i: int, n: int) -> float:
        if kind == "flat":
            return time
        if kind == "block":  # block k falls while k/K .. (k + 1)/K of the time passes
            blocks = math.ceil(n / width)
            return min(1.0, max(0.0, i // width + 1 - (1 - time) * blocks))
        width_ = 1 if kind == "quenched" else width
        front = (1 - time) * (n + width_ - 1)  # positions that have entered the window
        return min(1.0, max(0.0, 1 - (front - i) / width_))

    return level


class Case(NamedTuple):
    """A decoder with its parameters, and the rule that says what it reveals."""

    decoder: str  # its name
    parameters: dict[str, Any]
    rule: Callable[..., dict[int, int]]  # of rows, masks and block, the quota if there is one, and the options
    options: tuple[Any, ...] = ()
    quota: str | None = None  # "even" or "dream"


FREQUENCY = [0.0, 0.4, 0.2, 0.1, 0.1, 0.05, 0.05, 0.1]  # of ids 0..7, of which 0 is the mask
POSITION_AWARE = {"frequency": FREQUENCY, "lam": 0.1, "alpha": 1.5}
DREAM: dict[str, Any] = {"quota": "dream"}
CASES = {
    "top_probability": Case("top_probability", {}, top_probability, quota="even"),
    "top_probability, dream": Case("top_probability", DREAM, top_probability, quota="dream"),
    "margin": Case("margin", {}, margin, quota="even"),
    "margin, dream": Case("margin", DREAM, margin, quota="dream"),
    "entropy": Case("entropy", {}, entropy, quota="even"),
    "entropy, dream": Case("entropy", DREAM, entropy, quota="dream"),
    "threshold": Case("threshold", {}, threshold, (0.9,)),
    "threshold 0.6": Case("threshold", {"threshold": 0.6}, threshold, (0.6,)),
    "factor": Case("factor", {}, factor, (1.0,)),
    "factor 2.3": Case("factor", {"factor": 2.3}, factor, (2.3,)),
    "factor, code": Case("factor", {"rule": "code"}, factor_in_code, (1.0,)),
    "factor 2.3, code": Case("factor", {"factor": 2.3, "rule": "code"}, factor_in_code, (2.3,)),
    "entropy_bound": Case("entropy_bound", {}, entropy_bound, (0.1,)),
    "entropy_bound 3": Case("entropy_bound", {"gamma": 3.0}, entropy_bound, (3.0,)),
    "entropy_bound inf": Case("entropy_bound", {"gamma": math.inf}, entropy_bound, (math.inf,)),
    "soft_parallel": Case("soft_parallel", {}, soft_parallel, (0.5,)),
    "soft_parallel 0.3": Case("soft_parallel", {"threshold": 0.3, "soft": False}, soft_parallel, (0.3,)),
    "position_aware": Case("position_aware", POSITION_AWARE, position_aware, (FREQUENCY, 0.1, 1.5), "even"),
}
