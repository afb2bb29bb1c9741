"""The search over schedules: what is tried, what a segment contributes, and results that survive an interruption."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mdkern.evaluation.search import (
    Found,
    Models,
    Results,
    all_schedules,
    best_and_mean,
    frequencies,
    influence,
    read_results,
    search,
)

SETTING = {"segments": 4, "light": 2, "seed": 0}


def additive(models: Models, noise: Tensor) -> Tensor:
    """Scores in which a light segment number s adds 2^s, on noise that all schedules share."""
    return noise + sum(2.0**s for s, model in enumerate(models) if model == "L")


class TestSchedules:
    def test_all_ways_to_choose_the_light_segments(self) -> None:
        found = all_schedules(10, 4)
        assert len(found) == len(set(found)) == math.comb(10, 4) == 210
        assert all(models.count("L") == 4 for models in found)
        assert found == sorted(found)  # so that those that begin alike stand together
        assert len(all_schedules(5, 2, ("H", "M", "L"))) == math.comb(5, 2) * 2**2

    @pytest.mark.parametrize(("segments", "light", "names"), [(3, 4, "HL"), (0, 0, "HL"), (3, -1, "HL"), (3, 1, "H")])
    def test_impossible_numbers_are_refused(self, segments: int, light: int, names: str) -> None:
        with pytest.raises(ValueError, match=r"light|models"):
            all_schedules(segments, light, names)


class TestStatistics:
    def test_the_influence_of_additive_harm_is_worked_out(self) -> None:
        """Light at s: 2^s, and the one other light segment, any of the other three alike; the mean of all is half of
        all harms. So the influence is 2^s + (15 - 2^s) / 3 - 7.5, without error: noise is shared."""
        noise = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found = [Found(models, additive(models, noise)) for models in all_schedules(4, 2)]
        for s, value in enumerate(influence(found)["L"]):
            assert value.mean == pytest.approx(2**s + (15 - 2**s) / 3 - 7.5)
            assert value.standard_error < 1e-9
        assert influence(found)["H"][0].mean == pytest.approx(-influence(found)["L"][0].mean)

    def test_a_model_that_is_never_there_has_no_influence(self) -> None:
        found = [Found(("H", "L"), torch.ones(3))]
        assert math.isnan(influence(found)["L"][0].mean)
        with pytest.raises(ValueError, match="same"):
            influence([*found, Found(("H", "L"), torch.ones(4))])

    def test_frequencies_of_the_best_and_the_worst(self) -> None:
        found = [Found(models, additive(models, torch.zeros(2))) for models in all_schedules(4, 2)]
        best, worst = frequencies(found, "L", 1 / 6)  # one of six: light at 0 and 1, and at 2 and 3
        assert best == [1, 1, 0, 0]
        assert worst == [0, 0, 1, 1]
        for ask in (best_and_mean, lambda none: frequencies(none, "L")):
            with pytest.raises(ValueError, match="at least one schedule"):
                ask([])


class TestResults:
    def runner(self, asked: list[Models], stop_after: int | None = None) -> object:
        def run(schedules: list[Models]) -> Iterator[tuple[Models, Tensor]]:
            for number, models in enumerate(schedules):
                if number == stop_after:
                    raise KeyboardInterrupt
                asked.append(models)
                yield models, torch.tensor([[model == "L" for model in models]]).long()

        return run

    @staticmethod
    def score(sequences: Tensor) -> Tensor:
        return (sequences * 2.0 ** torch.arange(sequences.shape[1])).sum(-1)

    @pytest.mark.parametrize("cut", ['{"models": ["H"', '{"models": ["L", "L", "H", "H"], "scores": [0.0]}'])
    def test_an_interrupted_search_goes_on_where_it_stopped(self, tmp_path: Path, cut: str) -> None:
        path, asked, schedules = tmp_path / "search.jsonl", list[Models](), all_schedules(4, 2)
        with pytest.raises(KeyboardInterrupt) as caught:
            search(self.runner(asked, stop_after=4), self.score, schedules, Results(path, SETTING), progress=False)  # type: ignore[arg-type]
        assert caught.value.__notes__ == [
            f"4 schedules are done and kept in {path}: the same search goes on from there"
        ]
        assert len(path.read_text().splitlines()) == 1 + 4
        with path.open("a") as file:
            file.write(cut)  # as a process that is killed leaves it
        ranked = search(self.runner(asked), self.score, schedules, Results(path, SETTING), progress=False)  # type: ignore[arg-type]
        assert asked == schedules  # none twice
        assert [entry.name for entry in ranked[:2]] == ["LLHH", "LHLH"]
        assert [json.loads(line) for line in path.read_text().splitlines()][1:][0]["models"] == list(schedules[0])
        again = search(self.runner(asked), self.score, schedules, Results(path, SETTING), progress=False)  # type: ignore[arg-type]
        assert [(e.models, e.scores.tolist()) for e in again] == [(e.models, e.scores.tolist()) for e in ranked]
        assert asked == schedules

    def test_the_file_of_another_search_is_refused_by_what_differs(self, tmp_path: Path) -> None:
        Results(tmp_path / "search.jsonl", SETTING)
        with pytest.raises(ValueError, match=r"differs in seed\b"):
            Results(tmp_path / "search.jsonl", SETTING | {"seed": 1})

    @pytest.mark.parametrize("text", ["no results\n", "[1]\n", '{"a": 1}\nbroken\n{}\n', '{"a": 1}\ncut'])
    def test_a_foreign_file_is_refused_and_left_alone(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "search.jsonl"
        path.write_text(text)
        with pytest.raises(ValueError, match="search"):
            Results(path, SETTING)
        assert path.read_text() == text

    def test_results_are_read_without_what_they_were_searched_for(self, tmp_path: Path) -> None:
        path = tmp_path / "search.jsonl"
        results = Results(path, SETTING)
        with pytest.raises(ValueError, match="does not hold a search's results"):
            read_results(path)  # no schedule yet
        results.add(("H", "L"), torch.tensor([2.0, 4.0]))
        results.add(("L", "H"), torch.tensor([1.0, 3.0]))
        with path.open("a") as file:
            file.write('{"models": ["L", "L"], "sco')  # cut off
        found = read_results(path)
        assert [(entry.name, entry.scores.tolist()) for entry in found] == [("LH", [1.0, 3.0]), ("HL", [2.0, 4.0])]
        with pytest.raises(FileNotFoundError):
            read_results(tmp_path / "none.jsonl")
        path.write_text('{"texts": 1}\n{"texts": 2}\n')
        with pytest.raises(ValueError, match="does not hold a search's results"):
            read_results(path)

    def test_a_score_that_is_no_number_stops_the_search(self, tmp_path: Path) -> None:
        results = Results(tmp_path / "search.jsonl", SETTING)
        with pytest.raises(FloatingPointError, match="HHLL"):
            search(self.runner([]), lambda ids: ids.sum(-1) * torch.nan, all_schedules(4, 2), results, progress=False)  # type: ignore[arg-type]
        assert not results.found


def test_names_of_several_letters_are_told_apart() -> None:
    assert Found(("AB", "C"), torch.ones(1)).name == "AB C"
    assert [Found(models, torch.ones(1)).name for models in itertools.product("HL", repeat=1)] == ["H", "L"]
