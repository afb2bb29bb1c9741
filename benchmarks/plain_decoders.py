"""The decoders as their public code runs them: every step the model at every position, every logit in memory.

Peers for `benchmarks.bench_decoders` and its tests, written from the rules. Each keeps what determines the speed of the
public code: the float64 softmax over all positions of LLaDA, Fast-dLLM and PC-Sampler, and their loop over rows, with a
synchronisation for each; Dream's softmax over the masked positions, sorted completely for its margin; the categorical
over the whole vocabulary of MDLM and, in float64 and after a nucleus filter, of ReMDM. Where a public version
synchronises once per position (Fast-dLLM's first one), this code does so once per row. The ancestral sampler itself is
`mdkern.profiling.eager.ddpm`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.decoder_cases import Case, Gauge
from benchmarks.plain_loop import Plain, Step
from mdkern import decoders
from mdkern.decoders import Policy, Proposal
from mdkern.decoders.policy import features
from mdkern.profiling.eager import categorical

Level = Callable[[float, Tensor, int], Tensor]  # (time, position int64 [n], n) -> noise level [n]
DREAM_EPS = 1e-3


def draw(logits: Tensor, step: Step) -> Tensor:
    """Tokens of ``logits [..., V]``, by Gumbel-max in float64 as LLaDA draws them; the argmax at temperature 0."""
    if step.temperature == 0.0:
        return logits.argmax(-1)
    uniform = torch.rand(logits.shape, generator=step.generator, device=logits.device, dtype=torch.float64)
    return (logits.double() / step.temperature - (-uniform.log()).log()).argmax(-1)


def proposals(step: Step) -> tuple[Tensor, Tensor]:
    """LLaDA's proposals: tokens int64 ``[B, L]``, and their probability float64, -inf where not masked."""
    token = draw(step.logits, step)
    probability = step.logits.double().softmax(-1).gather(-1, token[..., None])[..., 0]
    return token, probability.masked_fill(~step.masked, -math.inf)


def write(step: Step, token: Tensor, chosen: Tensor) -> Tensor:
    return torch.where(chosen, token, step.ids)


def choose_by_quota(step: Step, token: Tensor, confidence: Tensor) -> Tensor:
    """The step's quota of each row, one row after another, as LLaDA takes them."""
    chosen = torch.zeros_like(step.masked)
    for row in range(len(chosen)):
        best = confidence[row].topk(int(step.quota[row, step.number])).indices
        chosen[row, best] = True
    return write(step, token, chosen)


def top_probability(step: Step) -> Tensor:
    """LLaDA's low-confidence remasking."""
    return choose_by_quota(step, *proposals(step))


def random_remask(step: Step) -> Tensor:
    """LLaDA's random remasking: confidence is noise, and no probability is needed."""
    noise = torch.rand(step.ids.shape, generator=step.generator, device=step.ids.device)
    return choose_by_quota(step, draw(step.logits, step), noise.masked_fill(~step.masked, -math.inf))


def position_aware(step: Step, frequency: Tensor, lam: float = 0.25, alpha: float = 10.0) -> Tensor:
    """PC-Sampler, the position counted from the block's start."""
    token, probability = proposals(step)
    offset = torch.arange(token.shape[1], device=token.device) - step.wanted.int().argmax(-1, keepdim=True)
    calibrated = (-probability * (frequency[token] + 1e-9).log()).clamp(max=alpha)
    score = torch.exp(-lam * offset.double()) * calibrated
    return choose_by_quota(step, token, score.masked_fill(~step.masked, -math.inf))


def dream(step: Step, confidence_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Dream's loop: only the masked positions' logits, one quota for the whole batch.

    Args:
        confidence_of: probabilities ``[M, V]`` and drawn tokens ``[M]`` -> ``[M]``.
    """
    logits = step.logits[step.masked]
    greedy = step.temperature == 0.0
    probability = (logits if greedy else logits / step.temperature).softmax(-1)
    drawn = probability.argmax(-1) if greedy else torch.multinomial(probability, 1, generator=step.generator)[:, 0]
    times = [1.0 + (DREAM_EPS - 1.0) * number / step.steps for number in (step.number, step.number + 1)]
    left = int(step.masked.sum()) / len(step.masked)
    count = int(left * (1.0 - times[1] / times[0])) if step.number < step.steps - 1 else int(left)
    confidence = torch.full(step.ids.shape, -math.inf, dtype=logits.dtype, device=logits.device)
    confidence[step.masked] = confidence_of(probability, drawn)
    token = step.ids.masked_scatter(step.masked, drawn)
    best = confidence.topk(count).indices
    return write(step, token, torch.zeros_like(step.masked).scatter_(1, best, True))


def gap(probability: Tensor, drawn: Tensor) -> Tensor:
    best = probability.sort(-1, descending=True).values
    return best[:, 0] - best[:, 1]


def certainty(probability: Tensor, drawn: Tensor) -> Tensor:
    return (probability * (probability + 1e-10).log()).sum(-1)


def threshold(step: Step, bound: float = 0.9) -> Tensor:
    """Fast-dLLM's threshold: what is sure enough, and the best of each row."""
    token, confidence = proposals(step)
    chosen = torch.zeros_like(step.masked)
    for row in range(len(chosen)):
        best, order = confidence[row].topk(int(step.masked[row].sum()))
        take = best >= bound
        take[:1] = True
        chosen[row, order[take]] = True
    return write(step, token, chosen)


def factor(step: Step, bound: float = 1.0) -> Tensor:
    """Fast-dLLM's factor: the longest prefix of the sorted confidences whose n-th has (n + 1)(1 - c) < `bound`."""
    token, confidence = proposals(step)
    chosen = torch.zeros_like(step.masked)
    for row in range(len(chosen)):
        best, order = confidence[row].topk(int(step.masked[row].sum()))
        place = torch.arange(1, len(best) + 1, device=best.device)
        count = int(((place + 1) * (1.0 - best) < bound).int().cumprod(0).sum())
        chosen[row, order[: max(1, count)]] = True
    return write(step, token, chosen)


def entropy_bound(step: Step, gamma: float = 0.1) -> Tensor:
    """EB-Sampler: the longest prefix of the sorted entropies with a sum, less the largest, of at most `gamma`."""
    token = draw(step.logits, step)
    chosen = torch.zeros_like(step.masked)
    for row in range(len(chosen)):
        place = step.masked[row].nonzero()[:, 0]
        if len(place) == 0:
            continue
        log_probability = step.logits[row, place].float().log_softmax(-1)
        entropy, order = torch.special.entr(log_probability.exp()).sum(-1).sort()
        count = int((entropy.cumsum(0) - entropy.cummax(0).values <= gamma).sum())
        chosen[row, place[order[: max(1, count)]]] = True
    return write(step, token, chosen)


def learned(step: Step, policy: Policy) -> Tensor:
    """A filter as in Learn2PD: all that a network takes for right, and the best of each row.

    Their network sees the confidences alone; ours also sees the margins, entropies and neighbours.
    """
    token = draw(step.logits, step)
    p = step.logits.double().softmax(-1)
    top = p.topk(2, -1).values.float()
    probability, entropy = p.gather(-1, token[..., None])[..., 0].float(), torch.special.entr(p).sum(-1).float()
    first = step.wanted.int().argmax(-1, keepdim=True)
    offset = torch.arange(token.shape[1], device=token.device) - first
    proposal = Proposal(token, probability, top[..., 0], top[..., 1], entropy)
    length = policy.block_length or step.wanted.sum(-1, keepdim=True)
    score = policy.score(features(step.masked, offset, proposal, policy.vocab_size - 1, length))
    chosen = torch.zeros_like(step.masked)
    for row in range(len(chosen)):
        best, order = score[row].masked_fill(~step.masked[row], -math.inf).topk(int(step.masked[row].sum()))
        take = best.sigmoid() >= policy.bound
        take[:1] = True
        chosen[row, order[take]] = True
    return write(step, token, chosen)


def random_policy(vocab_size: int, block_length: int | None, device: torch.device) -> Policy:
    """A network of the usual size that mostly follows the logit of p."""
    generator = torch.Generator().manual_seed(0)
    first, last = torch.randn(32, 10, generator=generator) / 20, torch.randn(1, 32, generator=generator) / 20
    first[0, 0], last[0, 0] = 1.0, 1.0
    layers = ((first, torch.zeros(32)), (last, torch.zeros(1)))
    facts: dict[str, Any] = {"kind": "filter", "block_length": block_length, "vocab_size": vocab_size}
    return Policy(layers, torch.zeros(10), torch.ones(10), bound=0.5, **facts).on(device)


def edit(step: Step, mask_threshold: float = 0.7, edit_threshold: float = 0.5) -> Tensor:
    """LLaDA 2.1: masks become tokens above one threshold, or the best does; tokens become others above another."""
    token = draw(step.logits, step)
    probability = step.logits.float().softmax(-1).gather(-1, token[..., None])[..., 0]
    chosen = torch.zeros_like(step.masked)
    for row in range(len(chosen)):
        if not bool(step.masked[row].any()):
            continue
        confidence = probability[row].masked_fill(~step.masked[row], -math.inf)
        chosen[row] = confidence > mask_threshold
        chosen[row, confidence.argmax()] = True
    edited = step.wanted & ~step.masked & (probability > edit_threshold) & (token != step.ids)
    return write(step, token, chosen | edited)


def soft_parallel(step: Step, bound: float = 0.5) -> Tensor:
    """DMax without its soft inputs: the sure ones from the left, at least one, and every token is revised."""
    token, probability = step.logits.argmax(-1), largest_probability(step)
    chosen = torch.zeros_like(step.masked)
    for row in range(len(chosen)):
        doubted = step.masked[row] & (probability[row] < bound)
        chosen[row] = step.masked[row] & (doubted.cumsum(0) == 0)
        if not bool(chosen[row].any()) and bool(step.masked[row].any()):
            chosen[row, step.masked[row].int().argmax()] = True
    return write(step, token, chosen | (step.wanted & ~step.masked))


def is_settled(step: Step, new: Tensor, confident: float = 0.9) -> bool:
    """DMax's end of a block, for the whole batch at once; here no block ends with masks."""
    if bool((step.wanted & (new == step.mask_id)).any()):
        return False
    sure = bool((largest_probability(step)[step.wanted] >= confident).all())
    return sure or torch.equal(new, step.ids) or step.number + 1 >= step.columns


def largest_probability(step: Step) -> Tensor:
    logits = step.logits.float()
    return torch.exp(logits.amax(-1) - logits.logsumexp(-1))


def first_hitting(step: Step) -> Tensor:
    """One position of each row, uniformly chosen; probabilities of all of them, as MDLM's model gives them."""
    probability = step.logits.float().softmax(-1)
    rows = torch.arange(len(step.ids), device=step.ids.device)
    place = torch.multinomial(step.masked.float(), 1, generator=step.generator)[:, 0]
    new = step.ids.clone()
    new[rows, place] = categorical(probability[rows, place].double(), step.generator)
    return new


def by_level(step: Step, level: Level) -> Tensor:
    """MDLM's step with a noise level for each position, which reveals with (tau_t - tau_s) / tau_t."""
    place = (step.wanted.cumsum(-1) - 1).clamp(min=0)
    count = int(step.wanted[0].sum())
    before, after = (level(1.0 - number / step.steps, place, count) for number in (step.number, step.number + 1))
    probability = step.logits.softmax(-1, dtype=torch.float32)
    weights = torch.cat((probability * (before - after).clamp(min=0.0)[..., None], after[..., None]), dim=-1)
    return from_categorical(step, categorical(weights.float(), step.generator), step.masked)


def block_level(time: float, place: Tensor, count: int, width: int) -> Tensor:
    return (place // width + 1 - (1.0 - time) * (-(-count // width))).clamp(0.0, 1.0)


def power_level(time: float, place: Tensor, count: int, exponents: Tensor) -> Tensor:
    """GenMD4: t^w."""
    return time ** exponents[place]


def from_categorical(step: Step, drawn: Tensor, where: Tensor) -> Tensor:
    """Ids after a draw from V + 1 columns, of which the last is the mask."""
    token = torch.where(drawn == step.logits.shape[-1], step.mask_id, drawn)
    return torch.where(where, token, step.ids)


def remdm_cap(step: Step, eta: float = 0.008, top_p: float = 1.0) -> Tensor:
    """ReMDM with sigma = min(eta, its largest), a float64 categorical over the vocabulary and the mask."""
    alpha_t, alpha_s = step.number / step.steps, (step.number + 1) / step.steps
    sigma = min(eta, (1.0 - alpha_s) / alpha_t) if alpha_t > 0.0 else eta
    probability = nucleus(step.logits.softmax(-1, dtype=torch.float32), top_p)
    reveal = (alpha_s - (1.0 - sigma) * alpha_t) / (1.0 - alpha_t)
    stay = (1.0 - alpha_s - sigma * alpha_t) / (1.0 - alpha_t)
    held = torch.zeros_like(probability).scatter_(-1, step.ids.clamp(max=probability.shape[-1] - 1)[..., None], 1.0)
    weights = torch.where(step.masked[..., None], probability * reveal, held * (1.0 - sigma))
    masks = torch.where(step.masked, stay, sigma).to(weights.dtype)
    drawn = categorical(torch.cat((weights, masks[..., None]), dim=-1).double(), step.generator)
    return from_categorical(step, drawn, step.wanted)


def nucleus(probability: Tensor, top_p: float) -> Tensor:
    """The fewest ids whose probabilities sum to `top_p`, renormalised."""
    if top_p >= 1.0:
        return probability
    best, order = probability.sort(-1, descending=True)
    best = best.masked_fill(best.cumsum(-1) - best >= top_p, 0.0)
    kept = torch.zeros_like(probability).scatter_(-1, order, best)
    return kept / kept.sum(-1, keepdim=True)


def make_cases(
    gauge: Gauge, greedy: float, length: int, vocab_size: int, block_length: int, device: torch.device
) -> list[Case]:
    """Every decoder with its loop.

    Args:
        greedy: temperature of the methods whose code is greedy unless told otherwise.
        length: positions.
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(vocab_size, generator=generator).pow(8).to(device)  # few common tokens, many rare ones
    frequency = weights / weights.sum()
    exponents = torch.linspace(0.5, 2.0, length, device=device)
    levels = partial(block_level, width=block_length), partial(power_level, exponents=exponents)
    editing = decoders.Edit(*gauge.edit)
    in_blocks: dict[str, Any] = {"temperature": greedy, "block_length": block_length}

    def adaptive(rule: Callable[..., Tensor], closing_steps: int = 0, **bounds: Any) -> Plain:
        return Plain(partial(rule, **bounds), adaptive=True, closing_steps=closing_steps)

    policy = random_policy(vocab_size, None, device)
    edits = {"mask_threshold": editing.mask_threshold, "edit_threshold": editing.edit_threshold}
    unsure: dict[str, Any] = {"temperature": greedy}
    return [
        Case("top probability", "LLaDA", decoders.TopProbability(), Plain(top_probability), **unsure),
        Case("threshold", "Fast-dLLM", decoders.Threshold(gauge.threshold),
             adaptive(threshold, bound=gauge.threshold), **in_blocks),
        Case("ancestral", "MDLM", decoders.Ancestral(), None),
        Case("remdm cap, top-p 0.9", "ReMDM", decoders.ReMDM("cap"),
             Plain(partial(remdm_cap, top_p=0.9)), top_p=0.9),
        Case("factor", "Fast-dLLM", decoders.Factor(gauge.factor),
             adaptive(factor, bound=gauge.factor), **in_blocks),
        Case("entropy bound", "EB-Sampler", decoders.EntropyBound(gauge.gamma),
             adaptive(entropy_bound, gamma=gauge.gamma), **unsure),
        Case("margin", "Dream", decoders.Margin(quota="dream"), Plain(partial(dream, confidence_of=gap)), **unsure),
        Case("entropy", "Dream", decoders.Entropy(quota="dream"),
             Plain(partial(dream, confidence_of=certainty)), **unsure),
        Case("position aware", "PC-Sampler", decoders.PositionAware(frequency),
             Plain(partial(position_aware, frequency=frequency)), **unsure),
        Case("learned", "Learn2PD", decoders.Learned(policy), adaptive(learned, policy=policy), **in_blocks),
        Case("edit", "LLaDA 2.1", editing, adaptive(edit, editing.closing_steps, **edits), **in_blocks),
        Case("soft parallel, hard inputs", "DMax", decoders.SoftParallel(gauge.threshold, soft=False),
             Plain(partial(soft_parallel, bound=gauge.threshold), True, length, is_settled),
             temperature=0.0, block_length=block_length),
        Case("random", "LLaDA", decoders.RandomRemask(), Plain(random_remask), **unsure),
        Case("first hitting", "Zheng et al.", decoders.FirstHitting(), Plain(first_hitting, adaptive=True)),
        Case("hyperschedule, block", "MDLM with levels", decoders.Hyperschedule("block", block_length),
             Plain(partial(by_level, level=levels[0]))),
        Case("genmd4", "MDLM with levels", decoders.GenMD4(exponents),
             Plain(partial(by_level, level=levels[1]))),
    ]  # fmt: skip
