"""Does a learned choice of positions beat the rules that need no training, on the shipped heavy model?

    python -m benchmarks.learning.choice --text gutenberg_test.txt.xz --device cuda --size full --seed 0

Windows of a text that the model has not seen have some tokens masked, in two tasks: *infill*, in the middle, at
temperature 0; and *continue*, at the end, at temperature 0.7 with the same noise at every step. Filters are fitted to
states of runs on the first windows, and a linear one is improved in use; then each rule writes the last windows, at
several bounds. What it writes is compared, by the number of passes, in a judge's likelihood, in token entropy, in
agreement with the text that the model writes one position at a time; and true texts in their exact likelihood under the
rule's sampler. A gain is a better judge's likelihood than that of `Threshold` at as many passes, window by window, by
more than two standard errors and without less entropy.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mdkern
from benchmarks.harness import RESULTS, environment, host_environment, write_text_whole
from mdkern import Denoiser, decoders
from mdkern.decoders import Learned, Policy
from mdkern.decoders.base import Stepwise
from mdkern.evaluation.intervals import estimate, paired
from mdkern.evaluation.text import judge, token_entropy
from mdkern.models import adapt
from mdkern.pretrained import FOLDER
from training.data import TextEncoder
from training.options import command_parser
from training.policy.__main__ import masked, read_texts
from training.policy.closed_loop import Strategy, improve, value_in_use
from training.policy.fit import HIDDEN, fit_filter, report, split
from training.policy.states import ReferenceRun, States, collect

JUDGE = Path(__file__).parent.parent / "judge"
TASKS = {"infill": 0.0, "continue": 0.7}  # with their temperatures
PLAIN = "threshold"  # the rule that others are compared with


@dataclass(frozen=True)
class Size:
    """How much of everything; by default what docs/learning.md is made with."""

    fitting: int = 2048  # texts
    testing: int = 320
    likelihood: int = 128  # of these
    chunk: int = 1024
    length: int = 256
    written: int = 128
    block_length: int = 32
    steps: int = 1500
    price: float = 0.5  # of a pass per token, in nats per token
    loop_texts: int = 192
    rounds: int = 5  # 0: no filter is improved in use
    pairs: int = 10
    thresholds: tuple[float, ...] = (0.9, 0.6, 0.4, 0.3, 0.2, 0.1)
    factors: tuple[float, ...] = (0.5, 1.0, 1.4)
    gammas: tuple[float, ...] = (0.3, 1.0, 2.5)
    quotas: tuple[int, ...] = (16, 8)  # steps of a block
    bounds: tuple[float, ...] = (0.9, 0.75, 0.6, 0.45)


SIZES = {
    "full": Size(),
    "small": Size(fitting=48, testing=48, likelihood=8, chunk=48, length=64, written=16, block_length=16, rounds=0,
                  thresholds=(0.9, 0.6, 0.4, 0.2), factors=(), gammas=(), quotas=(), bounds=(0.75, 0.5)),
    "tiny": Size(fitting=4, testing=3, likelihood=2, chunk=3, length=24, written=8, block_length=4, steps=10,
                 loop_texts=2, rounds=1, pairs=1, thresholds=(0.9, 0.3), factors=(1.0,), gammas=(1.0,), quotas=(2,),
                 bounds=(0.6,)),
}  # fmt: skip


@dataclass
class Setting:
    """One seed: the model, the judge, and the texts, which differ from seed to seed."""

    size: Size
    seed: int
    device: torch.device
    text: str
    folder: Path

    @cached_property
    def denoiser(self) -> Denoiser:
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return adapt(mdkern.DiT.from_pretrained(FOLDER / "heavy", dtype, self.device))

    @cached_property
    def judging(self) -> Any:
        from transformers import GPT2LMHeadModel

        model: Any = GPT2LMHeadModel.from_pretrained(JUDGE, dtype=torch.float32)
        return model.to(self.device).eval()

    @cached_property
    def texts(self) -> Tensor:
        """The windows for fitting, then those for testing; of this seed."""
        size, encoder = self.size, TextEncoder.load(FOLDER / "tokenizer")
        count = size.fitting + size.testing
        return read_texts(self.text, encoder, count * (self.seed + 1), size.length)[count * self.seed :]

    def masked(self, texts: Tensor, task: str) -> Tensor:
        return masked(texts, task, self.size.written, self.denoiser.mask_id).to(self.device)

    def options(self, task: str, **more: Any) -> dict[str, Any]:
        return {"block_length": self.size.block_length, "temperature": TASKS[task], "seed": self.seed} | more


@lru_cache
def still_kind(kind: type[Any]) -> type[Any]:
    return type(f"Still{kind.__name__}", (kind,), {"fresh_noise": False})


def still(decoder: Stepwise) -> Any:
    """The decoder, with a position's noise the same at every step."""
    if isinstance(decoder, Learned):
        return replace(decoder, fresh_noise=False)
    return still_kind(type(decoder))(**{field.name: getattr(decoder, field.name) for field in fields(decoder)})  # type: ignore[arg-type]


def rules(size: Size, policies: dict[str, Policy]) -> list[tuple[str, float, Stepwise, dict[str, Any]]]:
    """Name, bound, decoder and further arguments of `mdkern.sample` of all that is compared."""
    found: list[tuple[str, float, Stepwise, dict[str, Any]]] = []
    found += [(PLAIN, bound, decoders.Threshold(bound), {}) for bound in size.thresholds]
    found += [("factor", bound, decoders.Factor(bound), {}) for bound in size.factors]
    found += [("entropy bound", bound, decoders.EntropyBound(bound), {}) for bound in size.gammas]
    for name, decoder in (("top probability", decoders.TopProbability()), ("margin", decoders.Margin())):
        found += [(name, steps, decoder, {"steps_per_block": steps}) for steps in size.quotas]
    for name, policy in policies.items():
        bounds = (0.35, 0.5, 0.65) if name == "closed loop" else size.bounds  # its bound was 1/2 when it was improved
        found += [(name, bound, Learned(policy, bound), {}) for bound in bounds]
    return found


def fit(setting: Setting, task: str) -> tuple[dict[str, Policy], dict[str, Any]]:
    """The filters, and how good they are on states of texts that they were not fitted to."""
    size, denoiser = setting.size, setting.denoiser
    ids = setting.masked(setting.texts[: size.fitting], task)
    parts = [
        collect(denoiser, ids[first : first + size.chunk], first, size.block_length, TASKS[task], setting.seed)[0]
        for first in range(0, size.fitting, size.chunk)
    ]
    fitting, testing = split(States.join(parts), 0.25, size.fitting)
    facts: dict[str, Any] = {"bound": 0.5, "block_length": size.block_length, "vocab_size": denoiser.vocab_size}
    policies = {
        name: fit_filter(fitting, hidden, setting.seed, size.steps, **facts)
        for name, hidden in (("linear", None), ("mlp", HIDDEN))
    }
    return policies, report(testing, policies)


def close_loop(setting: Setting, task: str, linear: Policy) -> tuple[Policy, list[float]]:
    """The linear filter improved in use, and its values."""
    size = setting.size
    ((weight, bias),) = linear.layers
    policy = replace(linear, layers=((weight.clone(), bias.clone()),))
    ids = setting.masked(setting.texts[: size.loop_texts], task)
    options = setting.options(task, batch_size=min(len(ids), size.chunk))
    value_of = value_in_use(setting.denoiser, setting.judging, ids, size.price, **options)
    path = setting.folder / f"closed-loop-{task}-{setting.seed}.json"
    history = improve(policy, value_of, path, setting.seed, Strategy(rounds=size.rounds, pairs=size.pairs))
    return policy, [entry["value"] for entry in history]


@dataclass(frozen=True)
class Written:
    """What a rule wrote, a number a text."""

    nats: Tensor  # float64, of the whole text, by the judge, per written token
    entropy: Tensor  # float64, of the whole text
    agreement: Tensor  # float64, share of the written tokens that are the reference's
    passes: Tensor  # float64


def write(setting: Setting, task: str, ids: Tensor, reference: Tensor | None, decoder: Any, **more: Any) -> Written:
    options = setting.options(task, batch_size=min(len(ids), setting.size.chunk), **more)
    out = mdkern.sample(setting.denoiser, input_ids=ids, decoder=decoder, progress=False, **options)
    assert out.sequences is not None
    assert out.nfe is not None
    wanted = ids == setting.denoiser.mask_id
    same = torch.ones_like(wanted) if reference is None else out.sequences == reference
    return Written(
        judge(setting.judging, out.sequences).nats.cpu() / setting.size.written,
        token_entropy(out.sequences.cpu()),
        ((same & wanted).sum(-1) / wanted.sum(-1)).double().cpu(),
        sum(out.nfe.values()).double().cpu(),  # type: ignore[union-attr]
    )


def exact_nats(setting: Setting, task: str, texts: Tensor, decoder: Stepwise, **more: Any) -> Tensor:
    """-log p of true texts under the rule's sampler at temperature 1, per written token."""
    texts = texts.to(setting.device)
    wanted = setting.masked(texts.cpu(), task) == setting.denoiser.mask_id
    found = mdkern.likelihood(
        setting.denoiser, input_ids=texts, wanted=wanted, method="decoder", decoder=decoder,
        by="top1" if decoder.scores_draw else None, block_length=setting.size.block_length,
        batch_size=setting.size.chunk, progress=False, **more,
    )  # fmt: skip
    return found.nats.double().cpu() / setting.size.written


def at_passes(curve: Sequence[Written], passes: float) -> Written | None:
    """What a curve's rule would have written in so many passes, text by text, between the two settings around it."""
    ordered = sorted(curve, key=lambda written: float(written.passes.mean()))
    for less, more in pairwise(ordered):
        low, high = float(less.passes.mean()), float(more.passes.mean())
        if low <= passes <= high and low < high:
            share = (passes - low) / (high - low)
            return Written(*(torch.lerp(getattr(less, f.name), getattr(more, f.name), share) for f in fields(Written)))
    return None


def compare(setting: Setting, task: str, policies: dict[str, Policy], say: Callable[[str], None]) -> list[Any]:
    """Each rule at each bound on the texts for testing."""
    size = setting.size
    texts = setting.texts[size.fitting : size.fitting + size.testing]
    ids = setting.masked(texts, task)
    reference = mdkern.sample(
        setting.denoiser, input_ids=ids, decoder=ReferenceRun(), progress=False,
        **setting.options(task, batch_size=min(len(ids), size.chunk)),
    ).sequences  # fmt: skip
    rows, plain = [], []
    for name, bound, decoder, more in rules(size, policies):
        try:
            written = write(setting, task, ids, reference, still(decoder), **more)
            nats = exact_nats(setting, task, texts[: size.likelihood], decoder, **more)
        except Exception:
            say(traceback.format_exc())
            continue
        plain += [written] if name == PLAIN else []
        row: dict[str, Any] = {"rule": name, "bound": bound}
        row |= {f.name: estimate(getattr(written, f.name)).as_dict() for f in fields(Written)}
        row["exact_nats"] = estimate(nats).as_dict()
        beside = None if name == PLAIN else at_passes(plain, float(written.passes.mean()))
        if beside is not None:  # of the plain rule at as many passes
            row |= {
                f"{what}_over_plain": paired(getattr(written, what), getattr(beside, what)).as_dict()
                for what in ("nats", "entropy", "agreement")
            }
            judged, varied = row["nats_over_plain"], row["entropy_over_plain"]
            row["gains"] = bool(
                judged["mean"] < -2 * judged["standard_error"] and varied["mean"] > -2 * varied["standard_error"]
            )
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    names = f"{'rule':16} {'bound':>6} {'passes':>7} {'judge':>16} {'entropy':>7} {'agree':>6} {'exact':>6}"
    lines = [f"{names}  over {PLAIN}"]
    for row in rows:
        beside = row.get("nats_over_plain")
        over = "" if beside is None else f"{beside['mean']:+.4f} ± {beside['standard_error']:.4f}"
        lines.append(
            f"{row['rule']:16} {row['bound']:6g} {row['passes']['mean']:7.1f} {row['nats']['mean']:7.4f} ±"
            f" {row['nats']['standard_error']:.4f} {row['entropy']['mean']:7.3f} {row['agreement']['mean']:6.3f}"
            f" {row['exact_nats']['mean']:6.3f}  {over}{' gains' if row.get('gains') else ''}"
        )
    return "\n".join(lines)


def run_task(setting: Setting, task: str, say: Callable[[str], None]) -> dict[str, Any]:
    began = time.monotonic()
    policies, offline = fit(setting, task)
    say(f"{task}: fitted after {time.monotonic() - began:.0f} s")
    found: dict[str, Any] = {"offline": offline}
    if task == "infill" and setting.size.rounds:
        policies["closed loop"], found["loop"] = close_loop(setting, task, policies["linear"])
        say(f"{task}: loop closed after {time.monotonic() - began:.0f} s")
    found["rows"] = compare(setting, task, policies, say)
    say(f"{task}: compared after {time.monotonic() - began:.0f} s\n{table(found['rows'])}")
    return found


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.learning.choice", __doc__)
    parser.add_argument("--text", required=True, help="a text that the pair was not trained on, plain or .xz")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="tiny", help="(default: tiny)")
    parser.add_argument("--seed", type=int, default=0, help="also which windows of the text are used")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--runs", metavar="FOLDER", type=Path, default=Path("runs/learning"), help="of closed loops")
    parser.add_argument("--output", metavar="FILE", type=Path, help="(default: full: benchmarks/results, else runs/)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the tasks that are not in the file yet, each kept as soon as it is done. The exit code is 1 if one failed."""
    asked = build_parser().parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(message)s", stream=sys.stdout)
    path = asked.output or (RESULTS if asked.size == "full" else Path("runs")) / "learning-choice.json"
    asked.runs.mkdir(parents=True, exist_ok=True)
    size, device = SIZES[asked.size], torch.device(asked.device)
    setting = Setting(size, asked.seed, device, asked.text, asked.runs)
    kept = json.loads(json.dumps(asdict(size)))
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"setting": kept, "seeds": {}}
    if content["setting"] != kept:
        print(f"{path} has another setting: give another --output")
        return 2
    found, failed = content["seeds"].setdefault(str(asked.seed), {}), False
    for task in (task for task in asked.tasks if task not in found):
        try:
            known = environment() if device.type == "cuda" else host_environment()
            found[task] = run_task(setting, task, lambda line: print(line, flush=True)) | {"environment": known}
        except Exception:
            print(traceback.format_exc(), flush=True)
            failed = True
            continue
        write_text_whole(path, json.dumps(content, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
