"""All measurements that want several GPUs of one host, by one command:

    python -m benchmarks.many_gpus --out runs/many-gpus

It says first what it will run and for about how long. Each part is kept as soon as it is measured; the same command
goes on after an interruption, and after a part that fails. The parts:

- sampling: `sample_distributed` at the paper's size on 1, 2, 4, ... GPUs (`bench_distributed`);
- sharded: the output layer with its vocabulary divided over 2, 4, ... GPUs (`bench_sharded`);
- training: a 12-block denoiser: tokens a second; the losses of one GPU in float32, with one rank killed on the way;
- search: `mdkern search`, 210 schedules.

What one GPU has to do for comparison is run first, side by side on the GPUs. Without GPUs, `--size tiny` runs
everything small on two CPU processes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import environment, write_text_whole
from benchmarks.many_gpus_commands import (
    GRACE,
    LONGEST,
    SIZES,
    Machine,
    Size,
    end,
    records,
    search_command,
    timed_search,
    token_file,
    tokens_per_second,
    train_command,
)

# Seconds on four H200s, of which starting Python, PyTorch and NCCL is 10 to 15 for each command.
EXPECTED = {"alone": 40, "sampling": 80, "sharded": 50, "training": 60, "search": 25}


# ---------------------------------------------------------------------------------------------------------- the parts


ALONE = "search", "tokens_per_second", "losses"


def run_alone(machine: Machine, size: Size, done: dict[str, Any]) -> None:
    """What one GPU needs for the parts training and search, side by side on several GPUs; results go to `done`.

    Raises:
        RuntimeError: some of it failed; the rest is done all the same.
    """

    def search(gpu: int | None) -> Any:
        return timed_search(machine, ["-m", *search_command(machine, size, "search-1")], "search-1", gpu)

    def speed(gpu: int | None) -> Any:
        machine.run(["-m", *train_command(machine, size.speed, "speed-1")], "speed-1", gpu)
        return tokens_per_second(machine.out / "speed-1", size.speed)

    def losses(gpu: int | None) -> Any:
        machine.run(["-m", *train_command(machine, size.losses, "losses-1", "--float32")], "losses-1", gpu)
        return [record["loss"] for record in records(machine.out / "losses-1")]

    for training in (size.speed, size.losses):
        token_file(machine, training)
    jobs = {name: job for name, job in zip(ALONE, (search, speed, losses)) if name not in done}
    gpus = range(machine.count) if machine.on_gpu else range(1)
    with ThreadPoolExecutor(len(gpus)) as pool:
        futures = {
            name: pool.submit(job, number % len(gpus) if machine.on_gpu else None)
            for number, (name, job) in enumerate(jobs.items())
        }
    failed = [future.exception() for future in futures.values() if future.exception() is not None]
    done |= {name: future.result() for name, future in futures.items() if future.exception() is None}
    if failed:
        raise RuntimeError("\n".join(map(str, failed)))


def run_sampling(machine: Machine, size: Size, alone: dict[str, Any]) -> dict[str, Any]:
    command = ["benchmarks.bench_distributed", *size.sampling, "--out", str(machine.out)]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(machine.count), "-m"]
    machine.run([*launch, *command], "sampling")
    content: dict[str, Any] = json.loads((machine.out / "distributed.json").read_text())
    return content


def run_sharded(machine: Machine, size: Size, alone: dict[str, Any]) -> dict[str, Any]:
    command = ["benchmarks.bench_sharded", *size.sharded, "--out", str(machine.out)]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(machine.count), "-m"]
    machine.run([*launch, *command], "sharded")
    content: dict[str, Any] = json.loads((machine.out / "sharded.json").read_text())
    return content


def run_training(machine: Machine, size: Size, alone: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second on all GPUs, and a float32 run of which one rank is killed, and which is then gone on with."""
    theirs, one = alone["losses"], alone["tokens_per_second"]
    machine.run(machine.torchrun(*train_command(machine, size.speed, "speed-n")), "speed-n")
    speed = tokens_per_second(machine.out / "speed-n", size.speed)
    more = "--float32", "--checkpoint-every", str(size.checkpoint_every)
    command = machine.torchrun(*train_command(machine, size.losses, "losses-n", *more))
    killed = kill_one(machine, command, size.losses.steps // 3)
    machine.run(command, "losses-n-resumed")
    ours = {record["step"]: record["loss"] for record in records(machine.out / "losses-n")}
    furthest = max(abs(ours[step] - loss) / abs(loss) for step, loss in enumerate(theirs, start=1))
    return {
        "environment": environment(),
        "processes": machine.count,
        "speed_of": asdict(size.speed),
        "losses_of": asdict(size.losses),
        "tokens_per_second": {"1": one, str(machine.count): speed},
        "ratio": speed / one,
        "killed_at_step": killed,
        "resumed_at_step": resumed_at(machine.tail("losses-n-resumed")),
        "steps": len(theirs),
        "largest_relative_difference_of_losses": furthest,
    }


def kill_one(machine: Machine, command: list[str], after: int) -> int | None:
    """Begin a training run, and kill its last rank once it has a checkpoint and `after` steps.

    Returns:
        The last step that was logged, or None if the run was over first.
    """
    folder = machine.out / "losses-n"
    process, began = machine.start(command, "losses-n"), time.perf_counter()
    try:
        while process.poll() is None and time.perf_counter() - began < LONGEST:
            time.sleep(0.005)
            steps = len(records(folder))
            if steps >= after and (folder / "checkpoint.pt").exists():
                os.kill(children(process.pid)[-1] if machine.count > 1 else process.pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):  # NCCL's other ranks are asked for half a minute
                    process.wait(GRACE)
                return steps
        return None
    finally:
        end(process)


def children(parent: int) -> list[int]:
    """The process numbers of the ranks that a torchrun has started."""
    listed = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(number) for number in listed]


def resumed_at(log: str) -> int | None:
    """The step at which a training run says that it has resumed."""
    after = log.partition("resumed at step ")[2].split()
    return int(after[0]) if after else None


def run_search(machine: Machine, size: Size, alone: dict[str, Any]) -> dict[str, Any]:
    one = alone["search"]
    seconds = timed_search(machine, machine.torchrun(*search_command(machine, size, "search-n")), "search-n", None)
    ours, theirs = (found_by(machine.out / f"{name}.jsonl") for name in ("search-n", "search-1"))
    return {
        "environment": environment(),
        "processes": machine.count,
        "arguments": list(size.search),
        "schedules": len(ours),
        "seconds": {"1": one, str(machine.count): seconds},
        "ratio": {name: one[name] / seconds[name] for name in seconds},
        "same_schedules": ours.keys() == theirs.keys(),
        "same_scores": sum(ours[name] == score for name, score in theirs.items()),
    }


def found_by(path: Path) -> dict[str, Any]:
    """The scores of a search's schedules."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {"".join(line["models"]): line["scores"] for line in lines if "scores" in line}


PARTS: dict[str, tuple[Callable[[Machine, Size, dict[str, Any]], dict[str, Any]], str]] = {
    "sampling": (run_sampling, "distributed.json"),
    "sharded": (run_sharded, "sharded.json"),
    "training": (run_training, "training-gpus.json"),
    "search": (run_search, "search-gpus.json"),
}


# --------------------------------------------------------------------------------------------------------- the driver


def say_plan(machine: Machine, parts: list[str], done: dict[str, Any], size: str) -> None:
    where = f"{machine.count} GPUs" if machine.on_gpu else f"{machine.count} CPU processes"
    names = left(parts, done)
    finished = [name for name in done if name not in names]
    print(f"on {where}, size {size}, results in {machine.out}; done already: {', '.join(finished) or 'nothing'}")
    for name in names:
        print(f"  {name:10} about {EXPECTED[name]} s" if machine.on_gpu else f"  {name}")
    if machine.on_gpu:
        print(f"  about {sum(EXPECTED[name] for name in names)} s in all (four H200s)", flush=True)


def left(parts: list[str], done: dict[str, Any]) -> list[str]:
    """What is still to be run for these parts: one GPU's share of it first."""
    needed = any(name in parts and name not in done for name in ("training", "search"))
    alone = ["alone"] if needed and not {*ALONE} <= {*done.get("alone", {})} else []
    return alone + [name for name in parts if name not in done]


def summary_of(name: str, content: dict[str, Any]) -> list[str]:
    """The lines of the table that is printed at the end."""
    if name == "sampling":
        return [
            f"{count} GPUs: {run['samples_per_second']:.2f} samples/s, {run['ratio']:.2f} x, {run['efficiency']:.1%}; "
            f"{run['same']:.1%} of the samples the same"
            for count, run in content["runs"].items()
        ]
    if name == "sharded":
        return [
            f"V = {row['columns']:,}, D = {row['depth']:,}, M = {row['rows']:,}: "
            + ", ".join(f"{count} GPUs {1e3 * ms['median']:.0f} µs" for count, ms in row["ms"].items())
            + f"; differing tokens {row['tokens_differing']} of {row['tokens_compared']:,}"
            for row in content["table"]
        ]
    if name == "training":
        speeds = ", ".join(f"{count} GPUs {speed:,.0f}" for count, speed in content["tokens_per_second"].items())
        return [
            f"tokens/s: {speeds}; {content['ratio']:.2f} x",
            f"killed at step {content['killed_at_step']}, resumed at {content['resumed_at_step']}; losses of "
            f"{content['steps']} steps within {content['largest_relative_difference_of_losses']:.1e} of one GPU's",
        ]
    return [
        f"{content['schedules']} schedules: command {content['ratio']['command']:.2f} x, search alone "
        f"{content['ratio']['search']:.2f} x; {content['same_scores']} with the same scores"
    ]


def run(machine: Machine, parts: list[str], size: str, record: dict[str, Any], keep: Callable[[], None]) -> list[str]:
    """Run the parts that are not done. Returns the names of those that failed."""
    failed, chosen = [], SIZES[size]
    for name in left(parts, record):
        began = time.perf_counter()
        print(f"{name} ...", flush=True)
        try:
            if name == "alone":
                run_alone(machine, chosen, record.setdefault(name, {}))
            else:
                function, file = PARTS[name]
                content = function(machine, chosen, record.get("alone", {}))
                write_text_whole(machine.out / file, json.dumps(content, indent=1) + "\n")
                record[name] = file
        except Exception:
            traceback.print_exc()
            failed.append(name)
        keep()
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_gpus", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/many-gpus"), help="folder of results and logs")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--processes", type=int, help="default: all GPUs, or two CPU processes")
    parser.add_argument("--anew", action="store_true", help="forget what is in the folder")
    arguments = parser.parse_args(argv)
    found = torch.cuda.device_count()
    count = arguments.processes or found or 2
    if found and count > found:
        parser.error(f"--processes {count}: there are {found} GPUs")
    if not found and arguments.size == "full":
        parser.error("there is no GPU: --size tiny runs everything small on the CPU")
    machine = Machine(count, bool(found), arguments.out.resolve())
    machine.out.mkdir(parents=True, exist_ok=True)
    path, setting = machine.out / "many-gpus.json", {"processes": count, "size": arguments.size}
    content = json.loads(path.read_text()) if path.exists() and not arguments.anew else {}
    record = content.get("done", {}) if content.get("setting") == setting else {}
    say_plan(machine, arguments.parts, record, arguments.size)

    def keep() -> None:
        write_text_whole(path, json.dumps({"setting": setting, "done": record}, indent=1) + "\n")

    failed = run(machine, arguments.parts, arguments.size, record, keep)
    for name in arguments.parts:
        if name in record:
            print(f"\n{name}")
            for line in summary_of(name, json.loads((machine.out / record[name]).read_text())):
                print(f"  {line}")
    if failed:
        print(f"\nfailed: {', '.join(failed)}; the same command tries them again")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
