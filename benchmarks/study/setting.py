"""What the study is made on: the models, the judge, held-out text, and how much of everything."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import environment, host_environment
from mdkern import DiT, Schedule, load_pair
from mdkern.digest import digest
from mdkern.engine.branches import alike, run_schedules
from mdkern.evaluation.corpus import windows
from mdkern.evaluation.intervals import estimate, paired
from mdkern.evaluation.search import Models
from mdkern.evaluation.text import judge as judge_sequences
from mdkern.evaluation.text import token_entropy

JUDGE = Path(__file__).parent.parent / "judge"
ALL_HEAVY = "all heavy"
JUDGING = 1.0  # what scoring a text costs, in heavy passes
GRID = 40  # equal segments in which fitted schedules and sandwiches can be written down


@dataclass(frozen=True)
class Size:
    """How much of everything; by default what the study is made with."""

    length: int = 256
    samples: int = 4096  # a point
    search_samples: int = 1024  # a schedule of the search
    decoder_samples: int = 1024  # a point of the decoders that look at the model
    segments: int = 10  # of the search
    light_segments: int = 4
    windows: int = 512  # of held-out text; the paper's 500
    masks: int = 32  # of each window, for the likelihood
    times: int = 20  # at which models are compared; a multiple of `segments`
    path_samples: int = 512
    ratios: tuple[float, ...] = (0.25, 1.0, 4.0)  # steps over tokens
    clock_runs: int = 3
    batch_size: int = 512

    def steps(self, ratio: float = 1.0) -> int:
        return max(1, round(ratio * self.length))


SIZES = {
    "full": Size(),
    "small": Size(32, 8, 8, 4, 5, 2, 16, 8, 20, 8, (0.25, 1.0), 1, 8),
    "tiny": Size(20, 4, 3, 2, 4, 2, 3, 2, 4, 3, (0.25, 1.0), 1, 4),
}


@dataclass
class Study:
    """The models by name, the judge, the text, and the size; and what all experiments do with them."""

    models: Mapping[str, DiT]  # named by their blocks, as 4, 6, 8, 10, 12 and 12b
    judge: Any
    size: Size
    text: Tensor | None = None  # int64 [N, length], held out
    source: str = ""  # of the text
    seed: int = 0
    found: dict[str, Any] = field(default_factory=dict)  # the parts that there are, by name
    search_file: Path = Path("study-search.jsonl")  # what the search has so far, a line for each schedule

    @cached_property
    def heavy(self) -> str:
        """The name of the deepest model, of several the first."""
        return max(sorted(self.models), key=lambda name: self.models[name].config.num_blocks)

    @cached_property
    def light(self) -> str:
        return min(sorted(self.models), key=lambda name: self.models[name].config.num_blocks)

    @cached_property
    def baseline(self) -> str | None:
        """The name of a second model as deep as the heavy one."""
        blocks = self.models[self.heavy].config.num_blocks
        same = [name for name in sorted(self.models) if self.models[name].config.num_blocks == blocks]
        return same[1] if len(same) > 1 else None

    @property
    def between(self) -> list[str]:
        """The names of the models between light and heavy, the lightest first."""
        rest = set(self.models) - {self.heavy, self.light, self.baseline}
        return sorted(rest, key=lambda name: self.models[name].config.num_blocks)

    @property
    def pair(self) -> dict[str, DiT]:
        return {"H": self.models[self.heavy], "L": self.models[self.light]}

    @property
    def device(self) -> torch.device:
        return self.models[self.heavy].embedding.device

    def cost(self, models: Mapping[str, DiT]) -> dict[str, float]:
        """Counted FLOPs of a pass that reveals one position, over the dearest model's, by name."""
        flops = {name: model.flops(self.size.length, 1) for name, model in models.items()}
        return {name: value / max(flops.values()) for name, value in flops.items()}

    def setting(self) -> dict[str, Any]:
        """What the numbers depend on, besides the machine."""
        return {
            "size": asdict(self.size) | {"ratios": list(self.size.ratios)},
            "seed": self.seed,
            "models": {name: digest(dict(model.named_parameters())) for name, model in self.models.items()},
            "blocks": {name: model.config.num_blocks for name, model in self.models.items()},
            "judge": digest(dict(self.judge.named_parameters())),
            "text": None if self.text is None else {"source": self.source, "digest": digest(self.text)},
        }

    def environment(self) -> dict[str, Any]:
        return environment() if self.device.type == "cuda" else host_environment()

    def with_earlier(self, part: str, name: str, found: Mapping[str, Any]) -> dict[str, Any]:
        """An entry of a part by models, and those that were measured before of models that are not at hand."""
        earlier = self.found.get(part, {}).get(name, {})
        return {model: value for model, value in earlier.items() if model not in self.models} | dict(found)

    def texts(self, count: int) -> Tensor:
        """int64 ``[N, length]``: held-out windows, `count` at most, on the device."""
        assert self.text is not None, "a part that needs text is not run without it"
        return self.text[torch.arange(min(count, len(self.text))) * len(self.text) // min(count, len(self.text))].to(
            self.device
        )

    def score(self, sequences: Tensor, given: int = 0) -> Tensor:
        """Judge, nats a token of what comes after the first `given`, float64 ``[N]``."""
        found = judge_sequences(self.judge, sequences)
        if given < 2:  # the first token has no likelihood
            return found.nats_per_token()
        before = judge_sequences(self.judge, sequences[:, :given])
        return (found.nats - before.nats) / (found.tokens - before.tokens)

    def run(
        self, schedules: Mapping[str, Models], *, models: Mapping[str, DiT] | None = None, **arguments: Any
    ) -> Iterator[tuple[list[str], Tensor]]:
        """Samples of schedules on the same seeds: the labels of each, and int64 ``[N, length]``."""
        labels: dict[Models, list[str]] = {}
        for label, schedule in schedules.items():
            labels.setdefault(schedule, []).append(label)
        options = {"batch_size": self.size.batch_size, "seed": self.seed} | arguments
        if "input_ids" not in options:
            options["length"] = self.size.length
        for schedule, sequences in run_schedules(self.pair if models is None else models, list(labels), **options):
            yield labels[schedule], sequences

    def points(
        self,
        schedules: Mapping[str, Models],
        *,
        models: Mapping[str, DiT] | None = None,
        against: Sequence[str] = (ALL_HEAVY,),
        given: int = 0,
        **arguments: Any,
    ) -> dict[str, Any]:
        """Judge's score of each schedule's samples, and its differences by pairs from some of them.

        Args:
            schedules: by label, all of the same number of segments.
            against: labels of those that each is compared with.
            arguments: of `sample`.
        """
        costs = self.cost(self.pair if models is None else models)
        scores, found = dict[str, Tensor](), dict[str, Any]()
        for labels, sequences in self.run(schedules, models=models, **arguments):
            value, entropy = self.score(sequences, given), estimate(token_entropy(sequences.cpu()))
            for label in labels:
                scores[label] = value
                found[label] = self.describe(schedules[label], costs) | {"token_entropy": entropy.as_dict()}
        for label, point in found.items():
            point["score"] = estimate(scores[label]).as_dict()
            point["over"] = differences(scores[label], {base: scores[base] for base in against})
        return {label: found[label] for label in schedules}

    @staticmethod
    def describe(schedule: Models, costs: Mapping[str, float]) -> dict[str, Any]:
        whole = Schedule.from_segments(schedule)
        return {
            "schedule": str(whole),
            "light_share": 1.0 - float(whole.shares().get("H", 0)),
            "flops_saved": 1.0 - sum(costs[name] for name in schedule) / len(schedule) / max(costs.values()),
        }


@dataclass(frozen=True)
class Part:
    """An experiment: what it does, what that costs, and what it cannot do without."""

    run: Callable[[Study], dict[str, Any]]
    passes: Callable[[Study], float]  # heavy forward passes of a sequence, judging included, as expected
    needs: tuple[str, ...] = ()  # other parts
    text: bool = False  # held-out text
    between: bool = False  # a model between light and heavy
    # Whether results have all models that are at hand; if not, the part is measured anew.
    whole: Callable[[Study, dict[str, Any]], bool] = lambda study, found: True


def differences(score: Tensor, bases: Mapping[str, Tensor]) -> dict[str, Any]:
    """How far a score is above others, pair by pair, by their names."""
    return {name: paired(score, base).as_dict() for name, base in bases.items()}


def load_study(
    size: Size,
    device: str,
    folder: Path | None = None,
    judge: Path = JUDGE,
    data: Path | None = None,
    seed: int = 0,
) -> Study:
    """The study of the shipped pair, or of the models in the subfolders of `folder`.

    Args:
        folder: its subfolders are named by blocks, as 4, 6, 8, 10, 12 and 12b; and ``tokenizer``.
        data: held-out text for the parts that need it.

    Raises:
        ValueError: fewer than two models, one that is not as deep as it is called, text that is too short.
    """
    from transformers import AutoTokenizer, GPT2LMHeadModel

    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    if folder is None:
        pair = load_pair(device, dtype)
        models = {str(model.config.num_blocks): model for model in (pair.heavy, pair.light)}
        tokenizer: Any = pair.tokenizer
    else:
        names = [path.name for path in sorted(folder.iterdir()) if re.fullmatch(r"\d+[a-z]?", path.name)]
        if len(names) < 2:
            raise ValueError(f"{folder} must have at least two models, in folders such as 4, 12 and 12b: {names}")
        models = {name: DiT.from_pretrained(folder / name, dtype, device) for name in names}
        for name, model in models.items():
            if model.config.num_blocks != int(re.sub(r"\D", "", name)):
                raise ValueError(f"{folder / name} has {model.config.num_blocks} blocks: name it so")
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    scorer: Any = GPT2LMHeadModel.from_pretrained(judge, dtype=torch.float32)
    text = None if data is None else windows(data, tokenizer, size.length, max(size.windows, size.samples))
    return Study(models, scorer.to(device).eval(), size, text, "" if data is None else data.name, seed)


def events(steps: int, length: int) -> float:
    """Expected passes of a sequence of the ancestral sampler: steps at which something is revealed."""
    return steps * (1.0 - (1.0 - 1.0 / steps) ** length)


def passes(schedules: Sequence[Models], costs: Mapping[str, float], steps: int, length: int, samples: int) -> float:
    """Heavy passes that schedules take which share what they have in common, and the judge's."""
    done, run = Models(), 0.0
    for schedule in sorted(set(schedules)):
        run += sum(costs[name] for name in schedule[alike(schedule, done) :]) / len(schedule)
        done = schedule
    return samples * (run * events(steps, length) + JUDGING * len(set(schedules)))


def sandwich(light: float, segments: int = GRID) -> Models:
    """Light at both ends, as equal segments.

    Raises:
        ValueError: half the share is no whole number of segments.
    """
    side = light * segments / 2
    if abs(side - round(side)) > 1e-9:
        raise ValueError(f"a sandwich of {light:.0%} light steps does not fit into {segments} segments")
    return ("L",) * round(side) + ("H",) * (segments - 2 * round(side)) + ("L",) * round(side)


def spread(schedule: Models, segments: int) -> Models:
    """The same schedule in more segments, a multiple of its own."""
    times, rest = divmod(segments, len(schedule))
    if rest:
        raise ValueError(f"{len(schedule)} segments cannot be written as {segments}")
    return tuple(name for name in schedule for _ in range(times))


def segments_of(schedule: Schedule, segments: int) -> Models:
    """A schedule of shares as equal segments.

    Raises:
        ValueError: a share is no whole number of segments.
    """
    parts = [(name, share * segments) for name, share in schedule.parts]
    if schedule.fixed or any(count.denominator != 1 for _, count in parts):
        raise ValueError(f"{schedule} does not fit into {segments} equal segments")
    return tuple(name for name, count in parts for _ in range(int(count)))
