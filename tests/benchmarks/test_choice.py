"""The experiment on a learned choice of positions runs at a tiny size, and compares at equal numbers of passes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks import choice_tables, learning_figures
from benchmarks.learning import choice, exponents
from benchmarks.learning.choice import Written, at_passes, main, still
from mdkern import decoders
from mdkern.decoders import Learned
from mdkern.pretrained import FOLDER
from tests.problems.policies import random_policy
from training.data import tokenize

TEXT = "\n".join(f"{number} and {number + 1} make {2 * number + 1}, they said." for number in range(200))


def written(passes: float, nats: list[float]) -> Written:
    values = torch.tensor(nats, dtype=torch.float64)
    return Written(values, values + 1, values / 10, torch.tensor([passes - 1, passes + 1], dtype=torch.float64))


def test_between_two_settings_texts_are_mixed_one_by_one() -> None:
    curve = [written(40, [1.0, 2.0]), written(20, [3.0, 6.0]), written(10, [5.0, 5.0])]
    found = at_passes(curve, 25.0)
    assert found is not None
    assert found.nats.tolist() == [2.5, 5.0]
    assert found.entropy.tolist() == [3.5, 6.0]
    assert float(found.passes.mean()) == 25.0
    assert at_passes(curve, 9.0) is None
    assert at_passes(curve, 41.0) is None


def test_rules_keep_their_parameters_with_still_noise() -> None:
    for decoder in (decoders.Threshold(0.3), decoders.Factor(2.0), Learned(random_policy(), 0.4)):
        quiet = still(decoder)
        assert isinstance(quiet, type(decoder))
        assert not quiet.fresh_noise
        assert type(quiet) is type(still(decoder))
        for name in vars(decoder):
            assert name == "fresh_noise" or getattr(quiet, name) == getattr(decoder, name)


def test_the_verdict_counts_what_is_better_and_worse() -> None:
    machine = {"device": "x", "torch": "y"}

    def found(rows: list[Any]) -> dict[str, Any]:
        return {"infill": {"rows": rows, "environment": machine}}

    def row(passes: float, judged: float, gains: bool, rule: str = "mlp") -> dict[str, Any]:
        difference = {"mean": judged, "standard_error": 0.1}
        return {"rule": rule, "passes": {"mean": passes}, "nats_over_plain": difference, "gains": gains}

    plain = {"rule": "threshold"}
    first = [plain, row(90.2, -0.5, True), row(80, 0.1, False), row(70, 0.5, False, "factor")]
    second = [plain, row(85, 0.21, False), row(75, -0.3, False), row(65, -0.19, False)]
    setting = {"testing": 3, "length": 8, "written": 4, "fitting": 1000, "likelihood": 2}
    text = choice_tables.verdict({"setting": setting, "seeds": {"0": found(first), "1": found(second)}})
    assert "x, torch y; 2 seeds. 3 texts of 8 tokens, 4 of them written" in text
    assert "| infilling, temperature 0 | network | 5 | 1 (90) | 1 (75) | 1 (85) |" in text
    assert "| infilling, temperature 0 | factor | 1 | 0 | 0 | 1 (70) |" in text
    assert "continuation" not in text
    assert choice_tables.verdict({"setting": setting, "seeds": {"0": found([plain])}}) == choice_tables.ABSENT


@pytest.mark.slow
def test_the_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    path = tmp_path / "found.json"
    arguments = [
        "--text",
        str(tmp_path / "text.txt"),
        "--device",
        "cpu",
        "--runs",
        str(tmp_path),
        "--output",
        str(path),
    ]
    assert main(arguments) == 0
    found = json.loads(path.read_text())["seeds"]["0"]
    assert set(found) == {"infill", "continue"}
    rules = {row["rule"] for row in found["infill"]["rows"]}
    assert rules == {
        "threshold", "factor", "entropy bound", "top probability", "margin", "linear", "mlp", "closed loop",
    }  # fmt: skip
    for task in found.values():
        for row in task["rows"]:
            assert 0.0 <= row["agreement"]["mean"] <= 1.0
            assert 2.0 <= row["passes"]["mean"] <= 8.0
            assert row["exact_nats"]["mean"] > 0.0
    monkeypatch.setattr(choice_tables, "content", lambda: json.loads(path.read_text()))
    for name in ("choice-verdict", "choice-offline", "choice-rules"):
        table = choice_tables.TABLES[name]()
        assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1
    figure = Figure()
    learning_figures.choice(figure, {"seeds": {"0": found}})
    assert len(figure.axes) == 2 * 4
    for number, axis in enumerate(figure.axes):
        measure, rows = list(learning_figures.MEASURES)[number % 4], list(found.values())[number // 4]["rows"]
        drawn = {tuple(point) for container in axis.containers for point in container[0].get_xydata()}
        assert drawn
        assert drawn <= {(row["passes"]["mean"], row[measure]["mean"]) for row in rows}
    careful = found["infill"]["rows"][0]
    assert (careful["rule"], careful["bound"]) == ("threshold", 0.9)
    assert careful["agreement"]["mean"] > 0.9

    def fail(*_: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(choice, "fit", fail)
    before = path.read_text()
    assert main(arguments) == 0  # all of it is there
    assert path.read_text() == before
    assert main([*arguments, "--seed", "1"]) == 1
    assert "no such kernel" in capsys.readouterr().out
    assert path.read_text() == before


def test_learned_exponents_are_compared_where_they_were_fitted_and_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train", "valid"):
        (tmp_path / f"{name}.txt").write_text(TEXT)
        tokenize([str(tmp_path / f"{name}.txt")], FOLDER / "tokenizer", tmp_path / f"{name}.bin")
    path = tmp_path / "learning-exponents.json"
    options = ["--data", str(tmp_path / "train.bin"), "--valid", str(tmp_path / "valid.bin"), "--output", str(path)]
    options += ["--device", "cpu"]
    assert exponents.main([*options, "--size", "tiny"]) == 0
    runs = json.loads(path.read_text())["runs"]
    assert [run["windows"] for run in runs] == [0, 2]
    for run in runs:
        assert len(run["exponents"]) == 16
        assert math.prod(run["exponents"]) == pytest.approx(1.0, abs=1e-4)
        for where in ("train", "held out"):  # of nearly the same exponents, on equal masks
            assert run[where]["learned"] - run[where]["plain"] == pytest.approx(run[where]["difference"], abs=1e-6)
    monkeypatch.setattr(exponents, "run", lambda *_: pytest.fail("measured again"))
    assert exponents.main([*options, "--size", "tiny"]) == 0
    with pytest.raises(SystemExit):
        exponents.main([*options, "--size", "full"])
    assert "another setting" in capsys.readouterr().err
    monkeypatch.setattr(choice_tables, "RESULTS", tmp_path)
    table = choice_tables.TABLES["choice-exponents"]()
    assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1


def test_what_exponents_change_is_judged_by_its_standard_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(windows: int, seed: int, change: float) -> dict[str, Any]:
        found = {"plain": 4.0, "difference": change, "standard_error": 0.02}
        machine = {"device": "x", "torch": "y"}
        return {"windows": windows, "seed": seed, "environment": machine, "train": found, "held out": found,
                "exponents": [0.5, 2.0]}  # fmt: skip

    setting = {"length": 10, "tokens": 1000, "seeds": 2, "steps": 1, "batch_size": 1, "evaluated": 1}
    runs = [run(0, 0, -0.01), run(0, 1, -0.03), run(3, 0, 0.05), run(3, 1, 0.01), run(2, 0, -0.02), run(2, 1, -0.04)]
    (tmp_path / "learning-exponents.json").write_text(json.dumps({"setting": setting, "runs": runs}))
    monkeypatch.setattr(choice_tables, "RESULTS", tmp_path)
    text = choice_tables.TABLES["choice-exponents"]()
    assert "| 30 | 4.000 | +0.0300 ± 0.0141 | +0.0300 ± 0.0141 | 0.50–2.00 |" in text  # .02 / sqrt(2)
    assert "1,000 tokens: cannot be told from none; fitted to 30 tokens: worse; fitted to 20 tokens: better." in text


def test_learned_choices_are_held_to_the_base_models_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base model's is 0.9: less a point, the linear score has it at 3 tokens a pass, the network nowhere."""

    def point(bound: float, right: float, tokens: float) -> dict[str, Any]:
        values = {"strict": right, "tokens_per_pass": tokens, "tokens_per_forward": tokens}
        return {"bound": bound, "threshold": bound} | {
            name: {"mean": value, "standard_error": 0.0} for name, value in values.items()
        }

    curves = {
        "threshold": [point(0.95, 0.9, 2.0), point(0.5, 0.5, 4.0)],
        "linear": [point(0.9, 0.89, 3.0), point(0.5, 0.2, 5.0)],
        "mlp": [point(0.9, 0.8, 3.0)],
    }
    plain = {"threshold": curves["threshold"], "run": [point(0.95, 0.85, 2.5), point(0.5, 0.65, 4.5)]}
    parts = {
        "eval_base": {"curves": plain},
        "learned": {"curves": curves, "offline": {name: {"bce": 0.25} for name in ("p", "linear", "mlp")}},
    }
    machine = {"device": "x", "torch": "y"}
    shown = {
        "setting": {"size": {"blocks": 3, "width": 96, "problems": 128}},
        "seeds": {"0": {name: {"environment": machine, "found": found} for name, found in parts.items()}},
    }
    (tmp_path / "learning-choice-problems.json").write_text(json.dumps(shown))
    monkeypatch.setattr(choice_tables, "RESULTS", tmp_path)
    text = choice_tables.TABLES["choice-problems"]()
    assert "3 blocks of width 96; 128 problems" in text
    assert "below 90.0 %" in text
    assert "| rule | 1 below | 5 below | 10 below | 20 below |" in text
    assert "| threshold | 2.05 ± 0.00 | 2.25 ± 0.00 | 2.50 ± 0.00 | 3.00 ± 0.00 | 0.250 |" in text
    assert "| leftmost run | not reached | 2.50 ± 0.00 | 3.00 ± 0.00 | 4.00 ± 0.00 | – |" in text
    assert "| linear score | 3.00 ± 0.00 |" in text
    assert "| network | not reached | not reached | 3.00 ± 0.00 | 3.00 ± 0.00 | 0.250 |" in text


def test_learned_choices_are_compared_with_rules_on_the_same_model() -> None:
    """Of one model and the same problems, the threshold was measured twice; the kept seeds are of other models."""
    kept = json.loads((choice_tables.RESULTS / choice_tables.PROBLEMS_FILE).read_text())["seeds"]
    others = json.loads((choice_tables.RESULTS / "learning-problems.json").read_text())["seeds"]
    assert not any("learned" in parts for parts in others.values())
    for parts in kept.values():
        curves = [parts[name]["found"]["curves"]["threshold"] for name in ("eval_base", "learned")]
        assert [point["threshold"] for point in curves[0]] == [point["bound"] for point in curves[1]]
        for measure in ("strict", "tokens_per_pass"):
            once, again = ([point[measure]["mean"] for point in curve] for curve in curves)
            assert once == pytest.approx(again, abs=1e-3)
            for seed in others.values():
                other = [point[measure]["mean"] for point in seed["eval_base"]["found"]["curves"]["threshold"]]
                assert other != pytest.approx(again, abs=1e-3)
