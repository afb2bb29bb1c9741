"""The parts of the experiments in the order in which they are run: a function each, and what it needs."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.learning import gsm
from benchmarks.learning.problems import ANSWER, END_ID, PROMPT, Stream, prompts, score
from benchmarks.learning.problems_choice import compare_choices
from benchmarks.learning.setting import (
    ANSWER_STREAM,
    CAREFUL,
    DECODERS,
    ENOUGH,
    Study,
    decoder_of,
    measure,
    wording_entropy,
    write_answers,
)
from mdkern import DiT, Schedule
from mdkern.decoders import Threshold
from mdkern.evaluation.intervals import estimate
from mdkern.models import load_dit, save_dit
from training.checkpoint import read_records
from training.finetune import build_parser, fit
from training.loop import LOG_FILE, World
from training.pairs import Epochs, Pairs, Source

log = logging.getLogger(__name__)

FINAL, ANSWERS_FILE = "final", "answers.npy"
TUNED = {  # objective, and whether on the base model's own answers or on fresh true ones
    "oput": ("oput", True),
    "masked": ("masked", True),
    "supervised": ("sft", True),
    "uniform": ("uniform", True),
    "masked_true": ("masked", False),
}
SCHEDULES = {  # of the light and the heavy model, by share of the text that is written
    "all heavy": [("H", 1.0)],
    "light first": [("L", 0.25), ("H", 0.75)],
    "light last": [("H", 0.75), ("L", 0.25)],
    "sandwich": [("L", 0.125), ("H", 0.75), ("L", 0.125)],
    "half light first": [("L", 0.5), ("H", 0.5)],
    "all light": [("L", 1.0)],
}


@dataclass(frozen=True)
class Part:
    """An experiment, and the parts that must be there before."""

    run: Callable[[Study, dict[str, Any]], dict[str, Any]]
    needs: tuple[str, ...] = ()
    seconds: float = field(default=60, compare=False)  # about, at full size on an H200


def arguments(study: Study, name: str, objective: str, *options: str) -> Any:
    """The arguments of a fine-tuning run; starting it again goes on where it stopped."""
    size = study.size
    command = [
        "--model", ".", "--data", ".", "--out", str(study.runs / str(study.seed) / name), "--objective", objective,
        "--batch-size", str(size.batch_size), "--seed", str(study.seed), "--device", str(study.device),
        "--round-to", str(PROMPT), "--weight-decay", "0.05", "--lr-floor", "0", "--log-every", "50",
        "--checkpoint-every", "60", "--workers", "6" if study.device.type == "cuda" else "1",
    ]  # fmt: skip
    args = build_parser().parse_args([*command, *options])
    args.length = PROMPT + ANSWER
    return args


def train(study: Study, args: Any, model: DiT, source: Source, steps: int, settings: dict[str, Any]) -> DiT:
    """Train a model, from its checkpoint if there is one, and save it. A finished one is loaded."""
    if (args.out / FINAL).is_dir():
        return load_dit(args.out / FINAL, device=study.device)
    torch.compiler.reset()
    final = fit(args, model, source, steps, World(0, 1, study.device), time.monotonic(), settings)
    if final is None:
        raise KeyboardInterrupt  # a signal came; what was trained is in the checkpoint
    save_dit(final, args.out / FINAL)
    return final


def losses(folder: Path) -> dict[str, Any]:
    """Of a training run's log: about 50 means over equal runs of steps, and seconds."""
    records = [record for _, record in read_records(folder / LOG_FILE)]
    width = max(1, len(records) // 50)
    values = torch.tensor([record["loss"] for record in records], dtype=torch.float64)
    return {
        "steps": len(records),
        "mean_over": width,
        "losses": values[: len(values) // width * width].view(-1, width).mean(1).tolist(),
        "seconds": records[-1].get("seconds"),
    }


def train_base(study: Study, blocks: int, name: str) -> tuple[DiT, dict[str, Any]]:
    """A model from scratch, in rounds until it answers carefully; each round's rate falls from its peak to 0."""
    size, rounds = study.size, []
    problems = study.test_problems()
    model = study.fresh(blocks)
    for number in range(size.base_rounds):
        options = ["--optimizer", "muon", "--lr", str(size.lr), "--muon-lr", str(size.muon_lr), "--warmup", "100"]
        options += ["--ema-decay", "0.998", *([] if size.compiled else ["--no-compile"])]
        args = arguments(study, f"{name}-{number}", "sft", *options)
        source = Stream(size.batch_size, seed=study.seed * size.base_rounds + number)
        model = train(study, args, model, source, size.base_steps, {"round": number})
        written = write_answers(study, study.for_sampling(load(study, args.out)), problems, Threshold(CAREFUL))
        found = measure(study, problems, written)
        rounds.append(losses(args.out) | {"careful": found})
        print(f"seed {study.seed}: {name}, round {number}: strict {found['strict']['mean']:.4f}", flush=True)
        if found["strict"]["mean"] >= ENOUGH or name != "base":
            break
    target = study.runs / str(study.seed) / name / FINAL
    shutil.copytree(args.out / FINAL, target, dirs_exist_ok=True)
    parameters = sum(p.numel() for p in model.parameters())
    return model, {"rounds": rounds, "parameters": parameters, "careful": rounds[-1]["careful"]}


def load(study: Study, folder: Path) -> DiT:
    return load_dit(folder / FINAL, device=study.device)


def model_of(study: Study, name: str) -> DiT:
    """A trained model, as it is sampled from."""
    return study.for_sampling(load(study, study.runs / str(study.seed) / name))


def base(study: Study, found: dict[str, Any]) -> dict[str, Any]:
    return train_base(study, study.size.blocks, "base")[1]


def light(study: Study, found: dict[str, Any]) -> dict[str, Any]:
    return train_base(study, study.size.light_blocks, "light")[1]


def answers(study: Study, found: dict[str, Any]) -> dict[str, Any]:
    """The base model's own answers to problems of the training kind; those without an end are dropped."""
    problems = study.problems(study.size.answers, ANSWER_STREAM, held_out=False)
    written = write_answers(study, model_of(study, "base"), problems, Threshold(CAREFUL))
    _, strict = score(problems, written.answers)
    ids = np.concatenate((prompts(problems), written.answers), 1)[written.finished.numpy()]
    np.save(study.runs / str(study.seed) / ANSWERS_FILE, ids.astype(np.int16))
    return {
        "answers": len(problems),
        "finished": float(written.finished.double().mean()),
        "strict": estimate(torch.from_numpy(strict).double()).as_dict(),
        "wording": wording_entropy(problems, written.answers),
    }


def own_answers(study: Study) -> Pairs:
    """The pairs of `answers`, each closed by one end of text."""
    ids = np.load(study.runs / str(study.seed) / ANSWERS_FILE).astype(np.int64)
    if not len(ids):
        raise ValueError("the base model has not finished any answer: train it for longer")
    lengths = PROMPT + (ids[:, PROMPT:] == END_ID).argmax(1) + 1
    kept = np.arange(ids.shape[1]) < lengths[:, None]
    return Pairs(ids[kept], np.concatenate(([0], lengths.cumsum())), np.full(len(ids), PROMPT))


@dataclass(frozen=True)
class Wide:
    """Pairs of an epoch padded to the full width, whatever the longest of a batch is: one shape."""

    source: Source
    width: int = PROMPT + ANSWER

    def __call__(self, step: int) -> Any:
        pairs = self.source(step)
        more = ((0, 0), (0, self.width - pairs.ids.shape[1]))
        return pairs._replace(ids=np.pad(pairs.ids, more, constant_values=END_ID))


def tune(study: Study, found: dict[str, Any], name: str) -> dict[str, Any]:
    """Train the base model on with an objective, all for the same number of steps."""
    size, (objective, own) = study.size, TUNED[name]
    options = ["--lr", str(size.tune_lr), "--warmup", "30", "--ema-decay", "0.99", "--no-compile"]
    args = arguments(study, name, objective, *options)
    source: Source = Stream(size.batch_size, seed=study.seed + (1 << 20))
    settings: dict[str, Any] = {"source": "true"}
    if own:
        pairs = own_answers(study)
        source, settings = Wide(Epochs(pairs, size.batch_size, END_ID, study.seed)), {"source": pairs.sha256}
    train(study, args, load(study, study.runs / str(study.seed) / "base"), source, size.tune_steps, settings)
    return losses(args.out)


def evaluate(study: Study, found: dict[str, Any], name: str) -> dict[str, Any]:
    """Each way of decoding at each threshold, on the same problems."""
    problems, model = study.test_problems(), model_of(study, name)
    curves: dict[str, list[dict[str, Any]]] = {}
    for decoder in DECODERS:
        curves[decoder] = []
        for threshold in study.size.thresholds:
            written = write_answers(study, model, problems, decoder_of(decoder, threshold))
            curves[decoder].append({"threshold": threshold} | measure(study, problems, written))
    last = write_answers(study, model, problems, Threshold(CAREFUL))
    return {"curves": curves, "wording": wording_entropy(problems, last.answers)}


def scheduling(study: Study, found: dict[str, Any]) -> dict[str, Any]:
    """The light model at some of the steps, decoded carefully and in parallel."""
    problems = study.test_problems()
    models = {"H": model_of(study, "base"), "L": model_of(study, "light")}
    rows = []
    for threshold in study.size.thresholds:
        for label, shares in SCHEDULES.items():
            schedule = Schedule.from_shares(shares)
            written = write_answers(study, models, problems, Threshold(threshold), schedule, cache="none")
            passes = {name: float(count.mean()) for name, count in written.nfe.items()}
            rows.append(
                {"threshold": threshold, "label": label, "schedule": str(schedule), "passes_by_model": passes}
                | measure(study, problems, written)
            )
    return {"rows": rows, "blocks": {name: model.config.num_blocks for name, model in models.items()}}


def learned(study: Study, found: dict[str, Any]) -> dict[str, Any]:
    """A learned choice of positions, for the base model."""
    return compare_choices(study, model_of(study, "base"))


PARTS: dict[str, Part] = {
    "base": Part(base, seconds=150),
    "answers": Part(answers, ("base",), 20),
    "oput": Part(partial(tune, name="oput"), ("answers",), 40),
    "masked": Part(partial(tune, name="masked"), ("answers",), 30),
    "eval_oput": Part(partial(evaluate, name="oput"), ("oput",), 40),
    "eval_masked": Part(partial(evaluate, name="masked"), ("masked",), 40),
    "eval_base": Part(partial(evaluate, name="base"), ("base",), 40),
    "supervised": Part(partial(tune, name="supervised"), ("answers",), 30),
    "eval_supervised": Part(partial(evaluate, name="supervised"), ("supervised",), 40),
    "uniform": Part(partial(tune, name="uniform"), ("answers",), 30),
    "eval_uniform": Part(partial(evaluate, name="uniform"), ("uniform",), 40),
    "masked_true": Part(partial(tune, name="masked_true"), ("base",), 30),
    "eval_masked_true": Part(partial(evaluate, name="masked_true"), ("masked_true",), 40),
    "learned": Part(learned, ("base",), 60),
    "light": Part(light, ("base",), 60),
    "scheduling": Part(scheduling, ("light",), 60),
    "gsm": Part(gsm.gsm, (), 120),
}
