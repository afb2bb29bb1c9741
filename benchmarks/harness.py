"""Timing that is the same for every contender, in turns, and the files of results.

Work on a GPU is timed in replays of CUDA graphs, with an empty L2 cache.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mdkern.engine.capture import capture
from mdkern.files import write_whole
from mdkern.profiling.profile import timed

RESULTS = Path(__file__).parent / "results"
FLUSH_MEGABYTES = 160  # above twice the L2 cache of an H100 or H200


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one run of a contender."""

    median: float
    lower: float  # quartiles
    upper: float

    def as_dict(self) -> dict[str, float]:
        return {"median": self.median, "lower": self.lower, "upper": self.upper}


class GpuTimer:
    """Times functions inside CUDA graphs.

    One graph has a few turns of emptying the L2 cache and running; a second one has the emptying alone. The difference
    of their times is that of the runs. The cache is emptied by reading, because dirty lines would be written back
    during a run and slow it by a third.
    """

    def __init__(self) -> None:
        self.buffer = torch.ones(FLUSH_MEGABYTES << 18, dtype=torch.float32, device="cuda")
        self.sink = torch.zeros((), device="cuda")

    def empty_cache(self) -> None:
        torch.amax(self.buffer, 0, out=self.sink)

    def graph(self, run: Callable[[], object], turns: int) -> torch.cuda.CUDAGraph:
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):
                run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL has a thread of its own
            for _ in range(turns):
                self.empty_cache()
                run()
        return graph

    def compare(
        self, contenders: Mapping[str, Callable[[], object]], turns: int = 8, rounds: int = 21
    ) -> dict[str, Timing]:
        """Time every contender in each round, so that a drift of the clock affects them all alike."""
        graphs = {name: self.graph(run, turns) for name, run in contenders.items()}
        nothing = self.graph(lambda: None, turns)
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(rounds + 2):
            base = elapsed(nothing)
            for name, graph in graphs.items():
                milliseconds = (elapsed(graph) - base) / turns
                if turn >= 2:
                    times[name].append(milliseconds)
        return {name: summary(values) for name, values in times.items()}


def captured(run: Callable[[], object], turns: int = 1) -> torch.cuda.CUDAGraph:
    """A graph of so many runs in a row. Unlike `torch.cuda.graph`, this collects no garbage, which takes long."""

    def all_turns() -> None:
        for _ in range(turns):
            run()

    device = torch.device("cuda", torch.cuda.current_device())
    return capture(all_turns, lambda: None, torch.cuda.graph_pool_handle(), device)[0]


def sustained(recorded: Mapping[str, torch.cuda.CUDAGraph], spent: float, rounds: int = 9) -> dict[str, list[float]]:
    """Milliseconds of a replay in each round, in which every graph is replayed again and again.

    All rounds together last about `spent` seconds. A card needs some of them to get down to the clock that its power
    limit allows: the first round does not count.
    """
    counts = {}
    for name, graph in recorded.items():
        elapsed(graph)
        counts[name] = max(1, round(1e3 * spent / (rounds + 1) / len(recorded) / elapsed(graph)))
    times: dict[str, list[float]] = {name: [] for name in recorded}
    for turn in range(rounds + 1):
        for name, graph in recorded.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(counts[name]):
                graph.replay()
            end.record()
            end.synchronize()
            times[name] += [start.elapsed_time(end) / counts[name]] * bool(turn)
    return times


def elapsed(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def summary(values: list[float]) -> Timing:
    lower, median, upper = statistics.quantiles(values, n=4)
    return Timing(median, lower, upper)


def seconds(function: Callable[[], Any], device: str) -> tuple[float, Any]:
    return timed(function, torch.device(device))


def compare_on_host(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Milliseconds of work on the CPU, every contender in each round, after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            took = 1e3 * seconds(run, "cpu")[0]
            if turn:
                times[name].append(took)
    return {name: summary(values) for name, values in times.items()}


def environment(*packages: str) -> dict[str, Any]:
    """Device and versions, to be kept with all results."""
    known: dict[str, Any] = {
        name: version(name) for name in ("torch", "triton", *packages) if importlib.util.find_spec(name)
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        known |= {"device": properties.name, "cuda": torch.version.cuda, "processors": properties.multi_processor_count}
    return known


def host_environment() -> dict[str, Any]:
    """The same for work on the CPU."""
    return {"torch": torch.__version__, "device": processor(), "threads": torch.get_num_threads()}


def processor() -> str:
    """The CPU's model name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def folder_command(
    name: str,
    about: str,
    measure: Callable[..., dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
    argv: Sequence[str] | None,
    parts: Sequence[str] = (),
    usual: Sequence[str] = (),
) -> int:
    """The command of a benchmark that writes into a folder: measure, print the table and what failed; the exit code.

    Args:
        measure: called with the folder and whether the size is tiny. If there are `parts`, also with those that are
            asked for, and with whether to measure what the folder has already.
        usual: the parts that are measured if none is asked for; default all.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=about.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a small model on a CPU")
    if parts:
        parser.add_argument(
            "--parts", nargs="+", choices=parts, default=list(usual or parts), help="only these, in order"
        )
        parser.add_argument("--anew", action="store_true", help="measure again what the folder has")
    arguments = parser.parse_args(argv)
    chosen = (arguments.parts, arguments.anew) if parts else ()
    content = measure(arguments.folder, arguments.tiny, *chosen)
    print(table(content))
    print("\n".join(f"failed: {what}" for what in content["failed"]))
    return 1 if content["failed"] else 0


def measure_parts(
    path: Path,
    known: dict[str, Any],
    jobs: Mapping[str, Callable[[], Any]],
    anew: bool,
    prepare: Callable[[list[str]], object] = lambda parts: None,
) -> dict[str, Any]:
    """Do the jobs of which the file has no result yet, write what there is after each, go on after one that fails.

    Args:
        known: what results must have in common to stand in one file, such as the environment. If the file has anything
            else, it is begun anew.
        jobs: by the name under which their results are kept.
        anew: whether to do all of the jobs.
        prepare: called with the names of those that are to be done.
    """
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if any(content.get(key) != value for key, value in known.items()):
        content = {}
    content = known | {"failed": []} | {part: value for part, value in content.items() if part != "failed"}
    left = [part for part in jobs if anew or part not in content]
    prepare(left)
    for part in left:
        began = time.perf_counter()
        content.pop(part, None)
        try:
            content[part] = jobs[part]()
        except Exception:
            traceback.print_exc()
            content["failed"].append(part)
        print(f"{part}: {time.perf_counter() - began:.1f} s", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(content, indent=1) + "\n")
    return content


def write_text_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    write_whole(path, text)
