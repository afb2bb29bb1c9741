"""Tables and verdicts on learned choices of positions, drawn from ``benchmarks/results/learning-choice.json``; for the
word problems from ``learning-problems.json``, for the exponents of GenMD4 from ``learning-exponents.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.harness import RESULTS
from benchmarks.kernel_tables import markdown
from benchmarks.learning_equal import Mean, mean_of, speed, target
from benchmarks.learning_tables import ABSENT, caption, seeds_with, spread
from benchmarks.learning_tables import content as problems_content

FILES = "learning-choice.json", "learning-choice-cpu.json"  # the second at small size, shown without the first
EXPONENTS_FILES = ("learning-exponents.json",)
PLAIN = "threshold"
LEARNED = {"linear": "linear score", "mlp": "network", "closed loop": "linear score, improved in use"}
TASKS = {"infill": "infilling, temperature 0", "continue": "continuation, temperature 0.7"}
CURVES = {"threshold": "threshold", "linear": LEARNED["linear"], "mlp": LEARNED["mlp"]}


def content(files: Sequence[str] = FILES) -> dict[str, Any] | None:
    paths = [path for path in (RESULTS / name for name in files) if path.exists()]
    return json.loads(paths[0].read_text()) if paths else None


def tasks_of(shown: Mapping[str, Any], task: str) -> list[dict[str, Any]]:
    """What each seed has found for a task."""
    return [seed[task] for seed in shown["seeds"].values() if task in seed]


def number(row: Mapping[str, Any], digits: int = 3) -> str:
    return f"{row['mean']:.{digits}f} ± {row['standard_error']:.{digits}f}"


def offline(shown: Mapping[str, Any]) -> str:
    """How good the scores are on states of texts that they were not fitted to."""
    body = []
    for task, title in TASKS.items():
        found = [part["offline"] for part in tasks_of(shown, task)]
        for name, label in {"p": "probability itself", **LEARNED}.items():
            rows = [seed[name] for seed in found if name in seed]
            if not rows:
                continue
            cells = [rows_mean([row["bce"] for row in rows])]
            cells += [rows_mean([row["precision"][level] for row in rows]) for level in ("0.1", "0.3")]
            cells += [rows_mean([row["recall"][bound] for row in rows]) for bound in ("0.9", "0.8")]
            body.append([title, label, *cells])
    header = ["task", "score", "cross-entropy, nats", "precision at recall 10 %", "at 30 %", "recall at precision 0.9"]
    return markdown([*header, "at 0.8"], body)


def rows_mean(values: Sequence[float]) -> str:
    return f"{mean_of(values).mean:.3f}"


def rules(shown: Mapping[str, Any]) -> str:
    """All that was compared, of the first seed."""
    seed, found = next(iter(shown["seeds"].items()))
    body = [
        [
            task,
            LEARNED.get(row["rule"], row["rule"]),
            f"{row['bound']:g}",
            f"{row['passes']['mean']:.1f}",
            number(row["nats"]),
            number(row["entropy"]),
            number(row["agreement"]),
            number(row["exact_nats"]),
            number(row["nats_over_plain"]) if "nats_over_plain" in row else "–",
        ]
        for task in TASKS
        if task in found
        for row in found[task]["rows"]
    ]
    known = next(iter(found.values()))["environment"]
    header = ["task", "rule", "bound", "passes", "judge, nats a token", "token entropy", "agreement"]
    header += ["exact nats of true text", "judge, over threshold at as many passes"]
    size = shown["setting"]
    return (
        f"{known['device']}, torch {known['torch']}; seed {seed}. {size['testing']} texts of {size['length']} tokens, "
        f"{size['written']} of them written; scores are fitted to runs on {size['fitting']} others; exact nats of "
        f"{size['likelihood']} texts.\n\n"
    ) + markdown(header, body)


def verdict(shown: Mapping[str, Any]) -> str:
    """Where learned rules gain on the threshold, counted over all bounds, tasks and seeds."""
    lines = []
    for task, title in TASKS.items():
        rows = [row for part in tasks_of(shown, task) for row in part["rows"] if "nats_over_plain" in row]
        for name, label in LEARNED.items():
            ours = [row for row in rows if row["rule"] == name]
            if not ours:
                continue
            better = sum(row["gains"] for row in ours)
            worse = sum(row["nats_over_plain"]["mean"] > 2 * row["nats_over_plain"]["standard_error"] for row in ours)
            lines.append(
                f"- {title}, {label}: better than the threshold at as many passes, by more than two standard errors "
                f"and without less entropy, at {better} of {len(ours)} settings; worse in the judge's likelihood at "
                f"{worse}."
            )
    return "\n".join(lines) + "\n" if lines else ABSENT


def problems() -> str:
    """Word problems: tokens a pass at the accuracy that is asked for, and what the scores are on single states."""
    shown = problems_content("learned")
    seeds = [] if shown is None else seeds_with(shown, "learned", "eval_base")
    if shown is None or not seeds:
        return ABSENT
    body, compared = [], [with_learned(seed) for seed in seeds]
    for name, label in CURVES.items():
        found = speed(compared, ("learned", (name,)), "tokens_per_pass")
        scored = mean_of([seed["learned"]["offline"]["p" if name == PLAIN else name]["bce"] for seed in seeds])
        body.append([label, str(found) if found.seeds else "never as accurate", f"{scored.mean:.3f}"])
    header = ["rule", "tokens a pass at equal accuracy", "cross-entropy of the score, nats"]
    size, asked = shown["setting"]["size"], 100 * mean_of([target(seed) for seed in seeds]).mean
    setting = (
        f"a model of {size['blocks']} blocks of width {size['width']}; {size['problems']:,} problems; strict accuracy "
        f"of at least {asked:.1f} %. {spread(seeds)}"
    )
    return f"{caption(shown, 'learned')}; {setting}\n\n" + markdown(header, body)


def with_learned(seed: Mapping[str, Any]) -> dict[str, Any]:
    """A seed with the curves of learned choices beside those of the models, as `speed` reads them."""
    curves = {
        name: [point | {"threshold": point["bound"]} for point in curve]
        for name, curve in seed["learned"]["curves"].items()
    }
    return {**seed, "eval_learned": {"curves": curves}}


def exponents() -> str:
    """What learned exponents change in the bound, where they were fitted and on held-out text."""
    shown = content(EXPONENTS_FILES)
    if shown is None or not shown["runs"]:
        return ABSENT
    size, body, verdicts = shown["setting"], [], list[str]()
    for windows in dict.fromkeys(run["windows"] for run in shown["runs"]):
        runs = [run for run in shown["runs"] if run["windows"] == windows]
        tokens = windows * size["length"] or size["tokens"]
        values = [value for run in runs for value in run["exponents"]]
        changes = {name: pooled([run[name] for run in runs]) for name in ("train", "held out")}
        body.append(
            [
                f"{tokens:,}",
                f"{mean_of([run['held out']['plain'] for run in runs]).mean:.3f}",
                *(f"{change.mean:+.4f} ± {change.error:.4f}" for change in changes.values()),
                f"{min(values):.2f}–{max(values):.2f}",
            ]
        )
        known = changes["held out"]
        said = "cannot be told from none" if abs(known.mean) <= 2 * known.error else (
            "better" if known.mean < 0 else "worse"
        )  # fmt: skip
        verdicts.append(f"fitted to {tokens:,} tokens: {said}")
    first = shown["runs"][0]["environment"]
    header = ["tokens fitted to", "held out, w = 1", "change where fitted", "change held out", "exponents"]
    return (
        f"{first['device']}, torch {first['torch']}; {size['seeds']} seeds, {size['steps']:,} steps of "
        f"{size['batch_size']} windows of {size['length']} tokens; bounds of {size['evaluated']:,} windows, nats a "
        "token, ± one standard error over windows.\n\n"
        + markdown(header, body)
        + f"\nOn held-out text, beyond two standard errors: {'; '.join(verdicts)}.\n"
    )


def pooled(found: Sequence[Mapping[str, float]]) -> Mean:
    """The mean of independent differences, with its standard error."""
    count = len(found)
    error = math.sqrt(sum(value["standard_error"] ** 2 for value in found)) / count
    return Mean(sum(value["difference"] for value in found) / count, error, count)


def drawn(table: Callable[[Mapping[str, Any]], str]) -> Callable[[], str]:
    def draw() -> str:
        shown = content()
        return ABSENT if shown is None or not shown["seeds"] else table(shown)

    return draw


TABLES: dict[str, Callable[[], str]] = {
    f"choice-{table.__name__}": drawn(table) for table in (verdict, offline, rules)
} | {"choice-problems": problems, "choice-exponents": exponents}
