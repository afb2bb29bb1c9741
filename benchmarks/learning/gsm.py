"""Supervised fine-tuning on text in the format of GSM8K: what is learnt of it, the end of text before all.

The shipped heavy model is far too small to solve a problem; what can be asked is whether the loss falls at every
masking rate, whether answers end where answers end, and what becomes of them at other lengths than those of training.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mdkern import load_pair, sample
from mdkern.evaluation.intervals import estimate
from mdkern.files import open_text
from training.data import TextEncoder
from training.evaluate import held_out_responses
from training.finetune import build_parser, fit
from training.loop import World
from training.pairs import Epochs, Pairs

if TYPE_CHECKING:
    from benchmarks.learning.setting import Study
    from mdkern import DiT

ROUND_TO = 32  # columns of which the width of a batch is a multiple
RANDOM = {"padded to the batch": 0.0, "random length": 0.1}  # share of steps that are cut to a random length
CALCULATOR = re.compile(r"<<[^>]*>>")
TOKENIZER = Path(__file__).parents[2] / "mdkern" / "pretrained" / "tokenizer"


def read(path: Path, encoder: TextEncoder, most: int) -> Pairs:
    """Questions and answers without the marks for a calculator, those of at most so many tokens.

    Raises:
        ValueError: there are none.
    """
    tokens: list[int] = []
    starts, prompts = [0], []
    with open_text(path) as file:
        for line in file:
            record = json.loads(line)
            prompt = encoder.encode([record["question"] + "\n"])
            response = [*encoder.encode([CALCULATOR.sub("", record["answer"])]), encoder.eos_id]
            if len(prompt) + len(response) <= most:
                tokens += prompt + response
                starts.append(len(tokens))
                prompts.append(len(prompt))
    if not prompts:
        raise ValueError(f"{path} has no pair of at most {most} tokens")
    return Pairs(np.array(tokens), np.array(starts), np.array(prompts))


def endings(study: Study, model: DiT, pairs: Pairs, length: int) -> dict[str, Any]:
    """Answers to test questions that leave room at this length: how many end, and how long they are."""
    eos_id, mask_id = model.config.eos_id, model.config.mask_id
    assert isinstance(eos_id, int)
    fits = np.flatnonzero(pairs.lengths <= length)[: study.size.gsm_test]
    padded = pairs.padded(fits, eos_id)
    ids = np.full((len(fits), length), mask_id)
    for row, prompt in enumerate(padded.prompt_lengths):
        ids[row, :prompt] = padded.ids[row, :prompt]
    out = sample(
        study.for_sampling(model),
        input_ids=torch.from_numpy(ids).to(study.device),
        decoder="top_probability",
        block_length=32,
        temperature=0.0,
        stop_at_eos=True,
        batch_size=study.size.sample_batch,
        seed=study.seed,
        progress=False,
    )
    assert out.sequences is not None and out.lengths is not None  # noqa: PT018
    prompt = torch.from_numpy(padded.prompt_lengths)
    ended = (out.lengths.cpu() < length).double()
    return {
        "length": length,
        "answers": len(fits),
        "ended": estimate(ended).as_dict(),
        "tokens": estimate((out.lengths.cpu() - prompt).double()).as_dict(),
        "true_tokens": float((pairs.lengths[fits] - padded.prompt_lengths - 1).mean()),
    }


def gsm(study: Study, found: dict[str, Any]) -> dict[str, Any]:
    """Fine-tune with and without random lengths; the held-out loss by t and kind of token, and where answers end."""
    assert study.gsm is not None
    encoder = TextEncoder.load(TOKENIZER)
    heavy = load_pair(study.device, torch.float32).heavy
    most = max(study.size.gsm_lengths)
    training, test = (read(study.gsm / f"gsm8k_{name}.jsonl.xz", encoder, most) for name in ("train", "test"))
    size, world = study.size, World(0, 1, study.device)

    def held_out(model: DiT) -> dict[str, Any]:
        samples = 4 * size.gsm_test
        return held_out_responses(model, test, samples, min(64, samples), world, study.seed, ROUND_TO)

    rows: dict[str, Any] = {"before": held_out(heavy) | {"endings": endings_of(study, heavy, test)}}
    steps = max(1, int(size.gsm_epochs * len(training) / size.gsm_batch))
    for label, share in RANDOM.items():
        out = study.runs / str(study.seed) / f"gsm-{share}"
        options = [
            "--model", ".", "--data", ".", "--out", str(out), "--batch-size", str(size.gsm_batch), "--seed",
            str(study.seed), "--device", str(study.device), "--lr", "4e-4", "--warmup", str(min(30, steps // 10)),
            "--ema-decay", "0.99" if steps > 500 else "0.9", "--round-to", str(ROUND_TO), "--random-length",
            str(share), "--no-compile", "--workers", "4" if study.device.type == "cuda" else "1",
        ]  # fmt: skip
        args = build_parser().parse_args(options)
        args.length = most
        source = Epochs(training, size.gsm_batch, encoder.eos_id, study.seed, ROUND_TO)
        model = load_pair(study.device, torch.float32).heavy
        tuned = fit(args, model, source, steps, world, time.monotonic(), {"data_sha256": training.sha256})
        if tuned is None:
            raise KeyboardInterrupt
        rows[label] = held_out(tuned) | {"endings": endings_of(study, tuned, test)}
    return {"pairs": len(training), "test": len(test), "steps": steps, "rows": rows}


def endings_of(study: Study, model: DiT, pairs: Pairs) -> list[dict[str, Any]]:
    return [endings(study, model, pairs, length) for length in study.size.gsm_lengths]
