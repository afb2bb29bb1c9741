"""Models of true size, and the ways to run each: mdkern's and the loop of its authors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mdkern
from benchmarks import block_cache, published
from benchmarks.bench_people import LLADA_8B, SMALL, bidirectional_llama
from mdkern import Denoiser, decoders
from mdkern.compat import dream
from mdkern.models.hf.compat import old_model_code

BLOCK = 32  # tokens
OURS, CACHED, THEIRS = "mdkern", "mdkern, cache", "authors' loop"


@dataclass(frozen=True)
class Way:
    """One way to write texts: ``run(prompts, written, steps)`` with so many steps for each 32 tokens."""

    name: str
    run: Callable[[Tensor, int, int], Any]
    alone: bool = False  # takes one text at a time


@dataclass(frozen=True)
class Subject:
    """A model and the ways to run it."""

    model: Any
    denoiser: Denoiser
    ways: list[Way]
    weights: int  # bytes that are allocated with the model alone
    skipped: str | None  # why the authors' loop is not among the ways


@dataclass(frozen=True)
class Family:
    label: str
    make: Callable[[Path | None, bool], Subject]
    written: int  # tokens
    rule: str
    greedy: bool = True  # both sides take the most probable tokens, so that their texts can be compared


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def subject(
    family: str, peers: Path | None, tiny: bool, ours: Callable[[Denoiser], list[Way]], theirs: Callable[[Any], Way]
) -> Subject:
    """The family's model of its authors' code with their loop, or one of transformers' of the same shape without it."""
    device = "cpu" if tiny else "cuda"
    loops = ("generate.py",) if family in ("llada", "sdar") else ()
    skipped = published.missing(peers, family, *loops)
    if skipped is None:
        assert peers is not None
        model = published.build(peers, family, tiny, device)
        weights = allocated()
        denoiser = mdkern.adapt(model)
        return Subject(model, denoiser, [*ours(denoiser), theirs(model)], weights, None)
    if family == "llada":
        model, denoiser = bidirectional_llama(SMALL if tiny else LLADA_8B, device)
    elif family == "sdar":
        denoiser = block_cache.qwen3(block_cache.SMALL if tiny else block_cache.SDAR_4B, 4, device)
        model = denoiser
    else:
        raise FileNotFoundError(f"{skipped}, and transformers has no class of that shape")
    return Subject(model, denoiser, ours(denoiser), allocated(), skipped)


def write(denoiser: Denoiser, prompts: Tensor, written: int, **options: Any) -> Any:
    """`mdkern.sample` for masks after prompts, as one batch."""
    blanks = prompts.new_full((len(prompts), written), denoiser.mask_id)
    ids = torch.cat((prompts, blanks), 1)
    return mdkern.sample(denoiser, input_ids=ids, batch_size=len(ids), seed=0, progress=False, **options)


def total_steps(written: int, steps: int) -> int:
    return steps * (written // BLOCK)


def llada(peers: Path | None, tiny: bool) -> Subject:
    """LLaDA's `generate`: in blocks of 32, the surest tokens of each step, greedily."""

    def ours(denoiser: Denoiser) -> list[Way]:
        def run(cache: str, prompts: Tensor, written: int, steps: int) -> Any:
            options: dict[str, Any] = {"decoder": "top_probability", "block_length": BLOCK, "temperature": 0.0}
            return write(denoiser, prompts, written, steps=total_steps(written, steps), cache=cache, **options)

        return [Way(OURS, partial(run, "none")), Way(f"{CACHED} dual", partial(run, "dual"))]

    def theirs(model: Any) -> Way:
        assert peers is not None
        generate = published.load(peers, "llada", "generate").generate

        def run(prompts: Tensor, written: int, steps: int) -> Any:
            options: dict[str, Any] = {"gen_length": written, "block_length": BLOCK, "temperature": 0.0}
            mask_id = model.config.mask_token_id
            return generate(model, prompts, steps=total_steps(written, steps), mask_id=mask_id, **options)

        return Way(THEIRS, run)

    return subject("llada", peers, tiny, ours, theirs)


def dream_7b(peers: Path | None, tiny: bool) -> Subject:
    """Dream's `diffusion_generate` with ``alg="entropy"``, greedily. In blocks with a cache the order is another."""

    def ours(denoiser: Denoiser) -> list[Way]:
        def whole(prompts: Tensor, written: int, steps: int) -> Any:
            count = total_steps(written, steps)
            decoder = dream.decoder_of(dream.DreamGenerationConfig(alg="entropy", steps=count), None)
            return write(denoiser, prompts, written, decoder=decoder, steps=count, temperature=0.0)

        def blocks(prompts: Tensor, written: int, steps: int) -> Any:
            options: dict[str, Any] = {"decoder": "entropy", "block_length": BLOCK, "cache": "dual"}
            return write(denoiser, prompts, written, steps=total_steps(written, steps), temperature=0.0, **options)

        return [Way(OURS, whole), Way(f"{CACHED} dual", blocks)]

    def theirs(model: Any) -> Way:
        assert peers is not None
        kind = published.load(peers, "dream", "generation_utils").DreamGenerationConfig

        def run(prompts: Tensor, written: int, steps: int) -> Any:
            options: dict[str, Any] = {"steps": total_steps(written, steps), "max_new_tokens": written}
            with old_model_code():
                config = kind(mask_token_id=model.config.mask_token_id, alg="entropy", temperature=0.0, **options)
                return model.diffusion_generate(prompts, config, attention_mask=torch.ones_like(prompts))

        return Way(THEIRS, run)

    return subject("dream", peers, tiny, ours, theirs)


def sdar(peers: Path | None, tiny: bool) -> Subject:
    """SDAR's `block_diffusion_generate` with its defaults: blocks and steps of 4, threshold 0.85, temperature 1."""

    def ours(denoiser: Denoiser) -> list[Way]:
        def run(prompts: Tensor, written: int, steps: int) -> Any:
            return write(denoiser, prompts, written, decoder=decoders.Threshold(0.85), temperature=1.0, cache="block")

        return [Way(f"{CACHED} block", run)]

    def theirs(model: Any) -> Way:
        assert peers is not None
        generate = published.load(peers, "sdar", "generate").block_diffusion_generate

        def run(prompts: Tensor, written: int, steps: int) -> Any:
            options: dict[str, Any] = {"gen_length": written, "block_length": 4, "denoising_steps": min(steps, 4)}
            with published.old_caches():
                return generate(
                    model, {"input_ids": prompts}, model.config.mask_token_id, confidence_threshold=0.85, **options
                )

        return Way(THEIRS, run, alone=True)

    return subject("sdar", peers, tiny, ours, theirs)


def llada2(peers: Path | None, tiny: bool) -> Subject:
    """LLaDA 2's own `generate` with its defaults: blocks and steps of 32, threshold 0.95, greedily, no cache."""

    def ours(denoiser: Denoiser) -> list[Way]:
        def run(prompts: Tensor, written: int, steps: int) -> Any:
            return write(denoiser, prompts, written, decoder=decoders.Threshold(0.95), temperature=0.0, cache="block")

        return [Way(f"{CACHED} block", run)]

    def theirs(model: Any) -> Way:
        def run(prompts: Tensor, written: int, steps: int) -> Any:
            options: dict[str, Any] = {"gen_length": written, "block_length": BLOCK, "steps": steps, "eos_id": -1}
            answer = model.generate(prompts, threshold=0.95, mask_id=model.config.mask_token_id, **options)
            return torch.cat((prompts, answer), 1)

        return Way(THEIRS, run, alone=True)

    return subject("llada2", peers, tiny, ours, theirs)


FAMILIES: dict[str, Family] = {
    "llada": Family("LLaDA-8B", llada, 64, "low-confidence remasking, blocks of 32"),
    "dream": Family("Dream-7B", dream_7b, 64, 'alg="entropy"'),
    "sdar": Family("SDAR-4B", sdar, 128, "threshold 0.85, blocks of 4, temperature 1", greedy=False),
    "llada2": Family("LLaDA 2 mini, 16B-A1B", llada2, 32, "threshold 0.95, blocks of 32"),
}
