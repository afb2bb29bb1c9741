"""What the experiments on learning to decode are made with: sizes, models, decoders, and how answers are scored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from benchmarks.learning.problems import (
    ANSWER,
    COUNT,
    END_ID,
    MASK_ID,
    PROMPT,
    WORDS,
    Problems,
    draw,
    prompts,
    score,
    wordings,
)
from mdkern import DiT, DiTConfig, sample
from mdkern.decoders import Decoder, SoftParallel, Threshold
from mdkern.decoders.base import Choice, Proposal, Stepwise, View
from mdkern.evaluation.intervals import estimate
from training.batches import step_generator

LENGTH = PROMPT + ANSWER
TEST_STREAM, ANSWER_STREAM = 5, 6  # of `step_generator`: problems for testing, and those that the model answers itself
CAREFUL = 0.95  # the threshold of the base model's own answers, and of the accuracy that others are held to
ENOUGH = 0.9  # the strict accuracy that the base model must have at that threshold


@dataclass(frozen=True)
class Size:
    """How much of everything; by default what docs/learning.md is made with."""

    blocks: int = 6
    light_blocks: int = 2
    width: int = 256
    heads: int = 4
    block_length: int = 32
    batch_size: int = 512
    base_steps: int = 4000  # of a round
    base_rounds: int = 3  # at most, until the base model is good enough
    lr: float = 3e-3  # of the base model
    muon_lr: float = 6e-3
    answers: int = 150_000  # that the base model writes
    tune_epochs: int = 2
    tune_lr: float = 1e-4
    problems: int = 4096
    sample_batch: int = 2048
    thresholds: tuple[float, ...] = (0.95, 0.9, 0.8, 0.65, 0.5, 0.3, 0.0)
    gsm_epochs: float = 40
    gsm_batch: int = 256
    gsm_test: int = 1024
    gsm_lengths: tuple[int, ...] = (128, 192, 256)  # columns, prompt included; longer pairs than the last are left out
    compiled: bool = True

    @property
    def tune_steps(self) -> int:
        return self.tune_epochs * self.answers // self.batch_size


SIZES = {
    "full": Size(),
    "small": Size(
        blocks=3, light_blocks=1, width=96, heads=2, batch_size=64, base_steps=2000, base_rounds=1, answers=2000,
        problems=128, sample_batch=64, thresholds=(0.95, 0.8, 0.5), gsm_epochs=2, gsm_batch=16, gsm_test=16,
        gsm_lengths=(96,), compiled=False,
    ),
    "tiny": Size(
        blocks=1, light_blocks=1, width=16, heads=2, batch_size=8, base_steps=40, base_rounds=1, lr=0.02, answers=16,
        tune_epochs=1, problems=6, sample_batch=4, thresholds=(0.9, 0.5), gsm_epochs=0.0001, gsm_batch=4, gsm_test=2,
        gsm_lengths=(64,), compiled=False,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class LeftmostRun(Stepwise):
    """The reveal rule of `SoftParallel` by itself: from the left up to the first doubt, and nothing is revised."""

    adaptive: ClassVar[bool] = True

    threshold: float = 0.5

    def choose(self, view: View, proposal: Proposal) -> Choice:
        doubted = view.masked & ~(proposal.probability >= self.threshold)
        run = view.masked & (doubted.cumsum(-1) == 0)
        leftmost = view.masked & (view.masked.cumsum(-1) == 1)
        return Choice(proposal.probability, run | leftmost, "threshold")


def decoder_of(name: str, threshold: float) -> Decoder:
    """The four ways of decoding that are compared."""
    if name == "threshold":
        return Threshold(threshold)
    if name == "run":
        return LeftmostRun(threshold)
    return SoftParallel(threshold, soft=name == "soft")


DECODERS = {
    "threshold": "threshold",
    "run": "leftmost run",
    "revision": "run with revision",
    "soft": "run with revision, soft inputs",
}


@dataclass
class Study:
    """One seed's models on one device, and where its checkpoints are."""

    size: Size
    seed: int
    device: torch.device
    runs: Path
    gsm: Path | None = None  # folder with gsm8k_train.jsonl.xz and gsm8k_test.jsonl.xz
    block_causal: bool = True
    cache: str = "block"

    def setting(self) -> dict[str, Any]:
        """What the numbers depend on besides the seed and the machine."""
        size = json.loads(json.dumps(asdict(self.size)))  # tuples become lists, as in the file
        return {"size": size, "block_causal": self.block_causal, "cache": self.cache, "words": len(WORDS)}

    def fresh(self, blocks: int) -> DiT:
        """An untrained model."""
        torch.manual_seed(self.seed)
        config = DiTConfig(
            vocab_size=len(WORDS),
            mask_id=MASK_ID,
            eos_id=END_ID,
            max_length=LENGTH,
            num_blocks=blocks,
            width=self.size.width,
            num_heads=self.size.heads,
            tie_head=True,
            block_causal=self.size.block_length if self.block_causal else None,
        )
        return DiT(config).to(self.device)

    def problems(self, count: int, stream: int, held_out: bool) -> Problems:
        return draw(step_generator(self.seed, 0, stream), count, held_out)

    def test_problems(self) -> Problems:
        return self.problems(self.size.problems, TEST_STREAM, held_out=True)

    def for_sampling(self, model: DiT) -> DiT:
        """In 16 bits on a GPU."""
        return (model.bfloat16() if self.device.type == "cuda" else model).eval()


@dataclass(frozen=True)
class Written:
    """Answers to problems and what they took, a number for each."""

    answers: np.ndarray  # int64 [N, 64]
    finished: Tensor  # bool [N], whether there is an end of text
    tokens: Tensor  # float64 [N], before the end of text
    passes: Tensor  # float64 [N], that decode
    commits: Tensor  # float64 [N], that store the keys and values of finished blocks
    nfe: Mapping[str, Tensor]  # float64 [N] by model, both kinds


def write_answers(
    study: Study, models: Any, problems: Problems, decoder: Decoder, schedule: Any = None, cache: str | None = None
) -> Written:
    """Answer problems at temperature 0, in blocks, each answer ending with its end of text."""
    ids = np.concatenate((prompts(problems), np.full((len(problems), ANSWER), MASK_ID)), 1)
    out = sample(
        models,
        schedule=schedule,
        input_ids=torch.from_numpy(ids).to(study.device),
        decoder=decoder,
        block_length=None if study.block_causal else study.size.block_length,
        cache=study.cache if cache is None else cache,
        temperature=0.0,
        stop_at_eos=True,
        batch_size=study.size.sample_batch,
        seed=study.seed,
        progress=False,
    )
    assert out.sequences is not None and out.nfe is not None and out.lengths is not None  # noqa: PT018
    answers = out.sequences[:, PROMPT:].cpu()
    end = answers == END_ID
    nfe = {name: count.cpu().double() for name, count in out.nfe.items()}
    total = torch.stack(list(nfe.values())).sum(0)
    commits = torch.zeros_like(total)
    if out.commits is not None:
        commits = torch.stack([count.cpu().double() for count in out.commits.values()]).sum(0)
    return Written(answers.numpy(), end.any(-1), (out.lengths.cpu() - PROMPT).double(), total - commits, commits, nfe)


def commits_needed(tokens: Tensor, block_length: int) -> Tensor:
    """Passes that an exact block cache spends on storing the prompt's blocks and every finished block but the last."""
    decoded = (tokens.clamp(max=ANSWER - 1) // block_length + 1).double()  # the end of text is a token, too
    return PROMPT // block_length + decoded - 1


def measure(study: Study, problems: Problems, written: Written) -> dict[str, Any]:
    """Accuracies, and tokens per forward pass without and with commits, each with its standard error."""
    final, strict = (torch.from_numpy(right).double() for right in score(problems, written.answers))
    commits = written.commits
    if not commits.any():  # without a cache there are none: what one would add
        commits = commits_needed(written.tokens, study.size.block_length)
    return {
        "strict": estimate(strict).as_dict(),
        "final": estimate(final).as_dict(),
        "finished": float(written.finished.double().mean()),
        "tokens": float(written.tokens.mean()),
        "passes": float(written.passes.mean()),
        "commits": float(commits.mean()),
        "tokens_per_pass": estimate(written.tokens / written.passes).as_dict(),
        "tokens_per_forward": estimate(written.tokens / (written.passes + commits)).as_dict(),
    }


def wording_entropy(problems: Problems, answers: np.ndarray) -> dict[str, float]:
    """How evenly the wordings are used in sentences that are right: nats, and the most possible."""
    used = wordings(problems, answers)
    kinds = problems.operation
    entropies = []
    for kind in range(3):
        counts = np.bincount(used[(kinds == kind) & (used >= 0)], minlength=COUNT).astype(float)
        share = counts[counts > 0] / max(1.0, counts.sum())
        entropies.append(-(share * np.log(share)).sum())
    return {"nats": float(np.mean(entropies)), "most": float(np.log(COUNT))}
