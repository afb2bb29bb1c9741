"""The commands that `benchmarks.many_gpus` measures, at both of its sizes, and how they are run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import split
from typing import Any

import numpy as np

from benchmarks.harness import write_text_whole
from training.data import TokenFileInfo

JUDGE = Path(__file__).parent / "judge"
LONGEST = 300.0  # seconds of a command
GRACE = 5.0  # seconds that torchrun has to notice a dead rank and end the others


@dataclass(frozen=True)
class Training:
    """A run of `training.train` with random tokens."""

    width: int
    heads: int
    length: int
    batch_size: int
    vocab_size: int
    steps: int
    blocks: int = 12
    log_every: int = 5


@dataclass(frozen=True)
class Size:
    sampling: Sequence[str]  # arguments of `bench_distributed`
    sharded: Sequence[str]  # of `bench_sharded`
    speed: Training
    losses: Training
    checkpoint_every: float  # seconds, in the run that is killed
    search: Sequence[str]  # of `mdkern search`


SIZES = {
    "full": Size(
        ("--num-samples", "128", "--rounds", "3"),
        (),
        Training(768, 12, 1024, 64, 50_258, 40, log_every=10),
        Training(384, 6, 256, 16, 4096, 100),
        1.0,
        ("--num-samples", "160", "--batch-size", "160"),
    ),
    "tiny": Size(
        split("--blocks 1 --width 64 --vocab-size 300 --num-samples 4 --length 16 --steps 8 --rounds 1"),
        split("--shapes 700x32 --rows 1 5 --rounds 2"),
        Training(32, 2, 16, 4, 300, 4, blocks=1, log_every=1),
        Training(32, 2, 16, 4, 300, 60, blocks=2, log_every=1),
        0.01,
        split("--segments 4 --light-segments 2 --num-samples 2 --batch-size 2 --length 16 --steps 8"),
    ),
}


@dataclass(frozen=True)
class Machine:
    """How commands are run here: on how many GPUs, or CPU processes."""

    count: int
    on_gpu: bool
    out: Path

    def run(self, command: Sequence[str], log: str, gpu: int | None = None) -> float:
        """Run a Python command, its output kept in a file. Returns its seconds.

        Raises:
            RuntimeError: it failed, or took longer than `LONGEST`; the message has the end of its output.
        """
        began = time.perf_counter()
        process = self.start(command, log, gpu)
        try:
            status = process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            end(process)
        if status:
            raise RuntimeError(f"{' '.join(command)} failed:\n{self.tail(log)}")
        if status is None:
            raise RuntimeError(f"{' '.join(command)} took longer than {LONGEST:g} s:\n{self.tail(log)}")
        return time.perf_counter() - began

    def start(self, command: Sequence[str], log: str, gpu: int | None = None) -> subprocess.Popen[bytes]:
        """Begin a Python command in a process group of its own; `gpu`: the only one that it sees."""
        child = dict(os.environ)
        if gpu is not None:
            child["CUDA_VISIBLE_DEVICES"] = str(gpu)
        if not self.on_gpu:
            child["OMP_NUM_THREADS"] = "1"
        with (self.out / f"{log}.log").open("wb") as file:
            return subprocess.Popen(
                [sys.executable, *command], env=child, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def tail(self, log: str) -> str:
        return (self.out / f"{log}.log").read_text(errors="replace")[-3000:]

    def torchrun(self, *command: str) -> list[str]:
        """The command in all processes; without ``torchrun`` if there is one only."""
        if self.count == 1:
            return ["-m", *command]
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.count)]
        return [*launch, "-m", *command]


def end(process: subprocess.Popen[bytes]) -> None:
    """End a command with all its processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def token_file(machine: Machine, training: Training) -> Path:
    """Random tokens to train on; the file is made once."""
    path = machine.out / f"tokens-{training.vocab_size}.bin"
    if not path.with_suffix(".json").exists():
        tokens = np.random.default_rng(0).integers(1, training.vocab_size - 1, 1 << 18).astype(np.uint16)
        tokens.tofile(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        info = TokenFileInfo(
            "uint16", len(tokens), training.vocab_size, 0, training.vocab_size - 1, "", digest, len(tokens), ["random"]
        )
        write_text_whole(path.with_suffix(".json"), json.dumps(asdict(info)))
    return path


def train_command(machine: Machine, training: Training, name: str, *more: str) -> list[str]:
    tokens = str(token_file(machine, training))
    settings = {
        "--data": tokens,
        "--valid": tokens,
        "--out": machine.out / name,
        "--preset": "mdlm",
        "--blocks": training.blocks,
        "--width": training.width,
        "--heads": training.heads,
        "--length": training.length,
        "--batch-size": training.batch_size,
        "--tokens": training.steps * training.batch_size * training.length,
        "--warmup": 10,
        "--log-every": training.log_every,
        "--eval-samples": 8,
        "--eval-batch-size": 8,
    }
    return ["training.train", *(str(item) for pair in settings.items() for item in pair), "--no-compile", *more]


def search_command(machine: Machine, size: Size, name: str) -> list[str]:
    judge = str(JUDGE)
    return ["mdkern", "search", "--judge", judge, *size.search, "--output", str(machine.out / f"{name}.jsonl")]


def records(folder: Path) -> list[dict[str, Any]]:
    """The lines of a training log so far."""
    path = folder / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):  # the last one may be cut
            found.append(json.loads(line))
    return [record for record in found if "loss" in record]


def tokens_per_second(folder: Path, training: Training) -> float:
    """Of the steps after the first reading of the losses."""
    log = records(folder)
    first = next(record["seconds"] for record in log)
    later = [record for record in log if record["seconds"] > first]
    return len(later) * training.batch_size * training.length / (later[-1]["seconds"] - first)


def timed_search(machine: Machine, command: list[str], name: str, gpu: int | None) -> dict[str, float]:
    """Seconds of a search: of the command, and from its first result to its last."""
    files = machine.out.glob
    for path in files(f"{name}.jsonl*"):
        path.unlink()
    began = time.perf_counter()
    process, first, last, lines = machine.start(command, name, gpu), 0.0, 0.0, 0
    try:
        while process.poll() is None and time.perf_counter() - began < LONGEST:
            time.sleep(0.02)
            now = sum(path.read_bytes().count(b"\n") for path in files(f"{name}.jsonl*"))
            if now > lines:
                lines, last = now, time.perf_counter()
                first = first or last
        status = process.poll()
    finally:
        end(process)
    if status != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{machine.tail(name)}")
    return {"command": time.perf_counter() - began, "search": last - first}
