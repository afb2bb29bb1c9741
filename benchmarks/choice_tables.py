"""Tables and verdicts on learned choices of positions, drawn from ``benchmarks/results/learning-choice.json``; for the
word problems from ``learning-choice-problems.json``, whose base model is another than those of
``learning-problems.json``; for the exponents of GenMD4 from ``learning-exponents.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.harness import RESULTS
from benchmarks.kernel_tables import markdown
from benchmarks.learning_equal import Mean, mean_of, speed, target
from benchmarks.learning_tables import ABSENT, caption, seeds_named, seeds_with, spread

FILE, PROBLEMS_FILE, EXPONENTS_FILE = (f"learning-{name}.json" for name in ("choice", "choice-problems", "exponents"))
PLAIN = "threshold"
LEARNED = {"linear": "linear score", "mlp": "network", "closed loop": "linear score, improved in use"}
TASKS = {"infill": "infilling, temperature 0", "continue": "continuation, temperature 0.7"}
CURVES = {"threshold": "threshold", "run": "leftmost run", "linear": LEARNED["linear"], "mlp": LEARNED["mlp"]}
MARGINS = 0.01, 0.05, 0.1, 0.2  # below the base model's strict accuracy


def content(name: str = FILE) -> dict[str, Any] | None:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def tasks_of(shown: Mapping[str, Any], task: str) -> list[dict[str, Any]]:
    """What each seed has found for a task."""
    return [seed[task] for seed in shown["seeds"].values() if task in seed]


def number(row: Mapping[str, Any], sign: str = "") -> str:
    return f"{row['mean']:{sign}z.3f} ± {row['standard_error']:.3f}"


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
            *(number(row[name], "+") if name in row else "–" for name in ("nats_over_plain", "entropy_over_plain")),
        ]
        for task in TASKS
        if task in found
        for row in found[task]["rows"]
    ]
    header = ["task", "rule", "bound", "passes", "judge, nats", "token entropy", "agreement", "exact nats"]
    header += ["judge, over threshold at as many passes", "entropy, over it"]
    return markdown(header, body) + (
        f"\nSeed {seed}. The bound of top probability and margin is the number of steps of a block of "
        f"{shown['setting']['block_length']}.\n"
    )


def setting_of(shown: Mapping[str, Any]) -> str:
    known = next(part["environment"] for seed in shown["seeds"].values() for part in seed.values())
    size = shown["setting"]
    return (
        f"{known['device']}, torch {known['torch']}; {seeds_named(len(shown['seeds']))}. {size['testing']} texts of "
        f"{size['length']} tokens, {size['written']} of them written; scores are fitted to runs on "
        f"{size['fitting']:,} others; exact nats of {size['likelihood']} texts."
    )


def verdict(shown: Mapping[str, Any]) -> str:
    """Where rules are better and worse than the threshold at as many passes, over all bounds and seeds."""
    body = []
    for task, title in TASKS.items():
        compared = [row for part in tasks_of(shown, task) for row in part["rows"] if "nats_over_plain" in row]
        for name in dict.fromkeys(row["rule"] for row in compared):
            ours = [row for row in compared if row["rule"] == name]
            better = [row for row in ours if beyond(row["nats_over_plain"], -1)]
            worse = [row for row in ours if beyond(row["nats_over_plain"], 1)]
            cells = ([row for row in better if row["gains"] == gains] for gains in (True, False))
            body.append([title, LEARNED.get(name, name), f"{len(ours)}", *map(at_which, (*cells, worse))])
    if not body:
        return ABSENT
    header = ["task", "rule", "settings", "better", "better by the judge, with less entropy", "worse by the judge"]
    return (
        "![Four measures of each rule over its passes](../benchmarks/results/learning-choice.svg)\n\n"
        f"{setting_of(shown)} Settings that are better or worse than the threshold at as many passes, beyond two "
        "standard errors, with their passes in brackets:\n\n"
    ) + markdown(header, body)


def beyond(difference: Mapping[str, float], direction: int) -> bool:
    """Whether a difference is more than two standard errors in a direction."""
    return direction * difference["mean"] > 2 * difference["standard_error"]


def at_which(rows: Sequence[Mapping[str, Any]]) -> str:
    passes = ", ".join(f"{row['passes']['mean']:.0f}" for row in rows)
    return f"{len(rows)} ({passes})" if rows else "0"


def problems() -> str:
    """Word problems: tokens a pass at several accuracies, all of one base model, and the scores on single states."""
    shown = content(PROBLEMS_FILE)
    seeds = [] if shown is None else seeds_with(shown, "learned", "eval_base")
    if shown is None or not seeds:
        return ABSENT
    body, compared = [], [with_learned(seed) for seed in seeds]
    for name, label in CURVES.items():
        found = [speed(compared, ("learned", (name,)), "tokens_per_pass", margin) for margin in MARGINS]
        scored = [seed["learned"]["offline"].get("p" if name == PLAIN else name, {}).get("bce") for seed in seeds]
        nats = "–" if None in scored else rows_mean(scored)
        body.append([label, *(str(mean) if mean.seeds else "not reached" for mean in found), nats])
    header = ["rule", *(f"{100 * margin:g} below" for margin in MARGINS), "cross-entropy of the score, nats"]
    size, careful = shown["setting"]["size"], 100 * mean_of([target(seed, 0.0) for seed in seeds]).mean
    setting = (
        f"a model of {size['blocks']} blocks of width {size['width']}; {size['problems']:,} problems. Tokens a pass at "
        f"a strict accuracy so many points below {careful:.1f} %, the model's own at threshold 0.95. {spread(seeds)}"
    )
    return f"{caption(shown, 'learned')}; {setting}\n\n" + markdown(header, body)


def with_learned(seed: Mapping[str, Any]) -> dict[str, Any]:
    """A seed with the curves of learned choices beside the leftmost run of the same model, as `speed` reads them."""
    curves = {
        name: [point | {"threshold": point["bound"]} for point in curve]
        for name, curve in seed["learned"]["curves"].items()
    }
    return {**seed, "eval_learned": {"curves": curves | {"run": seed["eval_base"]["curves"]["run"]}}}


def exponents() -> str:
    """What learned exponents change in the bound, where they were fitted and on held-out text."""
    shown = content(EXPONENTS_FILE)
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
