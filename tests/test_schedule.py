"""Schedules: the text form, the constructors, fitting to a number of steps, and the FLOPs saved."""

from __future__ import annotations

import random
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from mdkern import Schedule
from mdkern.schedule import LONGEST_TEXT, Segment

# 250 light steps of 1000 as the paper places them, and one model alone, with what equation (3) says they save.
HAND_MADE = {
    "L1000": 2 / 3,
    "L250 H750": 1 / 6,
    "H250 L250 H500": 1 / 6,
    "H500 L250 H250": 1 / 6,
    "H750 L250": 1 / 6,
    "L125 H750 L125": 1 / 6,
    "H1000": 0.0,
}
BLOCKS = {"H": 12, "L": 4}


def random_shares(seed: int) -> Schedule:
    """One to six parts of random names and sizes."""
    rng = random.Random(seed)
    sizes = [rng.randrange(1, 10_000) for _ in range(rng.randrange(1, 7))]
    return Schedule.from_shares([(rng.choice("HML"), Fraction(size, sum(sizes))) for size in sizes])


@pytest.mark.parametrize(
    "text",
    [
        "L125 H750 L125",
        "l125 h750 l125",
        "L125, H750, L125",
        "L125,H750,L125",
        "L125H750L125",
        "  L 125\tH 750\nL 125 ",
        "L:125 H:750 L:125",
        "L=125; H=750; L=125",
        "L25 L100 H750 L125",
    ],
)
def test_text_forms_of_one_schedule_are_equal(text: str):
    schedule = Schedule(text)
    assert schedule == Schedule("L125 H750 L125")
    assert hash(schedule) == hash(Schedule("L125 H750 L125"))
    assert schedule.segments() == [Segment("L", 0, 125), Segment("H", 125, 875), Segment("L", 875, 1000)]
    assert (schedule.total, schedule.models) == (1000, ("L", "H"))


def test_names_may_be_words_and_more_than_two() -> None:
    schedule = Schedule("small100 medium_size100 LARGE600 medium_size100 small100")
    assert schedule.models == ("SMALL", "MEDIUM_SIZE", "LARGE")
    assert schedule.shares() == {"SMALL": Fraction(1, 5), "MEDIUM_SIZE": Fraction(1, 5), "LARGE": Fraction(3, 5)}
    assert sum(schedule.shares().values()) == 1


@pytest.mark.parametrize("text", ["", " ", ",", "H", "12", "12H", "H-5", "H1.5", "H5 + L5", "H5%", "H5 L", "H5 9"])
def test_text_that_is_no_schedule_is_refused(text: str):
    with pytest.raises(ValueError, match="not a list of names and step counts"):
        Schedule(text)


def test_the_longest_texts_are_read_and_longer_ones_refused() -> None:
    """In linear time: these are what a pattern that tries every start anew takes minutes for."""
    for text in ("a", "H ", "H1 ", "H" + " " * 49, "H5, "):
        whole = text * (LONGEST_TEXT // len(text))
        if text in ("H1 ", "H5, "):
            assert Schedule(whole).total == len(whole) // len(text) * int(text[1])
        else:
            with pytest.raises(ValueError, match=r"'(a|H).*\.\.\.' is not a list of names") as error:
                Schedule(whole)
            assert len(str(error.value)) < 200
    with pytest.raises(ValueError, match=f"at most {LONGEST_TEXT} characters, not {LONGEST_TEXT + 2}"):
        Schedule("H1" + " " * LONGEST_TEXT)


def test_counts_are_bounded() -> None:
    assert Schedule(f"H{2**63 - 1}").total == 2**63 - 1
    for text in (f"H{2**63}", f"H{2**62} L{2**62}", "H1" + "0" * 5000):
        with pytest.raises(ValueError, match=f"more than {2**63 - 1} steps"):
            Schedule(text)


@pytest.mark.parametrize("number", [0.25, Fraction(1, 4), Decimal("0.25"), np.float32(0.25), np.float64(0.25)])
def test_shares_are_numbers_of_any_kind(number: Any) -> None:
    by_hand = Schedule("L1 H6 L1").segments()
    assert Schedule.sandwich(number).segments(8) == by_hand
    assert Schedule.from_shares([("L", number / 2), ("H", 1 - number), ("L", number / 2)]).segments(8) == by_hand


@pytest.mark.parametrize("bad", ["0.25", None, True, 1j, [0.25]])
def test_shares_that_are_no_numbers_are_refused(bad: Any) -> None:
    with pytest.raises(TypeError, match="light_share must be a number, not"):
        Schedule.sandwich(bad)
    with pytest.raises(TypeError, match="share of H must be a number, not"):
        Schedule.from_shares([("H", bad)])


def test_other_bad_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="part of 0 steps"):
        Schedule("H5 L0 H5")
    with pytest.raises(TypeError, match=r"text.*int"):
        Schedule(1000)  # type: ignore[arg-type]
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="light_share must lie in"):
            Schedule.sandwich(share)
    for which in (0, 5, 1.5):
        with pytest.raises(ValueError, match="which must be 1, 2, 3 or 4"):
            Schedule.quarter(which)  # type: ignore[arg-type]
    for shares in ([], [("H", 0.5)], [("H", 1.5), ("L", -0.5)]):
        with pytest.raises(ValueError, match="sum to 1"):
            Schedule.from_shares(shares)
    with pytest.raises(ValueError, match="at least one segment"):
        Schedule.from_segments([])


@pytest.mark.parametrize("name", ["", "H12", "12", "H L", "H:"])
def test_names_that_the_text_form_cannot_hold_are_refused(name: str):
    """``H12`` for 8 steps would print as ``H128``, which is 128 steps of H."""
    with pytest.raises(ValueError, match="letters"):
        Schedule.constant(name)


@pytest.mark.parametrize("text", HAND_MADE)
def test_printing_and_parsing_are_inverse(text: str):
    assert str(Schedule(text)) == text
    assert Schedule(str(Schedule(text))) == Schedule(text)
    assert text in repr(Schedule(text))


@pytest.mark.parametrize("seed", range(20))
def test_a_fitted_schedule_prints_and_parses_to_itself(seed: int):
    fitted = random_shares(seed).fit(257)
    assert Schedule(str(fitted)) == fitted
    assert fitted.total == 257


def test_constructors_give_the_papers_schedules() -> None:
    assert Schedule.constant("L").fit(1000) == Schedule("L1000")
    assert Schedule.constant().fit(1000) == Schedule("H1000")
    quarters = ["L250 H750", "H250 L250 H500", "H500 L250 H250", "H750 L250"]
    assert [Schedule.quarter(which).fit(1000) for which in (1, 2, 3, 4)] == [Schedule(text) for text in quarters]
    assert Schedule.sandwich(0.25).fit(1000) == Schedule("L125 H750 L125")
    assert Schedule.from_segments("LLHHHHHHLL") == Schedule.sandwich(0.4)
    assert Schedule.from_segments(["small", "LARGE"]).fit(8) == Schedule("SMALL4 LARGE4")
    assert Schedule.sandwich(0.5, heavy="big", light="tiny").fit(8) == Schedule("TINY2 BIG4 TINY2")
    assert Schedule.sandwich(0.0) == Schedule.constant("H")
    assert Schedule.sandwich(1.0) == Schedule.constant("L")


def test_equality_is_of_the_meaning() -> None:
    assert Schedule("H5 H5") == Schedule("H10") != Schedule("H11")
    assert Schedule("H5 L5") != Schedule("L5 H5")
    assert Schedule("H10") != Schedule.constant("H")  # ten steps, any number of steps
    assert Schedule("H10") != "H10"
    assert len({Schedule.sandwich(0.25), Schedule.from_segments("LHHHHHHL"), Schedule.sandwich(0.3)}) == 2


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 64, 257, 1000, 1023])
@pytest.mark.parametrize("seed", range(8))
def test_segments_partition_the_steps_and_keep_the_shares(steps: int, seed: int):
    schedule = random_shares(seed)
    segments = schedule.segments(steps)
    assert [index for segment in segments for index in range(segment.first, segment.stop)] == list(range(steps))
    assert all(segment.steps >= 1 for segment in segments)
    assert all(one.model != next_one.model for one, next_one in pairwise(segments))
    model_at = [segment.model for segment in segments for _ in range(segment.steps)]
    edge = Fraction(0)
    for name, share in schedule.parts:
        first, stop = edge * steps, (edge + share) * steps
        edge += share
        inside = range(int(first + Fraction(1, 2)), int(stop + Fraction(1, 2)))
        assert all(model_at[index] == name for index in inside)
        assert abs(len(inside) - share * steps) <= 1


@pytest.mark.parametrize("percent", range(0, 101, 5))
@pytest.mark.parametrize("steps", [1, 10, 99, 256])
def test_a_sandwich_has_its_light_steps_at_both_ends(percent: int, steps: int):
    runs = [segment.steps for segment in Schedule.sandwich(percent / 100).segments(steps) if segment.model == "L"]
    assert abs(sum(runs) - steps * percent / 100) <= 1
    if 0 < percent < 100 and len(runs) == 2:
        assert abs(runs[0] - runs[1]) <= 1


def test_counts_must_be_the_steps() -> None:
    with pytest.raises(ValueError, match="has 1000 steps, but steps=256"):
        Schedule("L125 H750 L125").segments(256)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        Schedule.sandwich(0.25).segments()
    with pytest.raises(ValueError, match="steps must be at least 1"):
        Schedule.sandwich(0.25).segments(0)
    assert Schedule.sandwich(0.25).total is None


@pytest.mark.parametrize(("text", "saved"), HAND_MADE.items())
def test_saving_of_the_hand_made_schedules(text: str, saved: float):
    assert Schedule(text).saved(BLOCKS) == pytest.approx(saved, abs=1e-12)


@pytest.mark.parametrize(("blocks", "percent"), [(4, 16.67), (6, 12.50), (8, 8.33), (10, 4.17), (12, 0.0)])
def test_saving_by_light_model(blocks: int, percent: float):
    """2604.02340: a quarter of the steps with a light model of 4 to 12 blocks."""
    cost = {"heavy": 12, "light": blocks}
    saved = Schedule.sandwich(0.25, heavy="heavy", light="light").saved(cost)
    assert round(100 * saved, 2) == percent
    assert saved == pytest.approx(0.25 * (12 - blocks) / 12, abs=1e-12)


def test_saving_by_share_of_light_steps() -> None:
    """2604.02340: 0, 10, ..., 100 % of the steps with 4 blocks of 12."""
    row = [round(100 * Schedule.sandwich(percent / 100).saved(BLOCKS), 1) for percent in range(0, 101, 10)]
    assert row == [0, 6.7, 13.3, 20, 26.7, 33.3, 40, 46.7, 53.3, 60, 66.7]


def test_saving_is_linear_in_the_costs_of_any_number_of_models() -> None:
    schedule = Schedule("L100 M100 H600 M100 L100")
    by_hand = 1 - (0.2 * 4 + 0.2 * 8 + 0.6 * 12) / 12
    assert schedule.saved({"h": 12, "m": 8, "l": 4}) == pytest.approx(by_hand, abs=1e-12)
    assert schedule.saved({"H": 1.2e10, "M": 8e9, "L": 4e9}) == pytest.approx(0.2, abs=1e-12)  # any unit
    assert Schedule("L10").saved({"L": 4}) == 0.0  # nothing dearer to compare with
    with pytest.raises(ValueError, match=r"cost must name M; it names H, L"):
        schedule.saved(BLOCKS)
