"""Where the time goes: backbone, head with sampling, and everything else, for three samplers of the same models.

This is the profile of Sedykh et al. (2604.02340: the output layer takes 59.9 % of the run at 12 blocks, 81.6 % at 4)
for `eager`, MDLM's sampler as its code runs it; `compiled`, the baseline of `mdkern.profiling.compiled`; and mdkern.

In the loops of the first two, backbone and head are timed separately over a few steps. A run of T steps is then counted
as T median steps and the closing pass. mdkern's step is one CUDA graph, which cannot be timed inside, so whole runs are
timed in three ways: as they are; with a backbone that costs nothing; and with a head of 128 columns as well. The
differences are the backbone, the head with sampling, and the rest: plan, packing, bookkeeping and launches.
"""

from __future__ import annotations

import copy
import logging
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mdkern.files import replacing
from mdkern.models import Denoiser, DiT, DiTConfig, adapt
from mdkern.models.denoiser import Head
from mdkern.output import SampleOutput
from mdkern.profiling.compiled import Compiled, Wrapped, ddpm_compiled, plain_hidden
from mdkern.profiling.eager import ddpm
from mdkern.sampling import sample
from mdkern.schedule import Schedule

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

PAPER_VOCAB, PAPER_LENGTH, PAPER_STEPS, PAPER_BATCH = 50_258, 1024, 1000, 16
FEW_COLUMNS = 128  # vocabulary of a head that costs next to nothing
WARM_STEPS = 3


@dataclass(frozen=True)
class Setting:
    """What is sampled: one batch of `batch_size` sequences of `length` tokens in `steps` steps."""

    batch_size: int = PAPER_BATCH
    length: int = PAPER_LENGTH
    steps: int = PAPER_STEPS


@dataclass(frozen=True)
class StepTimes:
    """Seconds in each timed step of a sampler that runs every step."""

    backbone: list[float]
    head: list[float]  # head and sampling
    closing: float  # head and sampling of the closing pass

    def median_step(self) -> float:
        return statistics.median(self.steps())

    def steps(self) -> list[float]:
        return [backbone + head for backbone, head in zip(self.backbone, self.head)]

    def run(self, steps: int) -> float:
        """Seconds of a run of `steps` steps: that many median steps, and the closing pass."""
        return steps * self.median_step() + statistics.median(self.backbone) + self.closing


@dataclass(frozen=True)
class Profile:
    """Seconds of a whole run by what they were spent on."""

    model: str
    sampler: str
    backbone: float
    head: float  # with sampling
    other: float
    measured: str  # what was timed

    @property
    def total(self) -> float:
        return self.backbone + self.head + self.other

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"total": self.total, "head_share": self.head / self.total}


class Clock:
    """Times of named marks, by CUDA events on a GPU, which do not wait, or by the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        """Mark the beginning of what is called `name`."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.perf_counter()))

    def laps(self, name: str) -> list[float]:
        """Seconds from each mark of that name to the mark after it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        pairs = [(begin, end) for (n, begin), (_, end) in zip(self.marks, self.marks[1:]) if n == name]
        if self.device.type == "cuda":
            return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]
        return [end - begin for begin, end in pairs]


class Clocked(Wrapped):
    """A denoiser that marks where its backbone begins and where it ends."""

    def __init__(self, inner: Denoiser, clock: Clock) -> None:
        super().__init__(inner)
        self.clock = clock

    def hidden(
        self,
        input_ids: Tensor,
        t: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        self.clock.mark("backbone")
        hidden = self.inner.hidden(input_ids, t, positions, attention_mask)
        self.clock.mark("head")
        return hidden


class Unpadded(Wrapped):
    """A `DiT` run as MDLM's code does: by PyTorch's own operations, with a vocabulary that is not padded."""

    def __init__(self, model: DiT) -> None:
        super().__init__(adapt(model))
        assert self.head.weight is not None
        vocab_size = model.config.vocab_size
        self.head = Head(self.head.weight[:vocab_size], self.head.bias[:vocab_size])

    def hidden(
        self,
        input_ids: Tensor,
        t: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        return plain_hidden(self.inner)(input_ids, t, positions, attention_mask)


def ddpm_autocast(denoiser: Denoiser, **options: Any) -> tuple[Tensor, dict[str, int]]:
    """`ddpm` of a float32 model as MDLM's code runs it: on a GPU under bfloat16 autocast.

    That code enters autocast in every forward pass, so weights are cast anew in each; autocast's cache is off here.
    """
    on_gpu = denoiser.device.type == "cuda"
    with torch.autocast(denoiser.device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False):
        return ddpm(denoiser, **options)


class Hollow(Wrapped):
    """A denoiser whose backbone costs nothing, because it always returns the same hidden states."""

    def __init__(self, inner: Denoiser, batch_size: int, length: int, columns: int | None = None) -> None:
        """`columns`: size of a vocabulary that is cut short; None: the whole vocabulary."""
        super().__init__(inner)
        assert inner.head.weight is not None
        generator = torch.Generator(inner.device).manual_seed(0)
        shape = (batch_size * length, inner.head.weight.shape[1])
        self.constant = torch.randn(shape, device=inner.device, dtype=inner.dtype, generator=generator)
        if columns is not None:
            bias = inner.head.bias[:columns].clamp(min=-1e4)  # finite, as all ids that are left may be forbidden ones
            bias[inner.vocab_size :] = -torch.inf
            bias[inner.mask_id : inner.mask_id + 1] = -torch.inf  # none if the mask is beyond the columns
            self.head = Head(inner.head.weight[:columns], bias)

    def hidden(
        self,
        input_ids: Tensor,
        t: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        batch, rows = input_ids.shape if positions is None else positions.shape
        return self.constant[: batch * rows].view(batch, rows, -1)


def random_dit(
    blocks: int,
    device: torch.device | str,
    *,
    vocab_size: int = PAPER_VOCAB,
    length: int = PAPER_LENGTH,
    width: int = 768,
    heads: int = 12,
) -> DiT:
    """A float32 `DiT` with random weights, by default of the paper's size.

    Random weights take the time of trained ones; with zeros a GPU draws less power and is faster.
    """
    config = DiTConfig(vocab_size, vocab_size - 1, None, length, blocks, width, heads)
    with torch.device(device):
        model = DiT(config)
        torch.nn.init.normal_(model.head_weight, std=0.02)
    return model.eval()


def time_steps(
    sampler: Callable[..., Any], denoiser: Denoiser, setting: Setting, steps: int, warm: int = WARM_STEPS
) -> StepTimes:
    """Run a step-by-step sampler (`ddpm` or `ddpm_compiled`) for `warm` and then `steps` steps, and time the latter."""
    clock = Clock(denoiser.device)
    clocked = Clocked(denoiser, clock)
    sampler(clocked, num_samples=setting.batch_size, length=setting.length, steps=warm + steps, seed=0)
    clock.mark("end")
    *backbone, _ = clock.laps("backbone")
    *head, closing = clock.laps("head")
    return StepTimes(backbone[warm:], head[warm:], closing)


def timed(run: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Seconds that a call takes, including all its work on the device, and what it returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, result


def time_run(
    models: Any,
    setting: Setting,
    seed: int = 0,
    schedule: str | Schedule | None = None,
    samples: int | None = None,
    batch_invariant: bool = False,
) -> tuple[float, SampleOutput]:
    """Seconds of a whole run of `mdkern.sample`, and what it returned; by default of one batch."""
    device = adapt(next(iter(models.values())) if isinstance(models, Mapping) else models).device
    run = partial(
        sample,
        models,
        schedule=schedule,
        num_samples=samples or setting.batch_size,
        length=setting.length,
        steps=setting.steps,
        batch_size=setting.batch_size,
        seed=seed,
        progress=False,
        batch_invariant=batch_invariant,
    )
    return timed(run, device)


def profile_loop(name: str, sampler: str, times: StepTimes, steps: int) -> Profile:
    """The profile of a run of `steps` steps from the times of a few."""
    backbone = (steps + 1) * statistics.median(times.backbone)
    return Profile(name, sampler, backbone, times.run(steps) - backbone, 0.0, f"{len(times.backbone)} steps")


def profile_mdkern(name: str, denoiser: Denoiser, setting: Setting, repeats: int) -> Profile:
    """Time whole runs, runs without a backbone, and runs without a head as well, taking turns."""
    size = setting.batch_size, setting.length
    variants = denoiser, Hollow(denoiser, *size), Hollow(denoiser, *size, columns=FEW_COLUMNS)
    for variant in variants:  # compile kernels and capture graphs
        time_run(variant, setting)
    rounds = [[time_run(variant, setting, seed)[0] for variant in variants] for seed in range(repeats)]
    whole, headed, rest = (statistics.median(seconds) for seconds in zip(*rounds))
    return Profile(name, "mdkern", whole - headed, headed - rest, rest, f"{repeats} runs")


def profile_model(
    name: str, model: DiT, setting: Setting, *, timed_steps: int = 20, repeats: int = 3, backend: str = "inductor"
) -> Iterator[Profile]:
    """The profiles of a float32 model, one sampler after the other.

    On a GPU, `eager` runs the float32 weights under autocast; the other two run in bfloat16. A baseline that cannot run
    here (`compiled` without a C++ compiler, `eager` where the logits need too much memory) is left out with a warning.

    Args:
        name: the model's name in the results.
        timed_steps: steps of the two step-by-step samplers that are timed.
        repeats: whole runs of mdkern of each of the three ways.
        backend: for `torch.compile`.
    """
    denoiser = adapt(copy.deepcopy(model).to(torch.bfloat16) if model.embedding.is_cuda else model)
    loops: dict[str, tuple[Callable[..., Any], Callable[[], Denoiser]]] = {
        "eager": (ddpm_autocast, lambda: Unpadded(model)),
        "compiled": (partial(ddpm_compiled, backend=backend), lambda: Compiled(denoiser, backend)),
    }
    for sampler, (run, baseline) in loops.items():
        try:
            yield profile_loop(name, sampler, time_steps(run, baseline(), setting, timed_steps), setting.steps)
        except RuntimeError as error:
            logger.warning("%s, %s is left out: %s", name, sampler, str(error).strip().splitlines()[0])
    yield profile_mdkern(name, denoiser, setting, repeats)


def table(profiles: Sequence[Profile]) -> str:
    """The profiles as a table with aligned columns, in seconds of a whole run."""
    header = ["model", "sampler", "backbone", "head + sampling", "everything else", "total", "timed"]
    rows = [
        [
            profile.model,
            profile.sampler,
            *(f"{part:.3g} s {part / profile.total:5.1%}" for part in (profile.backbone, profile.head, profile.other)),
            f"{profile.total:.3g} s",
            profile.measured,
        ]
        for profile in profiles
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in (header, *rows)]
    return "\n".join(lines)


def plot(profiles: Sequence[Profile], path: str | Path, title: str) -> None:
    """Stacked bars of the profiles, a group for each model. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 1.1 * len(profiles), 4.5), layout="constrained")
    axis = figure.subplots()
    models = list(dict.fromkeys(profile.model for profile in profiles))
    place = [number + 0.6 * models.index(profile.model) for number, profile in enumerate(profiles)]
    bottom = [0.0] * len(profiles)
    for part, label in (("backbone", "backbone"), ("head", "head + sampling"), ("other", "everything else")):
        heights = [max(0.0, getattr(profile, part)) for profile in profiles]
        axis.bar(place, heights, bottom=bottom, label=label)
        bottom = [below + height for below, height in zip(bottom, heights)]
    for x, top, profile in zip(place, bottom, profiles):
        axis.annotate(f"{profile.total:.3g} s", (x, top), ha="center", va="bottom", fontsize=8)
    axis.set_xticks(place, [f"{profile.sampler}\n{profile.model}" for profile in profiles])
    axis.set_ylabel("seconds of a run")
    figure.suptitle("\n".join(textwrap.wrap(title, int(11 * figure.get_figwidth()))), fontsize=10)
    axis.legend(frameon=False)
    with replacing(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:])
