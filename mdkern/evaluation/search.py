"""The exhaustive search over schedules (Sedykh et al., 2604.02340, section 4.3): every way to put the light model into
k of n equal segments, on the same seeds, and what each segment contributes.

Schedules that begin with the same models share those passes (`mdkern.engine.branches`). Results are written as soon as
they are there, and an interrupted search continues where it stopped.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mdkern.digest import digest
from mdkern.evaluation.intervals import Estimate, paired

__all__ = ["Found", "Results", "all_schedules", "best_and_mean", "frequencies", "influence", "read_results", "search"]

MOST_SCHEDULES = 100_000

Models = tuple[str, ...]  # the model of each segment


@dataclass(frozen=True)
class Found:
    """One schedule's score."""

    models: Models
    scores: Tensor  # float64 [N], of each sample; lower is better

    @property
    def name(self) -> str:
        """The models of the segments, as `Schedule.from_segments` takes them where names are single letters."""
        return "".join(self.models) if all(len(model) == 1 for model in self.models) else " ".join(self.models)


def all_schedules(segments: int, light: int, names: Sequence[str] = ("H", "L")) -> list[Models]:
    """Every assignment of models to segments with `light` segments that are not of the first model, in order.

    With two models these are ``segments choose light``.

    Raises:
        ValueError: more light segments than there are, fewer than two models, or more than `MOST_SCHEDULES`.
    """
    if not 0 <= light <= segments or segments < 1:
        raise ValueError(f"light must be from 0 to the {segments} segments, not {light}")
    if len(names) < 2:
        raise ValueError(f"a search needs at least two models, not {len(names)}")
    count = math.comb(segments, light) * (len(names) - 1) ** light
    if count > MOST_SCHEDULES:
        raise ValueError(
            f"{segments} segments, {light} of them light, are {count:,} schedules, and at most {MOST_SCHEDULES:,} can"
            " be tried: take fewer segments"
        )
    numbers = []  # of the models, by which the schedules are in order
    for places in itertools.combinations(range(segments), light):
        for chosen in itertools.product(range(1, len(names)), repeat=light):
            there = dict(zip(places, chosen))
            numbers.append([there.get(segment, 0) for segment in range(segments)])
    return [tuple(names[number] for number in row) for row in sorted(numbers)]


def ranked(found: Iterable[Found]) -> list[Found]:
    """The best first."""
    return sorted(found, key=lambda entry: float(entry.scores.mean()))


def at_least_one(found: Sequence[Found]) -> Sequence[Found]:
    if not found:
        raise ValueError("found must hold the results of at least one schedule")
    return found


def influence(found: Sequence[Found]) -> dict[str, list[Estimate]]:
    """Eq. 8, by model and segment: the mean score of the schedules with that model there, minus the mean of all.

    The standard error is over samples, which are the same for all schedules.

    Raises:
        ValueError: results of other samples or segments.
    """
    if not found or len({(len(entry.models), len(entry.scores)) for entry in found}) > 1:
        raise ValueError("influence compares schedules of the same segments on the same samples, at least one")
    scores = torch.stack([entry.scores for entry in found]).double()  # [schedules, N]
    out: dict[str, list[Estimate]] = {}
    for name in sorted({model for entry in found for model in entry.models}):
        out[name] = []
        for segment in range(len(found[0].models)):
            there = torch.tensor([entry.models[segment] == name for entry in found])
            if bool(there.any()):
                out[name].append(paired(scores[there].mean(0), scores.mean(0)))
            else:
                out[name].append(Estimate(float("nan"), float("nan"), 0))
    return out


def frequencies(found: Sequence[Found], name: str, share: float = 0.1) -> tuple[list[float], list[float]]:
    """How often each segment has the model `name` among the best and among the worst `share` of all schedules.

    Raises:
        ValueError: there is no schedule.
    """
    ordered = ranked(at_least_one(found))
    count = max(1, round(share * len(ordered)))

    def of(part: Sequence[Found]) -> list[float]:
        return [sum(entry.models[s] == name for entry in part) / len(part) for s in range(len(part[0].models))]

    return of(ordered[:count]), of(ordered[-count:])


class Results:
    """The file of a search: a first line that describes the search, then a line for each schedule as it is finished."""

    def __init__(self, path: Path, setting: dict[str, Any]) -> None:
        """Open a new file, or continue one of the same setting.

        Raises:
            ValueError: the file belongs to another search, or to none.
        """
        self.path, self.found = path, dict[Models, Found]()
        self.setting = setting | {"digest": digest(setting)}
        self.found, size = self.read(path)
        if size:
            os.truncate(path, size)
        else:
            self.append(self.setting)

    def absorb(self, paths: Iterable[Path]) -> None:
        """Take over what other processes have written, and remove their files."""
        for path in paths:
            for models, entry in self.read(path)[0].items():
                if models not in self.found:
                    self.add(models, entry.scores)
            path.unlink()

    def read(self, path: Path) -> tuple[dict[Models, Found], int]:
        """A file's results, and its bytes up to the end of the last whole line; none and 0 of an empty or missing one.

        A last line without its end was cut off when a process was killed.
        """
        header, found, size = parsed(path)
        if size and header.get("digest") != self.setting["digest"]:
            differing = [key for key, value in self.setting.items() if key != "digest" and header.get(key) != value]
            raise ValueError(f"{path} is of another search (it differs in {', '.join(differing)}): choose another file")
        return found, size

    def add(self, models: Models, scores: Tensor) -> None:
        rounded = [round(value, 6) for value in scores.tolist()]
        self.append({"models": list(models), "mean": round(float(scores.mean()), 6), "scores": rounded})
        self.found[models] = Found(models, torch.tensor(rounded, dtype=torch.float64))

    def append(self, entry: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def ranked(self) -> list[Found]:
        """The best first."""
        return ranked(self.found.values())


def parsed(path: Path) -> tuple[dict[str, Any], dict[Models, Found], int]:
    """A search's file: its description, its results, and its bytes up to the end of the last whole line.

    Of an empty or missing file nothing and 0.

    Raises:
        ValueError: it holds something else.
    """
    text = path.read_text() if path.exists() else ""
    if not text:
        return {}, {}, 0
    whole = text[: text.rfind("\n") + 1] or text
    try:
        header, *entries = map(json.loads, whole.splitlines())
        found = {
            tuple(entry["models"]): Found(tuple(entry["models"]), torch.tensor(entry["scores"], dtype=torch.float64))
            for entry in entries
        }
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not hold a search's results ({error})") from error
    return header if isinstance(header, dict) else {}, found, len(whole.encode())


def read_results(path: str | os.PathLike[str]) -> list[Found]:
    """What a search has written so far, the best schedule first: of `mdkern search --output`.

    `influence` and ``Schedule.optimize(..., by="influence", found=...)`` take it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of no search, or has no schedule yet.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    header, found, _ = parsed(Path(path))
    if not found or "digest" not in header:
        raise ValueError(f"{path} does not hold a search's results")
    return ranked(found.values())


def search(
    run: Callable[[list[Models]], Iterator[tuple[Models, Tensor]]],
    score: Callable[[Tensor], Tensor],
    schedules: Sequence[Models],
    results: Results,
    progress: bool | None = None,
) -> list[Found]:
    """Run and score the schedules that `results` does not have yet, and rank all.

    Args:
        run: yields each schedule with its samples int64 ``[N, L]``, as `mdkern.engine.branches.run_schedules` does.
        score: gives the scores of samples, float ``[N]``; lower is better.
    """
    left = [models for models in schedules if models not in results.found]
    try:
        with tqdm(total=len(schedules), initial=len(schedules) - len(left), unit="schedule",
                  disable=None if progress is None else not progress) as bar:  # fmt: skip
            for models, sequences in run(left):
                scores = score(sequences)
                if not bool(scores.isfinite().all()):
                    raise FloatingPointError(f"schedule {''.join(models)}: a score is not finite")
                results.add(models, scores)
                bar.update()
                bar.set_postfix(best="".join(results.ranked()[0].models))
    except BaseException as error:
        if results.found:
            count = f"{len(results.found)} schedule{'s are' if len(results.found) > 1 else ' is'}"
            error.add_note(f"{count} done and kept in {results.path}: the same search goes on from there")
        raise
    return results.ranked()


def best_and_mean(found: Sequence[Found]) -> tuple[Found, Estimate]:
    """The best schedule, and how much better it is than the mean of all, sample by sample.

    Raises:
        ValueError: there is no schedule.
    """
    best, everything = ranked(at_least_one(found))[0], torch.stack([entry.scores for entry in found]).mean(0)
    return best, paired(best.scores, everything)
