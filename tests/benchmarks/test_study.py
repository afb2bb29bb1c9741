"""The study runs from end to end at the size of seconds, goes on where it stopped, and says what its numbers say."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks import study_figures, study_shown, study_tables
from benchmarks.study import runner
from benchmarks.study.__main__ import build_parser
from benchmarks.study.fitted import additive_harm, cheapest_for, fit, harms, resample, terraces
from benchmarks.study.quality import HAND_MADE
from benchmarks.study.routing import OneByOne, mean_entropy
from benchmarks.study.runner import ORDER, PARTS, Budget, Record, run_parts
from benchmarks.study.setting import GRID, SIZES, Part, Study, events, passes, sandwich, segments_of, spread
from mdkern import Schedule, adapt, sample
from mdkern.evaluation.assignment import best_schedule
from mdkern.evaluation.likelihood import likelihood
from mdkern.evaluation.search import Found, all_schedules, influence
from tests.conftest import SHAPE, random_dit

TINY = replace(SIZES["tiny"], samples=3)
STUDY = (Path(__file__).parent.parent.parent / "docs" / "study.md").read_text()


def make_study(**changes: Any) -> Study:
    """Four random models of 1, 2, 3 and 3 blocks and a random judge."""
    blocks = {"1": 1, "2": 2, "3": 3, "3b": 3}
    models = {
        name: random_dit(number, num_blocks=count, max_length=TINY.length)
        for number, (name, count) in enumerate(blocks.items())
    }
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=SHAPE["vocab_size"],
        n_positions=TINY.length,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    text = torch.randint(SHAPE["mask_id"], (5, TINY.length), generator=torch.Generator().manual_seed(0))
    fields: dict[str, Any] = {"models": models, "judge": GPT2LMHeadModel(config).eval(), "size": TINY, "text": text}
    return Study(**(fields | changes))


def token_losses(study: Study, ids: Tensor) -> Tensor:
    """-log p of every token but the first under the judge, float32 ``[N, L - 1]``."""
    with torch.no_grad():
        return -study.judge(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """Every part, in two turns."""
    path = tmp_path_factory.mktemp("study") / "study-shipped.json"
    assert run_parts(Record(path, make_study()), ["path", "search"], say=lambda _: None) == {}
    record = Record(path, make_study())
    assert list(record.parts) == ["path", "search"]
    assert run_parts(record, say=lambda _: None) == {}
    return record


class TestRun:
    @pytest.mark.slow
    def test_every_part_is_kept_with_its_machine(self, whole: Record) -> None:
        parts = json.loads(whole.path.read_text())["parts"]
        assert list(parts) == list(ORDER) == list(PARTS)
        for entry in parts.values():
            assert entry["environment"]["torch"] == torch.__version__
            assert entry["seconds"] > 0
        assert parts["hand_made"]["found"]["rows"][1]["points"]["L1000"]["score"]["count"] == TINY.samples

    @pytest.mark.slow
    def test_what_is_there_is_not_measured_again(self, whole: Record, monkeypatch: pytest.MonkeyPatch) -> None:
        def never(_: Study) -> Any:
            raise AssertionError("measured again")

        monkeypatch.setattr(runner, "PARTS", {name: replace(part, run=never) for name, part in PARTS.items()})
        assert run_parts(Record(whole.path, make_study()), say=lambda _: None) == {}
        with pytest.raises(AssertionError, match="again"):
            run_parts(Record(whole.path, make_study()), ["path"], again=True, say=lambda _: None)

    @pytest.mark.slow
    def test_a_file_of_another_study_is_refused(self, whole: Record) -> None:
        with pytest.raises(ValueError, match="differs in size"):
            Record(whole.path, make_study(size=replace(TINY, samples=4)))
        models = make_study().models
        with pytest.raises(ValueError, match="differs in models"):
            Record(whole.path, make_study(models=dict(models) | {"1": models["2"]}))

    @pytest.mark.slow
    def test_points_are_those_of_sample_and_the_judge(self, whole: Record) -> None:
        """`sample` by itself, and the judge's own logits, sample by sample."""
        study = make_study()
        found = whole.parts["hand_made"]["found"]["rows"][0]
        score = {}
        for label, text in (("L125 H750 L125", "L1 H3 L1"), ("H1000", "H5")):
            out = sample(study.pair, Schedule(text), num_samples=3, length=TINY.length, seed=0, progress=False)
            score[label] = token_losses(study, out.sequences).double().mean(-1)
        assert found["steps"] == 5
        for label, values in score.items():
            assert found["points"][label]["score"]["mean"] == pytest.approx(float(values.mean()), abs=1e-5)
        gap = (score["L125 H750 L125"] - score["H1000"]).mean()
        assert found["points"]["L125 H750 L125"]["over"]["H1000"]["mean"] == pytest.approx(float(gap), abs=1e-5)
        assert found["points"]["H1000"]["over"]["H1000"]["mean"] == 0

    @pytest.mark.slow
    def test_three_models_are_fitted_as_schedules_are_optimized(self) -> None:
        study = make_study(size=replace(TINY, samples=1, times=GRID // 2))
        models = {"H": study.models["3"], "M": study.models["2"], "L": study.models["1"]}
        found = PARTS["three_models"].run(study)
        assert found["letters"] == {"M": "2"}
        row = found["rows"][2]
        budget = cheapest_for(row["light"], study.cost(models))
        options: dict[str, Any] = {"length": TINY.length, "num_samples": TINY.path_samples, "segments": GRID // 2}
        wanted = Schedule.optimize(models, budget=budget, progress=False, **options)
        assert row["points"]["2, fitted"]["schedule"] == str(wanted)

    @pytest.mark.slow
    def test_likelihoods_are_those_of_the_package(self, whole: Record) -> None:
        """Of the heavy model by itself, on the same texts; over itself nothing."""
        study = make_study()
        texts = study.texts(TINY.windows)
        bound = likelihood(study.models["3"], input_ids=texts, samples=TINY.masks)
        point = whole.parts["bounds"]["found"]["points"]["3"]
        assert point["bound"]["mean"] == pytest.approx(float((bound.nats / TINY.length).mean()), abs=1e-6)
        assert point["over"]["3"]["mean"] == 0
        exact = likelihood(study.models["3"], input_ids=texts, method="decoder", decoder="margin", steps=TINY.length)
        margin = whole.parts["order"]["found"]["decoders"]["margin"]["all heavy"]
        assert margin["nats"]["mean"] == pytest.approx(float((exact.nats / TINY.length).mean()), abs=1e-6)

    @pytest.mark.slow
    def test_fitted_schedules_cost_what_the_sandwich_costs(self, whole: Record) -> None:
        for row in whole.parts["fitted"]["found"]["rows"]:
            for label, point in row["points"].items():
                if label != "all heavy":
                    assert point["light_share"] == pytest.approx(row["light"]), label

    def test_only_what_was_written_is_judged(self) -> None:
        study = make_study()
        ids = study.texts(5)
        assert torch.allclose(study.score(ids, given=6).float(), token_losses(study, ids)[:, 5:].mean(-1), atol=1e-5)


@pytest.mark.gpu
def test_every_part_runs_on_a_gpu(tmp_path: Path) -> None:
    """In bfloat16, with kernels and graphs."""
    study = make_study()
    models = {name: model.to("cuda", torch.bfloat16) for name, model in study.models.items()}
    study = make_study(models=models, judge=study.judge.to("cuda"))
    record = Record(tmp_path / "study.json", study)
    assert run_parts(record, say=lambda _: None) == {}
    assert {entry["environment"]["device"] for entry in record.parts.values()} == {torch.cuda.get_device_name()}


class TestBudget:
    @pytest.fixture
    def parts(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Three parts on a clock of their own: a pass takes two seconds."""
        ran: list[str] = []
        self.now = 0.0

        def make(name: str, cost: float, **needs: Any) -> Part:
            def run(_: Study) -> dict[str, Any]:
                ran.append(name)
                self.now += 2 * cost
                return {}

            return Part(run, lambda _: cost, **needs)

        made = {"dear": make("dear", 40.0), "after": make("after", 1.0, needs=("dear",)), "cheap": make("cheap", 5.0)}
        monkeypatch.setattr(runner, "PARTS", made)
        monkeypatch.setattr(
            runner, "seconds", lambda run, _: (lambda before: (run(), self.now - before)[::-1])(self.now)
        )
        return ran

    def test_what_will_not_fit_is_left_out_and_named(self, parts: list[str], tmp_path: Path) -> None:
        budget = Budget(60, clock=lambda: self.now)
        budget.add(20, 10)
        left_out = run_parts(Record(tmp_path / "s.json", make_study()), list(runner.PARTS), budget, say=lambda _: None)
        assert parts == ["cheap"]
        assert left_out == {
            "dear": "it takes about 80 s, and 60 s are left",
            "after": "it needs dear first",
        }

    def test_with_time_all_are_run_in_order(self, parts: list[str], tmp_path: Path) -> None:
        budget = Budget(100, clock=lambda: self.now)
        budget.add(20, 10)
        record = Record(tmp_path / "s.json", make_study())
        assert run_parts(record, ["cheap", "after", "dear"], budget, say=lambda _: None) == {}
        assert parts == ["dear", "after", "cheap"]
        assert budget.left() == 100 - 2 * 46

    def test_small_parts_do_not_spoil_the_prediction(self) -> None:
        budget = Budget(None)
        budget.add(2, 1)
        budget.add(100, 5)  # it compiled something
        assert budget.predicted(7) == 14
        budget.add(299, 99)
        assert budget.predicted(7) == 7 * 301 / 100

    def test_two_processes_fill_one_file(self, parts: list[str], tmp_path: Path) -> None:
        """Each with parts of its own, the one that waits for another's after it is there."""
        one, other = (Record(tmp_path / "s.json", make_study()) for _ in range(2))
        run_parts(one, ["cheap"], say=lambda _: None)
        run_parts(other, ["dear"], say=lambda _: None)
        assert run_parts(one, ["after", "dear"], say=lambda _: None) == {}
        assert parts == ["cheap", "dear", "after"]
        assert list(json.loads(one.path.read_text())["parts"]) == ["dear", "after", "cheap"]

    def test_text_may_come_later(self, parts: list[str], tmp_path: Path) -> None:
        run_parts(Record(tmp_path / "s.json", make_study(text=None)), ["cheap"], say=lambda _: None)
        record = Record(tmp_path / "s.json", make_study())
        run_parts(record, ["dear"], say=lambda _: None)
        assert list(Record(tmp_path / "s.json", make_study(text=None)).setting["text"]) == ["source", "digest"]
        with pytest.raises(ValueError, match="differs in text"):
            Record(tmp_path / "s.json", make_study(source="another"))

    def test_models_may_come_later(self, parts: list[str], tmp_path: Path) -> None:
        models = make_study().models
        few = {name: models[name] for name in ("1", "3")}
        run_parts(Record(tmp_path / "s.json", make_study(models=few)), ["cheap"], say=lambda _: None)
        whole = Record(tmp_path / "s.json", make_study())
        run_parts(whole, ["dear"], say=lambda _: None)
        again = Record(tmp_path / "s.json", make_study(models=few))
        assert sorted(again.setting["blocks"]) == ["1", "2", "3", "3b"]
        with pytest.raises(ValueError, match="differs in models"):
            Record(tmp_path / "s.json", make_study(models=few | {"1": models["2"]}))

    def test_rows_of_models_that_are_gone_are_kept(self, tmp_path: Path) -> None:
        """And those of models that are there are measured again."""
        study = make_study()
        few = {name: study.models[name] for name in ("1", "3")}
        marked = {"points": {"1": "old", "2": "old"}, "blocks": {"2": 2}}
        found = make_study(models=few, found={"bounds": marked, "light_size": marked})
        assert PARTS["bounds"].run(found)["points"]["2"] == "old"
        assert PARTS["bounds"].run(found)["points"]["1"] != "old"
        sizes = PARTS["light_size"].run(found)
        assert (sizes["points"]["2"], sizes["blocks"]) == ("old", {"2": 2, "1": 1})

    def test_a_part_is_measured_again_for_a_model_that_has_come_since(self, tmp_path: Path) -> None:
        """And no other part is."""
        models, said = make_study().models, list[str]()
        names = ["path", "measures", "search", "prediction", "bounds"]
        few = {name: models[name] for name in ("1", "3")}
        for hand in (few, few, models, few):
            said.append("")
            record = Record(tmp_path / "s.json", make_study(models=hand))
            assert run_parts(record, names, say=lambda line: said.append(said.pop() + line + "; ")) == {}
        first, second, third, fourth = said
        assert "there" not in first
        assert second == fourth == "; ".join(f"{name}: there already" for name in names if name) + "; "
        for name in names:
            assert (f"{name}: there already" in third) == (name in ("path", "search")), name
        found = json.loads((tmp_path / "s.json").read_text())["parts"]
        assert found["measures"]["found"]["baseline"] == "3b"
        assert set(found["bounds"]["found"]["points"]) == {"1", "2", "3", "3b"}
        for name, least in (("light_size", {"1": 0}), ("three_models", {})):
            assert not PARTS[name].whole(make_study(), {"points": least, "letters": least})

    def test_parts_may_be_taken_from_another_study_of_the_pair(self, parts: list[str], tmp_path: Path) -> None:
        few = {name: make_study().models[name] for name in ("1", "3")}
        run_parts(Record(tmp_path / "pair.json", make_study(models=few)), ["dear"], say=lambda _: None)
        record = Record(tmp_path / "family.json", make_study(), tmp_path / "pair.json")
        assert run_parts(record, ["after"], say=lambda _: None) == {}
        assert list(json.loads(record.path.read_text())["parts"]) == ["after"]
        with pytest.raises(ValueError, match="differs in size"):
            Record(tmp_path / "s.json", make_study(size=replace(TINY, samples=2)), tmp_path / "pair.json")
        with pytest.raises(ValueError, match="is not there"):
            Record(tmp_path / "s.json", make_study(), tmp_path / "none.json")

    def test_parts_that_lack_something_say_what(self, tmp_path: Path) -> None:
        study = make_study(text=None)
        study.models = {name: study.models[name] for name in ("1", "3")}
        left_out = run_parts(
            Record(tmp_path / "s.json", study), ["measures", "light_size", "prediction"], say=lambda _: None
        )
        assert "--data" in left_out["measures"]
        assert "--models" in left_out["light_size"]
        assert left_out["prediction"] == "it needs search, path first"

    def test_unknown_parts_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no such part: figures"):
            run_parts(Record(tmp_path / "s.json", make_study()), ["figures"])


class TestArithmetic:
    def test_models_are_told_by_their_blocks(self) -> None:
        study = make_study()
        assert (study.heavy, study.light, study.baseline, study.between) == ("3", "1", "3b", ["2"])

    def test_passes_of_schedules_that_begin_alike(self) -> None:
        """HH in full, and the light half of HL: 1 + 1/4 of a pass at every event; two schedules are judged."""
        found = passes([("H", "L"), ("H", "H"), ("H", "H")], {"H": 1.0, "L": 0.5}, steps=1, length=9, samples=10)
        assert found == pytest.approx(10 * (1.25 + 2))
        assert events(2, 2) == pytest.approx(1.5)  # two positions at two steps: together half of the time

    def test_expected_events_are_those_of_the_sampler(self) -> None:
        out = sample(random_dit(), num_samples=400, length=16, steps=16, seed=0, batch_size=400, progress=False)
        count = out.nfe["H"].double()
        assert abs(float(count.mean()) - events(16, 16)) < 4 * float(count.std()) / 20

    def test_schedules_as_segments(self) -> None:
        assert sandwich(0.25, 8) == tuple("LHHHHHHL") == HAND_MADE["L125 H750 L125"]
        assert spread(("L", "H"), 4) == ("L", "L", "H", "H")
        assert segments_of(Schedule.sandwich(0.5), 4) == ("L", "H", "H", "L")
        with pytest.raises(ValueError, match="fit"):
            sandwich(0.1, 8)
        with pytest.raises(ValueError, match="fit"):
            segments_of(Schedule.sandwich(0.5), 3)
        with pytest.raises(ValueError, match="cannot"):
            spread(("L", "H"), 3)

    def test_a_sandwich_of_three_costs_no_more_than_that_of_two(self) -> None:
        """Within what one segment more of M at each end would save."""
        for light, middle in product((0.1, 0.25, 0.4, 0.5, 0.7), (0.64, 0.86)):
            costs = {"H": 1.0, "M": middle, "L": 0.28}
            schedule = terraces(light, costs)
            assert schedule == schedule[::-1]
            assert len(schedule) == GRID
            assert [name for name, _ in Schedule.from_segments(schedule).parts] == list("LMHML")
            saved = sum(1 - costs[name] for name in schedule) - light * GRID * (1 - costs["L"])
            assert -1e-9 <= saved < 2 * (1 - costs["M"])

    def test_harms_add_up_in_any_number_of_segments(self) -> None:
        assert resample([1.0, 2.0, 3.0, 4.0], 2) == [3.0, 7.0]
        assert resample([1.0, 2.0], 4) == [0.5, 0.5, 1.0, 1.0]
        with pytest.raises(ValueError, match="cannot"):
            resample([1.0, 2.0], 3)
        known = {"kl": [{"mean": 3.0}, {"mean": 2.0}], "baseline_kl": [{"mean": 1.0}, {"mean": 0.5}]}
        assert harms(known, "kl", 2) == [2.0, 1.5]

    def test_harms_that_add_up_are_found_from_influence(self) -> None:
        """Of every schedule with two of five segments light; light is harmful everywhere, influence is not."""
        harm = [0.3, 0.1, 0.5, 0.7, 0.2]
        found = [
            Found(models, torch.full((2,), 5 + sum(h for h, model in zip(harm, models) if model == "L")))
            for models in all_schedules(5, 2)
        ]
        values = [value.mean for value in influence(found)["L"]]
        mean = sum(float(entry.scores.mean()) for entry in found) / len(found)
        assert min(values) < 0
        assert additive_harm(values, 2, mean - 5) == pytest.approx(harm, abs=1e-6)

    def test_harm_below_zero_gives_no_light_steps_away(self) -> None:
        harm = [-0.3, 0.1, -0.1, -0.2]
        fitted = {share: fit(harm, share, {"H": 1.0, "L": 0.5}) for share in (0.25, 0.5, 0.75)}
        assert fitted == {
            0.25: spread(tuple("LHHH"), 40),
            0.5: spread(tuple("LHHL"), 40),
            0.75: spread(tuple("LHLL"), 40),
        }

    def test_influence_in_halves_gives_the_same_schedule(self) -> None:
        """A quarter of ten segments is two and a half: the half of a segment that is next best."""
        harm = resample([1.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 3.0, 2.0], 20)
        found = best_schedule({"H": [0.0] * 20, "L": harm}, {"H": 1.0, "L": 0.5}, 1 - 0.25 / 2)
        assert segments_of(found, 20) in (tuple("LLHHHHHHHHHHHHHHHLLL"), tuple("LLHHHHHHHHHHHHHHLHLL"))


class TestRouting:
    @pytest.mark.slow
    def test_all_positions_come_one_by_one_in_the_same_uniform_order(self) -> None:
        """Whatever the model; the first of five is each of them equally often."""
        options: dict[str, Any] = {"num_samples": 400, "length": 5, "steps": 5, "batch_size": 400, "seed": 0}
        options |= {"decoder": OneByOne(), "return_history": True, "progress": False}
        first, other = (sample(make_study().models[name], **options).history.step for name in ("1", "3"))
        assert torch.equal(first, other)
        assert torch.equal(first.sort(-1).values, torch.arange(5).expand(400, 5))
        for step in (0, 3):
            counts = (first == step).sum(0).double()
            assert float((counts - 80).square().sum() / 80) < 23.5  # chi-squared of 4 degrees of freedom, 1e-4

    @pytest.mark.slow
    def test_fixed_schedules_cost_what_the_router_does(self, whole: Record) -> None:
        for band in whole.parts["routing"]["found"]["bands"]:
            points = band["points"]
            assert sum(points["router"]["passes"].values()) == TINY.length
            for name in ("sandwich", "light first", "same places"):
                assert abs(points[name]["passes"]["H"] - points["router"]["passes"]["H"]) <= 0.5, name
            assert points["router"]["over"]["router"]["mean"] == 0

    def test_entropies_are_those_of_the_masked_positions(self) -> None:
        model = make_study().models["3"]
        ids = torch.full((2, TINY.length), SHAPE["mask_id"])
        ids[:, :7] = 3
        ids[1, :12] = 4
        log_p = model.logits(model.plain_hidden(ids)).detach().float().log_softmax(-1)
        entropy = torch.special.entr(log_p.exp()).sum(-1)
        wanted = torch.stack([entropy[0, 7:].mean(), entropy[1, 12:].mean()])
        assert torch.allclose(mean_entropy(adapt(model), ids), wanted, atol=1e-5)


class TestShown:
    @pytest.fixture
    def results(self, whole: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        for name in (study_shown.PAIR, study_shown.FAMILY, study_shown.WIKIPEDIA, study_shown.WIDE):
            (tmp_path / f"study-{name}.json").write_text(whole.path.read_text())
        monkeypatch.setattr(study_shown, "RESULTS", tmp_path)
        return tmp_path

    @pytest.mark.slow
    def test_every_part_has_its_table(self, results: Path) -> None:
        for name, table in study_tables.TABLES.items():
            text = table()
            lines = [line for line in text.splitlines() if line.startswith("|")]
            tables = "\n".join(lines).split("| ---")
            assert len(lines) > 2 or name.endswith("-measures"), name
            assert len(tables) > 1 or name.endswith("-measures"), name
            assert study_tables.ABSENT not in text
            assert "nan" not in text, name

    @pytest.mark.slow
    def test_every_figure_is_drawn_and_says_from_what(self, results: Path) -> None:
        drawn = study_figures.draw_all(results)
        names = [path.name for path in drawn]
        assert {"study-hand-made.svg", "study-wikipedia-search.svg"} < set(names)
        assert len(names) == len(set(names)) > len(study_figures.FIGURES)
        for path, (_, _, shown) in zip(drawn, study_figures.present(), strict=True):
            assert study_figures.source_of(shown) in path.read_text()
        linked = {
            target
            for table in study_tables.TABLES.values()
            for target in re.findall(r"\(\.\./benchmarks/results/([\w.-]+)\)", table())
        }
        assert linked == {path.name for path in drawn}

    def test_what_is_not_there_is_said(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(study_shown, "RESULTS", tmp_path)
        assert {table() for table in study_tables.TABLES.values()} == {study_tables.ABSENT}
        assert study_figures.draw_all(tmp_path) == []

    def test_the_figures_are_those_of_the_results(self) -> None:
        """Of the committed ones: `python -m benchmarks.study_figures` draws them again."""
        for name, _, shown in study_figures.present():
            assert study_figures.source_of(shown) in (study_figures.RESULTS / shown.figure).read_text(), name


class TestDocument:
    def test_every_command_is_understood_and_every_part_has_one(self) -> None:
        commands = re.findall(r"^python -m benchmarks\.study (--[^#\n]*)", STUDY.replace("\\\n", ""), re.MULTILINE)
        parsed = [build_parser().parse_args(shlex.split(command)) for command in commands]
        named = [part for arguments in parsed for part in arguments.parts]
        assert set(named) == set(ORDER)
        for arguments in parsed:
            runner.in_order(arguments.parts)
            needs = {other for part in arguments.parts for other in PARTS[part].needs}
            others = set() if arguments.parts_of is None else set(json.loads(arguments.parts_of.read_text())["parts"])
            assert needs <= set(arguments.parts) | others, "the command would not run by itself"
            assert arguments.data or not any(PARTS[part].text for part in arguments.parts)
            assert arguments.models or not any(PARTS[part].between for part in arguments.parts)
