"""Runs commands side by side, one on a device at a time: first what most is waiting for, or what takes longest."""

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
    after: tuple[str, ...] = ()  # names of jobs that must be done before
    marks: bool = False  # the result is an empty file, made here when the command ends with exit code 0


def run_jobs(jobs: Sequence[Job], devices: Sequence[str], say: Callable[[str], None]) -> list[str]:
    """Run what has no result yet, and return the names of what has none at the end.

    A job's output goes to its log. If this process is interrupted, the jobs are asked to stop, and it waits for them.
    What waits for a job that fails is not run.
    """
    known = {job.name: job for job in jobs}
    ahead = remaining_cost(jobs)
    waiting = sorted((job for job in jobs if not job.result.exists()), key=lambda job: -ahead[job.name])
    for job in jobs:
        if job not in waiting:
            job.keep()
    running: dict[int, tuple[Job, subprocess.Popen[bytes], float]] = {}
    shown = time.monotonic()
    try:
        while True:
            for slot, device in enumerate(devices):
                ready = [job for job in waiting if all(known[name].result.exists() for name in job.after)]
                if ready and slot not in running:
                    job = ready[0]
                    waiting.remove(job)
                    running[slot] = job, start(job, device), time.monotonic()
                    say(f"{job.name}: started on {device}, log in {job.log}")
            if not running:  # what still waits, waits for what has failed
                break
            time.sleep(POLLED_EVERY)
            for slot, (job, process, began) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    if job.marks and process.returncode == 0:
                        job.result.touch()
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


def remaining_cost(jobs: Sequence[Job]) -> dict[str, float]:
    """Of each job, by name, its cost and the largest that then follows of what waits for it.

    Raises:
        ValueError: a job waits for one that is not there, or for itself.
    """
    names = {job.name for job in jobs}
    for job in jobs:
        for other in job.after:
            if other not in names:
                raise ValueError(f"{job.name} waits for {other}, which is not there")
    found: dict[str, float] = {}
    left = list(jobs)
    while left:
        last = [job for job in left if not any(job.name in other.after for other in left)]
        if not last:
            raise ValueError(f"these wait for each other: {', '.join(job.name for job in left)}")
        for job in last:
            found[job.name] = job.cost + max(
                (found[other.name] for other in jobs if job.name in other.after), default=0.0
            )
        left = [job for job in left if job not in last]
    return found


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
