"""How the host paces step-by-step decoding: it starts the steps, shows how far they are, and sees when they end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from tqdm import tqdm

from mdkern.engine.graphs import Graph
from mdkern.engine.hooks import Drafts
from mdkern.engine.progress import Progress

LAG = 2  # replays between a step and the host's reading of its flag, so that the device always has work


def watcher(progress: Progress, left: int, bar: tqdm, drafts: Drafts) -> Callable[[], None]:
    """A function for the host to call now and then while steps run; `left` is the number of masked columns before."""

    def watch() -> None:
        nonlocal left
        now = int(progress.report[1])
        bar.update(left - now)
        left = now
        drafts.show()

    return watch


def run_steps(
    graph: Graph | None,
    step: Callable[[], None],
    progress: Progress,
    watch: Callable[[], None],
    in_step: bool = False,
) -> None:
    """Run steps until no slot has work: in one launch if the device can loop, else from the graph, else eagerly.

    `in_step`: other processes run the same steps and wait for this one in each, so all must run equally many.
    """
    if graph is not None and graph.loop is not None:
        graph.loop.run(watch)
    else:
        run_one_by_one(step if graph is None else graph.captured.replay, progress, watch, 0 if in_step else LAG)
    watch()


def run_one_by_one(step: Callable[[], None], progress: Progress, watch: Callable[[], None], lag: int = LAG) -> None:
    """Run steps until the flag says that no slot has work. On a GPU the host reads it `lag` steps late.

    It may then see the flag of any step in between. Without a lag the number of steps depends on the flag alone.
    """
    events: deque[torch.cuda.Event] = deque()
    while True:
        step()
        if progress.status.is_cuda:
            events.append(torch.cuda.Event())
            events[-1].record()
            if len(events) <= lag:
                continue
            events.popleft().synchronize()
        watch()
        if not int(progress.report[0]):
            return
