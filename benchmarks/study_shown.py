"""What the tables and figures of docs/study.md have in common: where results are read, and how numbers are written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import RESULTS
from mdkern.evaluation.intervals import NORMAL_95

# Of the files study-….json: two models, six, two on another text, two that are wider; the shipped pair's routing, which
# has fewer samples a point.
PAIR, FAMILY, WIKIPEDIA, WIDE, ROUTING = "shipped", "family", "wikipedia", "wide", "routing"
OF_FAMILY = "light_size", "bounds"  # parts that are about all models of a study
REFERENCE, SANDWICH = "H1000", "L125 H750 L125"
MIDDLE = "H250 L250 H500", "H500 L250 H250"  # light in the second and in the third quarter
EDGES = "L250 H750", "H750 L250"
MEASURES = {
    "loss": "loss difference",
    "kl": "KL on held-out text",
    "path_kl": "path KL, what is revealed",
    "masked_kl": "path KL, all that is masked",
}
FITTED = {"sandwich": "sandwich", **MEASURES, "influence": "influence", "best of the search": "best of the search"}
SURE = 2.0  # standard errors at which a difference counts


class Shown(NamedTuple):
    """A part of the study, and what it was measured on."""

    found: dict[str, Any]
    content: dict[str, Any]
    environment: dict[str, Any]
    name: str = ""  # of the part
    text: str = ""  # the text it is about, if not the shipped models'

    @property
    def caption(self) -> str:
        known = self.content["setting"]["blocks"]
        blocks = sorted(set(known.values()))
        middle = {known[name] for name in self.found.get("letters", {}).values()}
        chosen = blocks if self.name in OF_FAMILY else sorted({blocks[0], blocks[-1]} | middle)
        return f"{self.environment['device']}, torch {self.environment['torch']}; models of {listed(chosen)} blocks"

    @property
    def figure(self) -> str:
        """The file name of its figure."""
        return "-".join(("study", *filter(None, [self.text]), self.name.replace("_", "-"))) + ".svg"


def listed(values: Any) -> str:
    *most, last = map(str, values)
    return f"{', '.join(most)} and {last}" if most else last


def read(name: str, folder: Path | None = None) -> dict[str, Any] | None:
    path = (RESULTS if folder is None else folder) / f"study-{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def part(name: str, text: str = "") -> Shown | None:
    """What is shown under a name, if it has been measured: a part's results, or those of two together.

    Args:
        text: `WIKIPEDIA`, `WIDE`, or nothing: then of the family, which has the shipped pair in it, else of the pair.
    """
    files = [content for content in map(read, (text,) if text else (FAMILY, PAIR, ROUTING)) if content is not None]
    shown = []
    for key in ("path", "measures") if name == "measures" else (name,):
        content = next((content for content in files if key in content["parts"]), None)
        if content is None:
            return None
        shown.append((content, content["parts"][key]))
    found = {key: value for _, entry in shown for key, value in entry["found"].items()}
    content, entry = shown[-1]
    return Shown(found, content, entry["environment"], name, text)


def sure(value: Mapping[str, Any]) -> bool:
    """Whether a difference is beyond two standard errors."""
    return abs(value["mean"]) > SURE * value["standard_error"]


def margin(value: Mapping[str, Any]) -> float:
    return (value["interval_95"][1] - value["interval_95"][0]) / 2


def score(value: Mapping[str, Any]) -> str:
    return f"{value['mean']:.3f} ± {margin(value):.3f}"


def difference(value: Mapping[str, Any]) -> str:
    """With its 95 % interval; in bold beyond two standard errors."""
    text = f"{value['mean']:+.4f} ± {margin(value):.4f}"
    return f"**{text}**" if sure(value) else text


def rise(value: Mapping[str, Any]) -> str:
    """A difference in nats a token as per cent of perplexity."""
    return f"{100 * math.expm1(value['mean']):+.1f}"


def estimate_of(mean: float, error: float) -> dict[str, Any]:
    half = NORMAL_95 * error
    return {"mean": mean, "standard_error": error, "interval_95": [mean - half, mean + half]}


def unpaired(value: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """The difference of two estimates, as if they were independent."""
    return estimate_of(value["mean"] - base["mean"], math.hypot(value["standard_error"], base["standard_error"]))


def pooled(*values: Mapping[str, Any]) -> dict[str, Any]:
    """The mean of independent estimates of one thing, weighted by their inverse variances; or an exact one."""
    for value in values:
        if value["standard_error"] == 0.0:  # a schedule beside itself
            return dict(value)
    weights = [value["standard_error"] ** -2 for value in values]
    mean = sum(weight * value["mean"] for weight, value in zip(weights, values)) / sum(weights)
    return estimate_of(mean, sum(weights) ** -0.5)


def picture(shown: Shown, title: str) -> str:
    return f"![{title}](../benchmarks/results/{shown.figure})\n\n"
