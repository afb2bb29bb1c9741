"""The training loop shared by the denoisers and the judge: step, log, checkpoint, stop and resume."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from tqdm import tqdm

from training.batches import Prefetched
from training.checkpoint import JsonLines, check_same_config, load_checkpoint, read_records, save_checkpoint
from training.optim import WeightAverage, set_lr

log = logging.getLogger(__name__)

LOG_FILE, CURVE_FILE = "log.jsonl", "loss.png"


@dataclass(frozen=True)
class World:
    """The processes of a run (torchrun's environment, or one) and this one's device."""

    rank: int
    size: int
    device: torch.device
    float32: bool = False

    def largest(self, *numbers: int) -> list[int]:
        """Of each number or flag the largest that a process has."""
        if self.size == 1:
            return list(numbers)
        found = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def autocast(self) -> torch.autocast:
        """bfloat16 on CUDA, unless float32 was asked for; nothing on the CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda" and not self.float32)


@contextlib.contextmanager
def joined_world(device: str, float32: bool = False) -> Iterator[World]:
    """Join torchrun's processes if there are any (nccl on CUDA, gloo on the CPU), and leave them at the end."""
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    chosen = torch.device(device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", chosen.index or int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(chosen)
    if size > 1:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield World(rank, size, chosen, float32)
    finally:
        if size > 1:
            dist.destroy_process_group()


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """A context with a function that says whether SIGTERM or SIGINT has arrived. A second SIGINT interrupts at once.

    The old handlers are restored at the end.
    """
    received: list[int] = []

    def receive(number: int, _: Any) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    old = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class LoopOptions:
    """When to stop, save and report.

    Attributes:
        out: folder of the checkpoint and the log.
        total_steps: length of the whole run, in however many pieces it is run.
        tokens_per_step: tokens of all processes together.
        schedule: step -> fraction of the peak learning rate.
        clip: largest gradient norm.
        checkpoint_every: seconds between checkpoints.
        log_every: steps between two readings of the losses, which wait for the device.
        deadline: `time.monotonic()` at which to checkpoint and stop, or None.
        resume: "auto" continues from a checkpoint if there is one, "must" fails without one, "never" starts anew.
        workers: threads that prepare batches.
    """

    out: Path
    total_steps: int
    tokens_per_step: int
    schedule: Callable[[int], float]
    clip: float = 1.0
    checkpoint_every: float = 120.0
    log_every: int = 20
    deadline: float | None = None
    resume: str = "auto"
    workers: int = 2


class Objective(nn.Module):
    """A batch's loss: ``scale`` times the sum of ``losses(model, *batch)``, in nats a token.

    `scale` is processes / (tokens of the global batch), so that the sum over micro-batches, averaged over processes,
    is the mean over the global batch.
    """

    def __init__(self, model: nn.Module, losses: Callable[..., Tensor], scale: float) -> None:
        super().__init__()
        self.model, self.losses, self.scale = model, losses, scale

    def forward(self, *batch: Tensor) -> Tensor:
        return self.losses(self.model, *batch).sum() * self.scale


@dataclass
class Trainer:
    """A model in training. ``run`` runs the remaining steps."""

    objective: Objective
    optimizers: Sequence[Optimizer]
    average: WeightAverage
    config: dict[str, Any]  # settings that must not change between the pieces of a run
    options: LoopOptions
    world: World
    step: int = 0
    pending: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # losses and gradient norms on the device

    @property
    def model(self) -> nn.Module:
        """What holds the parameters that are saved."""
        return self.objective.model

    def resume(self) -> None:
        """Load the checkpoint as the options say. Raises ValueError on another run's, FileNotFoundError without one."""
        state = None if self.options.resume == "never" else load_checkpoint(self.options.out)
        if state is None:
            if self.options.resume == "must":
                raise FileNotFoundError(f"no checkpoint in {self.options.out} to resume from")
            return
        check_same_config(state["config"], self.config, self.options.out)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.step = state["step"]
        exact = "" if torch.get_num_threads() == 1 else "; the same to the bit only with OMP_NUM_THREADS=1"
        log.info("resumed at step %d (%.3g tokens)%s", self.step, state["tokens"], exact)

    def save(self) -> None:
        if self.world.rank:
            return
        state = {
            "config": self.config,
            "step": self.step,
            "tokens": self.step * self.options.tokens_per_step,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        save_checkpoint(self.options.out, state)

    def run(self, batches: Callable[[int], Sequence[tuple[Tensor, ...]]]) -> bool:
        """Train from the current step on. Returns whether the run is complete, rather than stopped by time or signal.

        Raises FloatingPointError on a loss or gradient that is not finite; the last good checkpoint stays.
        """
        options, world = self.options, self.world
        records = JsonLines(options.out / LOG_FILE, self.step) if world.rank == 0 else None
        report = Report(self, records)
        prefetched = Prefetched(
            batches, self.step, options.total_steps, options.workers, pin=world.device.type == "cuda"
        )
        objective = DistributedDataParallel(self.objective) if world.size > 1 else self.objective
        last_save = time.monotonic()
        with stop_signals() as stop_asked:
            for micro_batches in prefetched:
                if self.train_step(objective, micro_batches, stop_asked):
                    report.flush()
                    self.save()
                    break
                finished = self.step == options.total_steps
                read = finished or self.step % options.log_every == 0
                stop = due = 0
                if read or world.size == 1:  # with several processes, they agree only when losses are read
                    now = time.monotonic()
                    late = options.deadline is not None and now >= options.deadline
                    stop, due = world.largest(stop_asked() or late, now - last_save >= options.checkpoint_every)
                if read or stop or due:
                    report.flush()
                if finished or stop or due:
                    self.save()
                    last_save = time.monotonic()
                if stop:
                    break
        report.close()
        return self.step >= options.total_steps

    def train_step(
        self, objective: nn.Module, micro_batches: list[tuple[Tensor, ...]], stop_asked: Callable[[], bool]
    ) -> bool:
        """Run one step. Returns whether a signal stopped it between two micro-batches, which only happens with a single
        process. The step is then run again when the run continues."""
        set_lr(self.optimizers, self.options.schedule(self.step))
        loss = torch.zeros((), device=self.world.device)
        for number, batch in enumerate(micro_batches, start=1):
            tensors = [x.to(self.world.device, non_blocking=True) for x in batch]
            last = number == len(micro_batches)
            wait = isinstance(objective, DistributedDataParallel) and not last
            with objective.no_sync() if wait else contextlib.nullcontext():  # type: ignore[operator]
                with self.world.autocast():
                    micro_loss = objective(*tensors)
                micro_loss.backward()
            loss = loss + micro_loss.detach()
            if not last and self.world.size == 1 and stop_asked():
                for optimizer in self.optimizers:
                    optimizer.zero_grad(set_to_none=True)
                return True
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip, foreach=True)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.average.update(self.step)
        self.step += 1
        self.pending.append((loss, norm))
        return False


class Report:
    """Reads the losses now and then and reports them: in a progress bar, as log lines and in a file."""

    def __init__(self, trainer: Trainer, records: JsonLines | None) -> None:
        self.trainer, self.records = trainer, records
        self.started = self.shown = time.monotonic()
        self.shown_step = trainer.step
        total = trainer.options.total_steps * trainer.options.tokens_per_step
        done = trainer.step * trainer.options.tokens_per_step
        self.bar = tqdm(
            total=total, initial=done, unit="tok", unit_scale=True, disable=True if records is None else None
        )

    def flush(self) -> None:
        """Read the steps since the last reading. Raises FloatingPointError if one is not finite."""
        trainer, options = self.trainer, self.trainer.options
        if not trainer.pending:
            return
        values = torch.stack([torch.stack(pair) for pair in trainer.pending])  # [steps, 2]
        if trainer.world.size > 1:
            dist.all_reduce(values)
            values /= trainer.world.size
        rows: list[list[float]] = values.tolist()
        first = trainer.step - len(trainer.pending)
        trainer.pending.clear()
        seconds = time.monotonic() - self.started
        lines = [
            {
                "step": first + i + 1,
                "loss": loss,
                "grad_norm": norm,
                "lr": options.schedule(first + i),
                "seconds": seconds,
            }
            for i, (loss, norm) in enumerate(rows)
        ]
        bad = next((line for line in lines if not math.isfinite(line["loss"] + line["grad_norm"])), None)
        if self.records is not None:
            self.records.write(lines)
            self.bar.update(len(rows) * options.tokens_per_step)
            self.show(sum(loss for loss, _ in rows) / len(rows))
        if bad is not None:
            raise FloatingPointError(
                f"step {bad['step']}: loss {bad['loss']}, gradient norm {bad['grad_norm']}; lower the learning rate or "
                f"lengthen the warm-up. The last good checkpoint is in {options.out}"
            )

    def show(self, loss: float) -> None:
        trainer, options, now = self.trainer, self.trainer.options, time.monotonic()
        self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if self.bar.disable and (now - self.shown >= 10 or trainer.step == options.total_steps):
            speed = (trainer.step - self.shown_step) / (now - self.shown)  # steps a second
            log.info(
                "step %d/%d loss %.4f %.3g tokens/s %.0f s left",
                trainer.step, options.total_steps, loss, speed * options.tokens_per_step,
                (options.total_steps - trainer.step) / speed,
            )  # fmt: skip
            self.shown, self.shown_step = now, trainer.step

    def close(self) -> None:
        self.bar.close()
        if self.records is not None:
            self.records.close()
            plot_losses(self.trainer.options.out)


def plot_losses(out: Path) -> None:
    """Draw the logged losses to `CURVE_FILE`, if matplotlib is there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    records = [record for _, record in read_records(out / LOG_FILE)]
    if not records:
        return
    losses = torch.tensor([r["loss"] for r in records], dtype=torch.float64)
    width = max(1, len(losses) // 200)
    smooth = losses[: len(losses) // width * width].view(-1, width).mean(1)
    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot(xlabel="step", ylabel="loss, nats a token", title=f"mean over {width} steps")
    axes.plot([records[0]["step"] + width * (i + 0.5) for i in range(len(smooth))], smooth.tolist())
    figure.savefig(out / CURVE_FILE, dpi=120, bbox_inches="tight")
