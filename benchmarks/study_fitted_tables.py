"""Tables of docs/study.md about the search, what predicts it, and schedules that are fitted, drawn from
``benchmarks/results/study-*.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.kernel_tables import markdown
from benchmarks.study_shown import (
    FITTED,
    MEASURES,
    PAIR,
    SANDWICH,
    Shown,
    difference,
    listed,
    margin,
    part,
    picture,
    pooled,
    read,
    score,
    sure,
)

CRITICAL = 0.648  # two-sided 5 % of Spearman's rank correlation of ten pairs


def search(shown: Shown) -> str:
    found = shown.found
    influence = found["influence"]["L"]
    rows = [
        [
            "influence, 10⁻³ nats a token",
            *(f"{1e3 * value['mean']:+.1f} ± {1e3 * margin(value):.1f}" for value in influence),
        ],
        ["light in the best tenth, %", *(f"{100 * value:.0f}" for value in found["frequency_best_tenth"])],
        ["light in the worst tenth, %", *(f"{100 * value:.0f}" for value in found["frequency_worst_tenth"])],
    ]
    ranked = found["ranked"]
    caption = (
        f"{shown.caption}; {len(ranked)} schedules, {found['num_samples']:,} samples each, T = {found['steps']}; "
        f"shared beginnings leave {100 * found['share_of_passes']:.0f} % of the passes.\n\n"
    )
    count = len(influence)
    order = sorted(range(count), key=lambda segment: influence[segment]["mean"])
    names = [entry["models"] for entry in ranked]
    light = found["light_segments"]
    sandwich = "L" * (light // 2) + "H" * (count - light) + "L" * (light - light // 2)
    cheap, dear = (listed(sorted(s + 1 for s in few)) for few in (order[: count // 3], order[-(count // 3) :]))
    known = [str(segment + 1) for segment, value in enumerate(influence) if sure(value)]
    verdict = (
        f"\nBest `{names[0]}` ({score(ranked[0]['score'])}), worst `{names[-1]}` ({score(ranked[-1]['score'])}); the "
        f"sandwich `{sandwich}` is number {names.index(sandwich) + 1} of {len(names)}. Light steps cost "
        f"least in segments {cheap}, most in {dear} (the paper: most in the middle). Beyond two standard errors of 0 "
        f"is the influence of {'segments ' + listed(known) if known else 'no segment'}.\n"
    )
    title = "The search's best and worst schedules, how often each segment is light among them, and its influence"
    header = ["segment", *(f"{segment + 1}" for segment in range(count))]
    return picture(shown, title) + caption + markdown(header, rows) + verdict


def measures(shown: Shown) -> str:
    found = shown.found
    peaks = []
    for name, label in (("loss", "the loss difference"), ("kl", "the KL")):
        values = [value["mean"] for value in found[name]]
        top = max(range(len(values)), key=values.__getitem__)
        peaks.append(f"{label} at t = {found['times'][top]:.2f} ({values[top]:.3f} nats a masked token)")
    path = [value["mean"] for value in found["path_kl"]]
    third = len(path) // 3
    shared = [sum(values) / sum(path) for values in (path[:third], path[third:-third], path[-third:])]
    caption = (
        f"{shown.caption}; {found['windows']} windows of held-out text "
        f"(`{shown.content['setting']['text']['source']}`), {found['path_samples']} samples.\n\n"
    )
    verdict = (
        f"Largest are {listed(peaks)}; in the paper both peak at t of 0.4 to 0.6. Of the path KL, "
        f"{sum(path):.1f} nats a text, {shared[0]:.0%} fall to the first third of the steps, {shared[1]:.0%} to the "
        f"middle, {shared[2]:.0%} to the last.\n"
    )
    title = "Loss difference, KL and path KL over the diffusion time"
    return picture(shown, title) + caption + verdict + less_baseline(found)


def less_baseline(found: Mapping[str, Any]) -> str:
    """Where the KL is largest once what two equally deep models differ by is taken off (eq. 7), if that is known."""
    if not found["baseline_kl"]:
        return ""
    kl, base = ([value["mean"] for value in found[name]] for name in ("kl", "baseline_kl"))
    left = [value - other for value, other in zip(kl, base)]
    top = max(range(len(left)), key=left.__getitem__)
    shares = [other / value for value, other in zip(kl, base)]
    return (
        f"\nThe KL of two equally deep models (the second is {found['baseline']}) is {min(shares):.0%} to "
        f"{max(shares):.0%} of that. What is left when it is taken off (eq. 7) is largest at t = "
        f"{found['times'][top]:.2f} ({left[top]:.3f} nats a masked token).\n"
    )


def prediction(shown: Shown) -> str:
    found = {MEASURES[name]: value for name, value in shown.found["measures"].items()}
    parts = shown.content["parts"]
    if parts.get("measures", {}).get("found", {}).get("baseline"):
        found = {f"{name}, less its baseline" if name == MEASURES["kl"] else name: found[name] for name in found}
        found = kl_as_it_is() | found
    rows = [[name, f"{value['segments']:+.2f}", f"{value['schedules']:+.2f}"] for name, value in found.items()]
    rows.append(["influence itself", "1", f"{shown.found['influence_schedules']:+.2f}"])
    beyond = [name for name, value in found.items() if value["segments"] > CRITICAL]
    verdict = (
        f"\nOf ten segments, a rank correlation above {CRITICAL} is beyond chance at 5 %: "
        f"{listed(beyond) if beyond else 'no measure reaches it'}.\n"
        if shown.found["count"] == 10
        else ""
    )
    header = ["measure", "rank correlation with influence, segments", "with the judge's score, schedules"]
    return f"{shown.caption}.\n\n" + markdown(header, rows) + verdict


def kl_as_it_is() -> dict[str, Any]:
    """What the KL of the pair predicts, from which no second heavy model's is taken off."""
    parts = (read(PAIR) or {"parts": {}})["parts"]
    if "prediction" not in parts or parts.get("measures", {}).get("found", {}).get("baseline"):
        return {}
    return {MEASURES["kl"]: parts["prediction"]["found"]["measures"]["kl"]}


def fitted(shown: Shown) -> str:
    rows = shown.found["rows"]
    body = []
    names = [name for name in FITTED if name != "sandwich" and any(name in row["points"] for row in rows)]
    for row in rows:
        line = [f"{100 * row['light']:.0f} %", score(row["points"]["sandwich"]["score"])]
        for name in names:
            point = row["points"].get(name)
            line.append("–" if point is None else difference(point["over"]["sandwich"]))
        body.append(line)
    caption = (
        f"{shown.caption}; {shown.found['num_samples']:,} samples a point, T = {shown.found['steps']}, seed "
        f"{shown.found['seed']}. Judge, nats a token, less the sandwich's on the same seeds, with 95 % intervals; "
        "below 0 is better, bold is beyond two standard errors.\n\n"
    )
    title = "Fitted schedules' judge scores less the sandwich's at equal FLOPs"
    always = [name for name in names if all(name in row["points"] for row in rows)]
    chosen = markdown(
        ["light", *(FITTED[name] for name in always)],
        ([f"{100 * row['light']:.0f} %", *(f"`{row['points'][name]['schedule']}`" for name in always)] for row in rows),
    )
    header = ["light", "sandwich", *(FITTED[name] for name in names)]
    table = markdown(header, body)
    return (
        picture(shown, title)
        + caption
        + table
        + "\n"
        + fitted_verdict(rows, on_other_seeds(shown))
        + "\nWhat was fitted:\n\n"
        + chosen
    )


def on_other_seeds(shown: Shown) -> dict[str, Any]:
    """By schedule, what the paper's schedules, on their own seed, differ by from the sandwich in as many steps."""
    paper = part("hand_made", shown.text)
    if paper is None or paper.content["setting"]["seed"] == shown.found["seed"]:
        return {}
    rows = [row["points"] for row in paper.found["rows"] if row["steps"] == shown.found["steps"]]
    return {point["schedule"]: point["over"][SANDWICH] for points in rows for point in points.values()}


def fitted_verdict(rows: list[dict[str, Any]], again: Mapping[str, Any]) -> str:
    """Where fitted schedules are surely better or worse than the sandwich, and what they gain at most.

    Args:
        again: differences from the sandwich on other seeds, by schedule.
    """
    tried = {  # those that several measures give are one
        (row["light"], point["schedule"]): point["over"]["sandwich"]
        for row in rows
        for name, point in row["points"].items()
        if name in FITTED and name != "sandwich"
    }
    known = {key: pooled(over, again[key[1]]) if key[1] in again else over for key, over in tried.items()}
    gain = max(0.0, -min(value["interval_95"][0] for value in known.values()))
    worse = sum(sure(over) and over["mean"] > 0 for over in tried.values())
    better = {key: over for key, over in tried.items() if sure(over) and over["mean"] < 0}
    rest = (
        f"Of {len(tried)} different fitted schedules {worse} are worse beyond two standard errors, and by the ends of "
        f"the 95 % intervals on all seeds none is better by more than {gain:.3f} nats a token.\n"
    )
    if not better:
        return f"**No fitted schedule is better than the sandwich beyond two standard errors.** {rest}"
    said, confirmed = [], False
    for (light, schedule), over in better.items():
        text = f"`{schedule}` at {100 * light:.0f} % light ({difference(over)})"
        if schedule in again:
            both = known[light, schedule]
            text += f"; on other seeds, those of the paper's schedules above, {difference(again[schedule])}"
            text += f", on both together {difference(both)}"
            confirmed |= sure(both) and both["mean"] < 0
        else:
            confirmed = True
        said.append(text)
    doubt = "" if confirmed else ", but not on all seeds together"
    return f"**Better than the sandwich at equal FLOPs, on held-out seeds{doubt}:** {'. '.join(said)}. {rest}"


def three_models(shown: Shown) -> str:
    letters: dict[str, str] = shown.found["letters"]
    names = {"two models": "two models, path KL"}
    for model in letters.values():
        names |= {f"{model}, {how}": f"third of {model} blocks, {how}" for how in ("fitted", "by hand")}
    rows, chosen, dearer = [], [], list[str]()
    for row in shown.found["rows"]:
        points, light = row["points"], f"{100 * row['light']:.0f} %"
        base = points["sandwich"]
        cells = []
        for name, label in names.items():
            point = points[name]
            cells.append(difference(point["over"]["sandwich"]) + ("" if as_cheap(point, base) else " †"))
            if not as_cheap(point, base):
                saved = (
                    f"{100 * point['flops_saved']:.0f} % of the FLOPs, the sandwich {100 * base['flops_saved']:.0f} %"
                )
                dearer.append(f"† {label} at {light} saves {saved}: not counted below.\n")
        rows.append([light, score(base["score"]), *cells])
        chosen.append([light, *(f"`{points[name]['schedule']}`" for name in names if name != "two models")])
    known = ", ".join(f"{letter} of {model} blocks" for letter, model in letters.items())
    caption = (
        f"{shown.caption}; {shown.found['num_samples']:,} samples a point, {known}, T = {shown.found['steps']}, seed "
        f"{shown.found['seed']}. Judge, nats a token, and over the sandwich's.\n\n"
    )
    verdict = "".join(f"- {label}: {against_sandwich(shown.found['rows'], name)}\n" for name, label in names.items())
    return (
        caption
        + markdown(["FLOPs of a sandwich with", "sandwich", *names.values()], rows)
        + "".join(f"\n{line}" for line in dearer)
        + f"\n{taken_by_the_fit(shown.found['rows'], letters)} Against the sandwich of two, beyond two standard "
        + f"errors:\n\n{verdict}"
        + price_of_depth()
        + "\nThe schedules:\n\n"
        + markdown(["light", *(label for name, label in names.items() if name != "two models")], chosen)
    )


def taken_by_the_fit(rows: list[dict[str, Any]], letters: Mapping[str, str]) -> str:
    """At how many budgets a fit uses the third model that it may use."""
    counts = (
        f"that of {model} blocks at {sum(letter in row['points'][f'{model}, fitted']['schedule'] for row in rows)}"
        for letter, model in letters.items()
    )
    return f"Of {len(rows)} budgets the fit takes the third model: {listed(counts)}."


def price_of_depth() -> str:
    """What light models lose on held-out text for the FLOPs that they save, beside what the lightest loses."""
    losses, sizes = part("bounds"), part("light_size")
    if losses is None or sizes is None:
        return ""
    heavy = losses.found["heavy"]
    price = {
        sizes.found["blocks"][name]: losses.found["points"][name]["over"][heavy]["mean"] / point["flops_saved"]
        for name, point in sizes.found["points"].items()
        if name in sizes.found["blocks"]
    }
    lightest = min(price)
    said = [f"{price[blocks] / price[lightest]:.2f} with {blocks} blocks" for blocks in sorted(price)[1:]]
    return (
        "\nNats lost on held-out text for each FLOP saved, over those lost with a model of "
        f"{lightest} blocks: {listed(said)}.\n"
    )


def as_cheap(point: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    return bool(point["flops_saved"] > base["flops_saved"] - 1e-6)


def against_sandwich(rows: list[dict[str, Any]], name: str) -> str:
    """At which budgets a kind of schedule that costs no more than the sandwich is better and worse than it."""
    over = {
        row["light"]: row["points"][name]["over"]["sandwich"]
        for row in rows
        if as_cheap(row["points"][name], row["points"]["sandwich"])
    }
    said = []
    for word, sign in (("better", -1), ("worse", 1)):
        at = [f"{100 * light:.0f} %" for light, gap in over.items() if sure(gap) and sign * gap["mean"] > 0]
        said.append(f"{word} at {listed(at) if at else 'no budget'}")
    return ", ".join(said) + "."
