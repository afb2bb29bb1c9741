"""The experiments on learning to decode: a whole run at the smallest size, what is counted, and what is concluded."""

from __future__ import annotations

import json
import lzma
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import choice_tables, learning_equal, learning_figures, learning_tables
from benchmarks.learning import gsm, runner
from benchmarks.learning.__main__ import build_parser
from benchmarks.learning.problems import END_ID, MASK_ID, PROMPT, answers, draw, prompts
from benchmarks.learning.runner import Record, run_parts
from benchmarks.learning.setting import SIZES, LeftmostRun, Study, Written, commits_needed, measure, write_answers
from benchmarks.learning.stages import PARTS, TUNED, Part, Wide, own_answers
from mdkern.decoders import Threshold
from mdkern.decoders.base import Proposal, View
from training.data import TextEncoder
from training.pairs import PaddedPairs

DOCUMENT = Path(__file__).parents[2] / "docs" / "learning.md"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_study(folder: Path, seed: int = 0, **changes: Any) -> Study:
    (folder / str(seed)).mkdir(parents=True, exist_ok=True)
    return Study(**({"size": SIZES["tiny"], "seed": seed, "device": torch.device("cpu"), "runs": folder} | changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """All parts but the one that needs data."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("learning")
    record = Record(folder / "results.json", make_study(folder))
    assert run_parts(record, list(PARTS)) == {"gsm": "it needs --gsm, the folder of the data"}
    return record


def use_results(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    for tables in (learning_tables, choice_tables):
        monkeypatch.setattr(tables, "RESULTS", folder)


@pytest.mark.slow
class TestRun:
    def test_what_is_there_is_not_run_again(self, whole: Record, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runner, "PARTS", {name: Part(lambda *_: 1 / 0, part.needs) for name, part in PARTS.items()})  # type: ignore[arg-type, return-value]
        before = whole.path.read_text()
        assert list(run_parts(whole, list(PARTS))) == ["gsm"]
        assert whole.path.read_text() == before

    def test_every_table_and_figure_is_drawn(self, whole: Record, monkeypatch: pytest.MonkeyPatch) -> None:
        use_results(monkeypatch, whole.path.parent)
        monkeypatch.setattr(learning_tables, "FILE", whole.path.name)
        for name, table in learning_tables.TABLES.items():
            assert (table() == learning_tables.ABSENT) == (name == "learning-supervised"), name
        drawn = learning_figures.draw_all(whole.path.parent)
        assert [path.name for path in drawn] == ["learning-curves.svg"]
        shown = learning_tables.content()
        assert shown is not None
        assert learning_figures.source_of(shown) in drawn[0].read_text()

    def test_all_models_start_from_the_base_model_and_are_trained_for_as_long(self, whole: Record) -> None:
        steps = {name: whole.parts()[name]["found"]["steps"] for name in TUNED}
        assert set(steps.values()) == {SIZES["tiny"].tune_steps}

    def test_own_answers_are_closed_by_one_end(self, whole: Record) -> None:
        pairs = own_answers(whole.study)
        for n in range(len(pairs)):
            response = pairs.tokens[pairs.starts[n] + PROMPT : pairs.starts[n + 1]]
            assert (response == END_ID).tolist() == [False] * (len(response) - 1) + [True]

    def test_another_setting_is_another_file(self, whole: Record, tmp_path: Path) -> None:
        study = make_study(tmp_path, size=replace(SIZES["tiny"], width=32))
        with pytest.raises(ValueError, match="size differ"):
            Record(whole.path, study)


@pytest.mark.slow
def test_gsm_is_fine_tuned_on_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"question": f"What is {n} and {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(1, 9)]
    for name in ("train", "test"):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"gsm8k_{name}.jsonl.xz").write_bytes(lzma.compress(text.encode()))
    record = Record(tmp_path / "results.json", make_study(tmp_path, gsm=tmp_path))
    assert run_parts(record, ["gsm"]) == {}
    found = record.parts()["gsm"]["found"]
    assert (found["pairs"], found["test"], found["steps"]) == (8, 8, 1)
    before, padded, cut = (found["rows"][name] for name in ("before", *gsm.RANDOM))
    assert before["by_kind"]["end of text"] > padded["by_kind"]["end of text"]  # one step is in its direction
    for row in (before, padded, cut):
        [ending] = row["endings"]
        assert (ending["length"], ending["answers"]) == (64, 2)
        assert 0 < ending["true_tokens"] < 64
    use_results(monkeypatch, tmp_path)
    monkeypatch.setattr(learning_tables, "FILE", "results.json")
    table = learning_tables.TABLES["learning-supervised"]()
    assert "| written in 64 columns: ended |" in table
    assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1
    assert learning_tables.TABLES["learning-headline"]() == learning_tables.ABSENT
    assert [path.name for path in learning_figures.draw_all(tmp_path)] == ["learning-gsm.svg"]


@pytest.mark.gpu
def test_every_part_runs_on_a_gpu(tmp_path: Path) -> None:
    study = make_study(tmp_path, device=torch.device("cuda"), size=replace(SIZES["tiny"], compiled=True))
    assert list(run_parts(Record(tmp_path / "r.json", study), list(PARTS))) == ["gsm"]


def test_two_seeds_fill_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "PARTS", {"one": Part(lambda study, _: {"x": study.seed}, seconds=0)})
    records = [Record(tmp_path / "r.json", make_study(tmp_path, seed)) for seed in (1, 0)]
    for record in records:
        assert run_parts(record, ["one"]) == {}
    content = json.loads((tmp_path / "r.json").read_text())
    assert {seed: parts["one"]["found"]["x"] for seed, parts in content["seeds"].items()} == {"0": 0, "1": 1}


def test_a_part_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {
        "bad": Part(lambda *_: 1 / 0),  # type: ignore[arg-type, return-value]
        "after": Part(lambda *_: {}, ("bad",)),
        "good": Part(lambda *_: {"x": 1}),
        "long": Part(lambda *_: {}, seconds=70),
    }
    monkeypatch.setattr(runner, "PARTS", parts)
    record = Record(tmp_path / "r.json", make_study(tmp_path))
    said: list[str] = []
    left_out = run_parts(record, list(parts), minutes=1.1, say=said.append)
    assert left_out["bad"] == "it failed"
    assert "ZeroDivisionError" in "".join(said)
    assert left_out["after"] == "it needs bad first"
    assert left_out["long"].startswith("it takes about 70 s, and 6")
    assert record.parts()["good"]["found"] == {"x": 1}
    with pytest.raises(ValueError, match="no such part: x"):
        run_parts(record, ["x"])


# ------------------------------------------------------------------------------------------------- what is counted


def test_commits_are_those_of_the_exact_cache(tmp_path: Path) -> None:
    """With the cache they are counted, without it they are worked out."""
    study = make_study(tmp_path)
    model, problems = study.fresh(1).eval(), draw(np.random.default_rng(0), 5)
    with torch.no_grad():
        model.head_bias[END_ID] += 1.0
    cached = write_answers(study, model, problems, Threshold(0.9))
    plain = write_answers(study, model, problems, Threshold(0.9), cache="none")
    assert (cached.answers == plain.answers).all()
    assert torch.equal(cached.passes, plain.passes)
    assert not plain.commits.any()
    assert torch.equal(cached.commits, commits_needed(plain.tokens, 32))


def test_tokens_a_pass_and_accuracy_of_known_answers(tmp_path: Path) -> None:
    problems = draw(np.random.default_rng(0), 2)
    right = answers(problems, np.zeros((2, 4), dtype=np.int64))
    wrong = right.copy()
    wrong[1] = END_ID
    written = Written(wrong, *map(torch.tensor, ([True, True], [30.0, 0.0], [10.0, 4.0], [0.0, 0.0])), {})
    found = measure(make_study(tmp_path), problems, written)
    assert found["strict"]["mean"] == found["final"]["mean"] == 0.5
    assert found["tokens_per_pass"]["mean"] == 1.5
    assert found["commits"] == 1  # that of the prompt's block; neither fills its first block of the answer
    assert found["tokens_per_forward"]["mean"] == pytest.approx((30 / 11 + 0) / 2)
    assert commits_needed(torch.tensor([31.0, 32.0, 63.0, 64.0]), 32).tolist() == [1, 2, 2, 2]


def test_the_run_ends_at_the_first_doubt() -> None:
    generator = torch.Generator().manual_seed(0)
    p, masked = torch.rand(500, 6, generator=generator), torch.rand(500, 6, generator=generator) < 0.6
    view = View(**(dict.fromkeys(View.__dataclass_fields__) | {"masked": masked}))  # type: ignore[arg-type]
    choice = LeftmostRun(0.4).choose(view, Proposal(torch.zeros(500, 6, dtype=torch.int64), p))
    for row in range(500):
        expected: list[int] = []
        for column in range(6):
            if masked[row, column]:
                if p[row, column] < 0.4 and expected:
                    break
                expected.append(column)
                if p[row, column] < 0.4:
                    break
        assert choice.candidates[row].nonzero()[:, 0].tolist() == expected
    assert choice.bound == 0.0


def test_batches_are_filled_up_with_ends() -> None:
    wide = Wide(lambda step: PaddedPairs(np.array([[1, 2], [3, END_ID]]), np.array([1, 1])), 4)(0)
    assert wide.ids.tolist() == [[1, 2, END_ID, END_ID], [3, END_ID, END_ID, END_ID]]


def test_gsm_pairs_are_read_without_the_calculators_marks(tmp_path: Path) -> None:
    path = tmp_path / "gsm.jsonl"
    path.write_text(json.dumps({"question": "A?", "answer": "It is 2*2=<<2*2=4>>4.\n#### 4"}) + "\n")
    encoder = TextEncoder.load(gsm.TOKENIZER)
    pairs = gsm.read(path, encoder, 256)
    text = encoder.backend.decode(pairs.tokens[:-1].tolist())
    assert text == "A?\nIt is 2*2=4.\n#### 4"
    assert pairs.tokens[-1] == encoder.eos_id
    assert encoder.backend.decode(pairs.tokens[: pairs.prompt_lengths[0]].tolist()) == "A?\n"
    with pytest.raises(ValueError, match="no pair of at most 5 tokens"):
        gsm.read(path, encoder, 5)


def test_prompts_are_not_written_on(tmp_path: Path) -> None:
    study, problems = make_study(tmp_path), draw(np.random.default_rng(3), 3)
    written = write_answers(study, study.fresh(1).eval(), problems, LeftmostRun(0.1), cache="none")
    assert not (written.answers == MASK_ID).any()
    assert prompts(problems).shape == (3, PROMPT)


# ---------------------------------------------------------------------------------------------- what is concluded


def curve(*points: tuple[float, float], error: float = 0.0) -> list[dict[str, Any]]:
    return [
        {"threshold": 1 - 0.05 * (i + 1), "strict": {"mean": right, "standard_error": error},
         "tokens_per_pass": {"mean": speed, "standard_error": 0.0},
         "tokens_per_forward": {"mean": speed / 2, "standard_error": 0.0}}
        for i, (right, speed) in enumerate(points)
    ]  # fmt: skip


def test_the_most_tokens_are_found_between_thresholds() -> None:
    most = learning_equal.most_tokens
    assert most(curve((0.9, 1.0), (0.8, 3.0), (0.6, 4.0)), 0.8, "tokens_per_pass") == 3.0
    assert most(curve((0.9, 1.0), (0.8, 3.0), (0.6, 4.0)), 0.7, "tokens_per_pass") == pytest.approx(3.5)
    assert most(curve((0.6, 1.0), (0.8, 2.0)), 0.7, "tokens_per_forward") == pytest.approx(1.0)
    assert np.isnan(most(curve((0.5, 1.0), (0.6, 2.0)), 0.7, "tokens_per_pass"))


def seed_of(oput: float, masked: float) -> dict[str, Any]:
    def cell(speed: float) -> dict[str, Any]:
        return {"found": {"curves": {name: curve((0.95, speed), (0.5, 9.0)) for name in learning_tables.DECODERS}}}

    parts = {"base": cell(1.0), "masked": cell(masked), "oput": cell(oput)}
    for part in parts.values():  # so that the accuracy asked for, a point below the first, is that of a point
        for points in part["found"]["curves"].values():
            points[1]["strict"]["mean"] = 0.0
            points.insert(1, points[0] | {"strict": {"mean": 0.94, "standard_error": 0.0}})
    return {f"eval_{name}": part for name, part in parts.items()}


@pytest.mark.parametrize(
    ("speeds", "words"),
    [
        ([(4.0, 2.0), (4.2, 2.0), (4.1, 2.0)], "the claim holds"),
        ([(2.2, 2.0), (2.4, 2.0), (2.3, 2.0)], "the claim does not hold"),
        ([(2.0, 2.0), (4.0, 2.0), (3.0, 2.0)], "undecided"),
        ([(4.0, 2.0)], "the claim holds"),
        ([(2.2, 2.0)], "One seed: ± is a standard error over its problems"),
    ],
)
def test_the_claim_is_judged_by_its_standard_error(speeds: list[tuple[float, float]], words: str) -> None:
    shown = {"seeds": {str(i): seed_of(*pair) for i, pair in enumerate(speeds)}}
    text = learning_tables.headline(shown)
    assert words in text
    assert f"{len(speeds)} seed{'s' * (len(speeds) > 1)}, " in text


def test_one_seeds_error_is_that_of_its_points() -> None:
    """Where a curve crosses the accuracy, speed moves by the error over the slope: of both ends and of the target."""
    error, slope = 0.001, 1.0 / 0.2  # tokens a pass over accuracy
    crossing = curve((0.95, 1.0), (0.75, 2.0), error=error)  # asked for: 0.94, at 1.05 tokens
    seeds = [{"eval_base": {"curves": {"threshold": crossing}}, "eval_oput": {"curves": {"soft": crossing}}}]
    found = learning_equal.speed(seeds, ("oput", ("soft",)), "tokens_per_pass")
    assert found.mean == pytest.approx(1.05)
    ends = math.hypot(0.95 * error, 0.05 * error)  # by how far each is from the crossing
    assert found.error == pytest.approx(slope * math.hypot(error, ends), rel=0.15)
    assert found.seeds == 1
    pair = learning_equal.ratio(seeds, ("oput", ("soft",)), ("oput", ("soft",)), "tokens_per_pass")
    assert pair == (1.0, 0.0, 1)  # the same points on both sides
    low = [seeds[0] | {"eval_oput": {"curves": {"soft": curve((0.5, 3.0))}}}]
    assert learning_equal.speed(low, ("oput", ("soft",)), "tokens_per_pass").seeds == 0
    assert learning_equal.ratio(low, ("oput", ("soft",)), ("base", ("threshold",)), "tokens_per_pass") is None


def test_what_light_passes_lose_is_held_against_the_whole_gap() -> None:
    def row(label: str, right: float, heavy: float, light: float) -> dict[str, Any]:
        strict = {"mean": right, "standard_error": 0.03}
        return {"label": label, "threshold": 0.9, "strict": strict, "passes_by_model": {"H": heavy, "L": light}}

    rows = [[row("all heavy", 0.9, 8, 0), row("light first", 0.8, 3, 1), row("all light", 0.5, 0, 9)]]
    assert learning_tables.lost_by_light(rows, 0.9) == ["0.9", "25 %", "10.0 ± 4.2", "25 %"]


class TestDocument:
    def test_every_command_is_understood(self) -> None:
        text = DOCUMENT.read_text().replace("\\\n", "")
        commands = re.findall(r"^python -m benchmarks\.learning (--[^#\n]*)", text, re.MULTILINE)
        assert len(commands) == 8
        for command in commands:
            named = build_parser().parse_args(shlex.split(command)).parts
            assert set(named) <= set(PARTS)
            assert all(set(PARTS[name].needs) <= set(named) for name in named)

    @pytest.mark.parametrize("document", ["learning.md", "study.md"])
    def test_under_what_is_measured_is_the_command_that_measures_it(self, document: str) -> None:
        sections = re.split(r"^## ", (DOCUMENT.parent / document).read_text(), flags=re.MULTILINE)
        shown = [section for section in sections[1:] if "<!-- end -->" in section]
        assert len(shown) > 5
        for section in shown:
            title, tables = section.split("\n")[0], section.rindex("<!-- end -->")
            assert title == "In short" or "\npython -m benchmarks." in section[tables:], title

    def test_the_figures_are_those_of_the_results(self) -> None:
        for name, (results, _) in learning_figures.FIGURES.items():
            shown = results()
            assert shown is not None, name
            path = learning_figures.RESULTS / f"learning-{name}.svg"
            assert learning_figures.source_of(shown) in path.read_text(), name
