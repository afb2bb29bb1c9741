"""Runs commands side by side, one on a device at a time, the longest first."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SHOWN_EVERY = 30.0  # seconds between two reports of what runs
POLLED_EVERY = 0.1


@dataclass(frozen=True)
class Job:
    """A command that takes ``--device``, and what it leaves."""

    name: str
    command: tuple[str, ...]
    cost: float  # any unit
    result: Path  # there once it is done
    log: Path
    keep: Callable[[], None]  # called when it is done


def run_jobs(jobs: Sequence[Job], devices: Sequence[str], say: Callable[[str], None]) -> list[str]:
    """Run what has no result yet, and return the names of what has none at the end.

    A job's output goes to its log. If this process is interrupted, the jobs are asked to stop, and it waits for them.
    """
    waiting = sorted((job for job in jobs if not job.result.exists()), key=lambda job: -job.cost)
    for job in jobs:
        if job not in waiting:
            job.keep()
    running: dict[int, tuple[Job, subprocess.Popen[bytes], float]] = {}
    shown = time.monotonic()
    try:
        while waiting or running:
            for slot, device in enumerate(devices):
                if waiting and slot not in running:
                    job = waiting.pop(0)
                    running[slot] = job, start(job, device), time.monotonic()
                    say(f"{job.name}: started on {device}, log in {job.log}")
            time.sleep(POLLED_EVERY)
            for slot, (job, process, began) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    finish(job, time.monotonic() - began, say)
            if time.monotonic() - shown > SHOWN_EVERY:
                shown = time.monotonic()
                for job, _, _ in running.values():
                    say(f"{job.name}: {last_line(job.log)}")
    finally:
        for _, process, _ in running.values():
            process.terminate()  # training saves a checkpoint and stops
        for _, process, _ in running.values():
            process.wait()
    return [job.name for job in jobs if not job.result.exists()]


def start(job: Job, device: str) -> subprocess.Popen[bytes]:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    # Several processes on one host: each would start as many threads as there are cores.
    environment = {"OMP_NUM_THREADS": "4"} | os.environ
    if device.startswith("cuda:"):  # it sees no other GPU, where PyTorch's threads would take memory
        number = int(device.removeprefix("cuda:"))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number] if visible else str(number)
        device = "cuda"
    with job.log.open("ab") as log:
        return subprocess.Popen(
            [*job.command, "--device", device], stdout=log, stderr=subprocess.STDOUT, env=environment
        )


def finish(job: Job, seconds: float, say: Callable[[str], None]) -> None:
    if job.result.exists():
        job.keep()
        say(f"{job.name}: done in {seconds:.0f} s")
    else:
        say(f"{job.name}: not finished after {seconds:.0f} s: {last_line(job.log)}")


def last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    return next((line.rsplit("\r", 1)[-1] for line in reversed(lines) if line.strip()), "")
