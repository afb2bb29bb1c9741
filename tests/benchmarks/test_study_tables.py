"""The sentences under the study's tables say what the numbers say, whichever way they fall."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import study_fitted_tables, study_likelihood_tables, study_shown, study_tables


def estimate(mean: float, error: float = 0.001) -> dict[str, Any]:
    return {"mean": mean, "standard_error": error, "interval_95": [mean - 2 * error, mean + 2 * error], "count": 9}


def quarters(**means: float) -> dict[str, Any]:
    names = dict(zip(("sandwich", "early", "late", "second", "third"), study_tables.quarters_in_order()))
    score = {names[key]: value for key, value in means.items()}
    bases = {study_shown.SANDWICH: score[study_shown.SANDWICH], study_shown.REFERENCE: 0.8}
    return {
        label: {"score": estimate(value), "over": {name: estimate(value - base) for name, base in bases.items()}}
        for label, value in score.items()
    }


class TestVerdicts:
    def test_the_order_of_the_papers_schedules(self) -> None:
        verdict = study_tables.order_verdict
        paper = verdict(quarters(sandwich=1.0, early=1.1, late=1.2, second=1.3, third=1.4))
        assert "same as the paper, the sandwich is best, `L250 H750` next (**+0.1000" in paper
        assert paper.endswith("same as the paper, the middle quarters are worst.")
        other = verdict(quarters(sandwich=1.0, early=0.9, late=1.5, second=1.3, third=1.4))
        assert "different from the paper, `L250 H750` is better than the sandwich (**-0.1000" in other
        assert other.endswith("the worst two are `H500 L250 H250` and `H750 L250`.")
        near = verdict(quarters(sandwich=1.0, early=0.999, late=1.5, second=1.3, third=1.4))
        assert "cannot be told apart (-0.0010" in near
        worst = verdict(quarters(sandwich=1.0, early=1.1, late=1.3025, second=1.3, third=1.4))
        assert "`H250 L250 H500` cannot be told from `H750 L250` (-0.0025 ± 0.0028)" in worst  # 1.96 sqrt(2) errors

    def test_a_fitted_schedule_wins_only_beyond_two_standard_errors(self) -> None:
        def verdict(again: float | None = None, **over: float) -> str:
            points = {
                name: {"schedule": f"L {value}", "over": {"sandwich": estimate(value)}} for name, value in over.items()
            }
            rows = [{"light": 0.25, "points": {"sandwich": {}} | points}]
            return study_fitted_tables.fitted_verdict(rows, {} if again is None else {"L -0.0021": estimate(again)})

        none = verdict(loss=-0.0019, kl=0.1, path_kl=0.1, influence=0.0)
        assert none.startswith("**No fitted schedule is better")
        assert "Of 3 different fitted schedules 1 are worse" in none
        assert "better by more than 0.004 nats" in none  # two errors beyond -0.0019
        assert "better by more than 0.000 nats" in verdict(loss=0.1)
        some = verdict(loss=-0.0021, kl=0.1)
        assert "held-out seeds:** `L -0.0021` at 25 % light (**-0.0021" in some
        doubtful = verdict(0.0003, loss=-0.0021)  # together -0.0009, and 1 / sqrt(2) of the error
        assert "but not on all seeds together:**" in doubtful
        assert "on both together -0.0009 ± 0.0014." in doubtful
        assert "better by more than 0.002 nats" in doubtful
        assert "seeds:** `L -0.0021`" in verdict(-0.0009, loss=-0.0021)

    def test_what_is_sure_counts_for_more_in_a_pooled_estimate(self) -> None:
        found = study_shown.pooled(estimate(1.0, 0.3), estimate(2.0, 0.1))
        assert found["mean"] == pytest.approx(1.9)  # weights of 1 and 9
        assert found["standard_error"] == pytest.approx(0.3 / 10**0.5)
        assert study_shown.pooled(estimate(0.1), estimate(0.0, 0.0))["mean"] == 0.0

    def test_the_papers_schedules_tell_of_other_seeds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        points = {"L250 H750": {"schedule": "L:25% H:75%", "over": {study_shown.SANDWICH: estimate(0.01)}}}
        rows = [{"steps": 64, "points": {}}, {"steps": 256, "points": points}]
        paper = study_shown.Shown({"rows": rows}, {"setting": {"seed": 0}}, {})
        monkeypatch.setattr(study_fitted_tables, "part", lambda *_: paper)

        def found(seed: int, steps: int) -> dict[str, Any]:
            return study_fitted_tables.on_other_seeds(study_shown.Shown({"seed": seed, "steps": steps}, {}, {}))

        assert found(1, 256) == {"L:25% H:75%": estimate(0.01)}
        assert found(0, 256) == found(1, 64) == {}

    def test_a_model_as_deep_stands_beside_the_depth_that_is_as_good(self) -> None:
        points = {
            name: {"blocks": blocks, "over": {"12": estimate(over)}}
            for name, blocks, over in (("4", 4, 0.18), ("10", 10, 0.058), ("12", 12, 0.0), ("12b", 12, 0.062))
        }
        text = study_likelihood_tables.twice_trained({"heavy": "12", "points": points})
        assert text.startswith("\n12b, as deep as 12")
        assert "**+0.0620 ± 0.0020** above it. Nearest to that is the model of 10 blocks." in text
        del points["12b"]
        assert study_likelihood_tables.twice_trained({"heavy": "12", "points": points}) == ""

    def test_depths_are_priced_by_what_they_lose_for_the_flops_they_save(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """4 blocks lose 0.2 and save twice what 8 do, which lose 0.15: half as much again."""
        losses = {name: {"over": {"12": estimate(value)}} for name, value in (("4", 0.2), ("8", 0.15))}
        sizes = {"4": {"flops_saved": 0.2}, "8": {"flops_saved": 0.1}}
        found = {
            "bounds": study_shown.Shown({"heavy": "12", "points": losses}, {}, {}),
            "light_size": study_shown.Shown({"blocks": {"4": 4, "8": 8}, "points": sizes | {"all heavy": {}}}, {}, {}),
        }
        monkeypatch.setattr(study_fitted_tables, "part", found.get)
        assert "a model of 4 blocks: 1.50 with 8 blocks." in study_fitted_tables.price_of_depth()

    def test_a_kl_less_its_baseline_stands_beside_the_kl(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def content(baseline: str | None, value: float) -> dict[str, Any]:
            found = {"measures": {"kl": {"segments": value, "schedules": value}}, "influence_schedules": 1, "count": 10}
            parts = {"measures": {"found": {"baseline": baseline}}, "prediction": {"found": found}}
            return {"parts": parts, "setting": {"blocks": {"4": 4, "12": 12}}}

        monkeypatch.setattr(study_fitted_tables, "read", lambda _: content(None, 0.7))
        family = content("12b", 0.2)
        machine = {"device": "a card", "torch": "2"}
        text = study_fitted_tables.prediction(
            study_shown.Shown(family["parts"]["prediction"]["found"], family, machine, "prediction")
        )
        assert "| KL on held-out text | +0.70 | +0.70 |" in text
        assert "| KL on held-out text, less its baseline | +0.20 | +0.20 |" in text
        assert text.endswith("beyond chance at 5 %: KL on held-out text.\n")

    def test_light_models_are_ordered_only_as_far_as_they_can_be_told_apart(self) -> None:
        def verdict(*losses: float) -> str:
            points = {str(n): {"over": {"all heavy": estimate(loss)}} for n, loss in enumerate(losses)}
            return study_tables.size_verdict({"blocks": {str(n): n for n in range(len(losses))}, "points": points})

        assert verdict(0.03, 0.02, 0.01).startswith("Same as the paper")
        assert verdict(0.03, 0.031, 0.01).startswith("As in the paper the deepest")
        assert "from 0 to 1 blocks +0.0010 ± 0.0028" in verdict(0.03, 0.031, 0.01)  # 1.96 sqrt(2) errors
        assert verdict(0.03, 0.04, 0.01).startswith("Different from the paper")
        assert verdict(0.03, 0.031, 0.0295).startswith("The light models cannot be told apart")

    def test_a_pattern_grows_or_fades_beyond_its_standard_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def shown(third: float, text: str) -> study_shown.Shown:
            points = {
                label: {"over": {"H1000": estimate(0.02), "L125 H750 L125": estimate(third)}}
                for label in study_tables.quarters_in_order()
            }
            points["L1000"] = {"over": {"H1000": estimate(0.08)}}
            return study_shown.Shown({"rows": [{"ratio": 1.0, "points": points}]}, {}, {}, "hand_made", text)

        monkeypatch.setattr(study_tables, "part", lambda _: shown(0.03, ""))
        for third, words in ((0.04, "pattern grows"), (0.02, "pattern fades"), (0.031, "cannot be told")):
            text = study_tables.beside_narrow(shown(third, study_shown.WIDE))
            assert words in text
            assert "| `L250 H750` | 25% | 25% |" in text
        assert study_tables.beside_narrow(shown(0.04, "")) == ""

    def test_what_two_equal_models_differ_by_is_taken_off(self) -> None:
        kl, base = [0.5, 0.4, 0.1], [0.3, 0.1, 0.02]
        found = {
            "kl": [{"mean": value} for value in kl],
            "baseline_kl": [{"mean": value} for value in base],
            "times": [0.75, 0.5, 0.25],
            "baseline": "12b",
        }
        text = study_fitted_tables.less_baseline(found)
        assert "is 20% to 60% of that" in text
        assert "largest at t = 0.50 (0.300 nats" in text
        assert study_fitted_tables.less_baseline(found | {"baseline_kl": []}) == ""

    def test_what_costs_more_than_the_sandwich_wins_nothing(self) -> None:
        def row(light: float, saved: float) -> dict[str, Any]:
            other = {"flops_saved": saved, "over": {"sandwich": estimate(-0.01)}}
            return {"light": light, "points": {"sandwich": {"flops_saved": 0.5}, "three": other}}

        found = study_fitted_tables.against_sandwich([row(0.5, 0.5), row(0.7, 0.42)], "three")
        assert found == "better at 50 %, worse at no budget."

    def test_the_ends_of_training_are_those_of_the_text(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def read(name: str) -> dict[str, Any]:
            models = {"wikipedia-training": {"4": 4.2}, "family-training": {"6": 3.9}}[name]
            held_out = {model: {"nelbo_nats_per_token": end, "standard_error": 0.02} for model, end in models.items()}
            return {"held_out": held_out | {"judge": {"nats_per_token": 3.6}}}

        monkeypatch.setattr(study_likelihood_tables, "read", read)
        assert study_likelihood_tables.ends_of_training("wikipedia") == {"4": "4.200 ± 0.020"}
        family = study_likelihood_tables.ends_of_training("")
        assert family["6"] == "3.900 ± 0.020"
        assert set(family) == {"4", "6", "12"}  # the shipped ones by the model card
