"""Model schedules: which denoiser runs at each step (Sedykh et al., 2604.02340)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from itertools import accumulate, pairwise
from numbers import Rational, Real
from typing import Any

__all__ = ["Schedule", "Segment"]

NAME = r"[A-Za-z_]+"
PART = re.compile(rf"[\s,;]*+({NAME}+)\s*+[:=x*]?+\s*+(\d++)[\s,;]*+")  # possessive: no text takes quadratic time
LONGEST_TEXT = 100_000  # characters
LARGEST_COUNT = 2**63 - 1  # steps


@dataclass(frozen=True)
class Segment:
    """A maximal run of steps with one denoiser: steps ``first <= i < stop``."""

    model: str
    first: int
    stop: int

    @property
    def steps(self) -> int:
        return self.stop - self.first


class Schedule:
    """Which denoiser runs at each step. Step 0 is the first one, from the fully masked text.

    A schedule either counts steps (``Schedule("L125 H750 L125")``), or gives shares of the steps
    (``Schedule.sandwich(0.25)``) and then fits any number of them.
    """

    def __init__(self, text: str) -> None:
        """Parse the paper's notation: names and step counts, separated by spaces or commas, in upper or lower case.

        Raises:
            TypeError: not a str.
            ValueError: nothing to parse, a part that is not a name and a count, a count of 0, more than `LONGEST_TEXT`
                characters, or a sum of more than `LARGEST_COUNT` steps.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a str such as 'L125 H750 L125', not {type(text).__name__}")
        if len(text) > LONGEST_TEXT:
            raise ValueError(f"a schedule's text must have at most {LONGEST_TEXT} characters, not {len(text)}")
        parts: list[tuple[str, Fraction]] = []
        end = 0
        while match := PART.match(text, end):
            name, count = match.groups()
            if len(count) > len(str(LARGEST_COUNT)):
                raise ValueError(f"schedule {shortened(text)} has a part of more than {LARGEST_COUNT} steps")
            parts.append((name.upper(), Fraction(int(count))))
            end = match.end()
        if end < len(text) or not parts:
            raise ValueError(
                f"schedule {shortened(text)} is not a list of names and step counts such as 'L125 H750 L125'"
            )
        if any(count == 0 for _, count in parts):
            raise ValueError(f"schedule {shortened(text)} has a part of 0 steps: leave it out")
        if sum(count for _, count in parts) > LARGEST_COUNT:
            raise ValueError(f"schedule {shortened(text)} has more than {LARGEST_COUNT} steps")
        self.parts: tuple[tuple[str, Fraction], ...] = merge(parts)
        self.fixed = True

    @classmethod
    def from_shares(cls, shares: Sequence[tuple[str, Fraction | float]]) -> Schedule:
        """A schedule of shares of the steps, which sum to 1; parts of share 0 are left out.

        Raises:
            TypeError: a share that is not a real number.
            ValueError: a name that has other characters than letters; shares that are negative or do not sum to 1.
        """
        exact = [(check_name(name).upper(), exact_share(share, f"the share of {name}")) for name, share in shares]
        whole = sum((share for _, share in exact), Fraction(0))
        if any(share < 0 for _, share in exact) or abs(whole - 1) > Fraction(1, 10**6):
            raise ValueError(f"shares {shares} must be non-negative and sum to 1")
        schedule = cls.__new__(cls)
        schedule.parts = merge([(name, share) for name, share in exact if share])
        schedule.fixed = False
        return schedule

    @classmethod
    def constant(cls, model: str = "H") -> Schedule:
        """One denoiser at every step."""
        return cls.from_shares([(model, Fraction(1))])

    @classmethod
    def sandwich(cls, light_share: float, heavy: str = "H", light: str = "L") -> Schedule:
        """Light at both ends, half of `light_share` each, and heavy between: the paper's best."""
        share = exact_share(light_share, "light_share")
        if not 0 <= share <= 1:
            raise ValueError(f"light_share must lie in 0..1, not {light_share}")
        return cls.from_shares([(light, share / 2), (heavy, 1 - share), (light, share / 2)])

    @classmethod
    def quarter(cls, which: int, heavy: str = "H", light: str = "L") -> Schedule:
        """Light in quarter `which` (1 to 4) of the steps, heavy in the others."""
        if which not in (1, 2, 3, 4):
            raise ValueError(f"which must be 1, 2, 3 or 4, not {which!r}")
        return cls.from_segments([light if index == which else heavy for index in (1, 2, 3, 4)])

    @classmethod
    def from_segments(cls, models: Sequence[str]) -> Schedule:
        """Equal shares, one per entry: a list of names, or a string of one-letter names such as ``"LHHHHHHHLL"``."""
        if not models:
            raise ValueError("models must name at least one segment")
        return cls.from_shares([(model, Fraction(1, len(models))) for model in models])

    @classmethod
    def optimize(cls, heavy: Any, light: Any = None, *, budget: float, **options: Any) -> Schedule:
        """The schedule that harms the heavy model's samples least at a share `budget` of its cost.

        Args:
            heavy, light: as for `mdkern.sample`.
            budget: in (0, 1].
            options: how harm and cost are measured, see `mdkern.evaluation.optimize.optimize_schedule`.
        """
        from mdkern.evaluation.optimize import optimize_schedule  # which imports schedules

        return optimize_schedule(heavy, light, budget=budget, **options)

    @property
    def total(self) -> int | None:
        """Number of steps; None if the schedule fits any number."""
        return int(sum(count for _, count in self.parts)) if self.fixed else None

    @property
    def models(self) -> tuple[str, ...]:
        """The names used, in upper case, in order of their first step."""
        return tuple(dict.fromkeys(name for name, _ in self.parts))

    def edges(self, steps: int | None = None) -> list[int]:
        """The steps at which each of the `parts` begins, and the one at which the last ends. Shares are rounded.

        Raises:
            ValueError: `steps` missing for a schedule of shares, or not the sum of a schedule of counts.
        """
        if self.total is not None and steps is not None and self.total != steps:
            raise ValueError(f"schedule {self} has {self.total} steps, but steps={steps}: make the two agree")
        steps = self.total if steps is None else steps
        if steps is None or steps < 1:
            raise ValueError(f"steps must be at least 1 to fit {self!r}, not {steps}")
        unit = Fraction(1) if self.fixed else Fraction(steps)
        shares = accumulate((share for _, share in self.parts), initial=Fraction(0))
        return [int(share * unit + Fraction(1, 2)) for share in shares]

    def segments(self, steps: int | None = None) -> list[Segment]:
        """The segments over `steps` steps. Shares are rounded at their boundaries; empty segments are left out.

        Raises:
            ValueError: `steps` missing for a schedule of shares, or not the sum of a schedule of counts.
        """
        segments: list[Segment] = []
        for (name, _), (first, stop) in zip(self.parts, pairwise(self.edges(steps))):
            if stop > first and segments and segments[-1].model == name:
                segments[-1] = Segment(name, segments[-1].first, stop)
            elif stop > first:
                segments.append(Segment(name, first, stop))
        return segments

    def shares(self) -> dict[str, Fraction]:
        """Share of the steps that each denoiser runs."""
        whole = sum(count for _, count in self.parts)
        shares = dict.fromkeys(self.models, Fraction(0))
        for name, count in self.parts:
            shares[name] += count / whole
        return shares

    def saved(self, cost: Mapping[str, float]) -> float:
        """Share of the cost saved compared with running the most expensive denoiser at every step.

        If ``cost`` is the number of blocks, this is equation (3) of 2604.02340, ``p (B_H - B_L) / B_H``, for any number
        of denoisers. If it is the FLOPs of a forward pass, it is the exact figure.

        Args:
            cost: cost of a step by name, in upper or lower case, of all denoisers of the schedule and possibly others.
        """
        costs = {name.upper(): value for name, value in cost.items()}
        missing = [name for name in self.models if name not in costs]
        if missing:
            raise ValueError(f"cost must name {', '.join(missing)}; it names {', '.join(costs) or 'nothing'}")
        dearest = max(costs.values())
        return 1.0 - sum(float(share) * costs[name] for name, share in self.shares().items()) / dearest

    def fit(self, steps: int) -> Schedule:
        """The same schedule as step counts."""
        return Schedule(" ".join(f"{segment.model}{segment.steps}" for segment in self.segments(steps)))

    def __str__(self) -> str:
        if self.fixed:
            return " ".join(f"{name}{count}" for name, count in self.parts)
        return " ".join(f"{name}:{float(100 * share):g}%" for name, share in self.parts)

    def __repr__(self) -> str:
        return f"<Schedule {self}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and (self.fixed, self.parts) == (other.fixed, other.parts)

    def __hash__(self) -> int:
        return hash((self.fixed, self.parts))


def check_name(name: str) -> str:
    """The name in upper case, refused if it has other characters than letters: digits would run into the count."""
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        raise ValueError(f"a model's name must be letters, as in 'L125 H750 L125', not {name!r}")
    return name


def exact_share(share: Any, what: str) -> Fraction:
    """A number of any real type, NumPy's included, as a fraction. `what` names it in the error."""
    if isinstance(share, bool) or not isinstance(share, Real | Decimal):
        raise TypeError(f"{what} must be a number, not {share!r}")
    if not isinstance(share, Rational) and not math.isfinite(share):
        raise ValueError(f"{what} must lie in 0..1, not {share}")
    return Fraction(share if isinstance(share, Rational | Decimal) else float(share)).limit_denominator(10**9)


def shortened(text: str) -> str:
    """A text in quotation marks; only the beginning of a long one."""
    return repr(text if len(text) <= 80 else text[:77] + "...")


def merge(parts: Sequence[tuple[str, Fraction]]) -> tuple[tuple[str, Fraction], ...]:
    """Merge adjacent parts of the same denoiser."""
    merged: list[tuple[str, Fraction]] = []
    for name, count in parts:
        if merged and merged[-1][0] == name:
            merged[-1] = (name, merged[-1][1] + count)
        else:
            merged.append((name, count))
    return tuple(merged)


def check_segments(segments: int, steps: int | None) -> None:
    """Refuse more equal segments than there are steps, if these are known: some would be empty."""
    if steps is not None and segments > steps:
        raise ValueError(f"segments must be at most the {steps} steps, not {segments}")
