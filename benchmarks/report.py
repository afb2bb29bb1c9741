"""Draw the tables of README.md and of the pages of docs/ from results: ``python -m benchmarks.report``.

A table stands between ``<!-- table NAME -->`` and ``<!-- end -->``; everything between is replaced. Sentences with
figures in them are drawn the same way, so that no figure outlives the run that it is from. With ``--check`` nothing is
written and the exit code says whether the documents are up to date.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from pathlib import Path

from benchmarks import (
    bench_diffusion_gemma,
    bench_first_call,
    bench_floors,
    bench_head_precision,
    bench_people,
    bench_precision,
    bench_sizes,
    bench_small_passes,
    choice_tables,
    decoder_tables,
    gpu_tables,
    kernel_tables,
    learning_tables,
    paper_tables,
    study_tables,
)
from benchmarks.bench_head_precision import FLOAT8
from benchmarks.bench_vocab_projection import GEMM, SAMPLED
from benchmarks.decoder_setting import Size
from benchmarks.harness import write_text_whole
from benchmarks.kernel_tables import OURS, load, markdown
from benchmarks.paper_setting import HEAVY
from benchmarks.paper_tables import LABELS, PAPER_CLOCK, PAPER_FLOPS

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("benchmarks", "study", "learning"))]
PLACE = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
NO_TOKEN = "CCE, logsumexp only"  # the one peer whose result no sampler could use


@dataclass(frozen=True)
class Comparison:
    """Two things timed in one run."""

    work: str
    ours: str
    theirs: str
    place: str  # the size, or the case, at which they were timed
    times: float  # how many times as long ours takes

    @property
    def lost(self) -> bool:
        """Whether ours is the slower one, to the two decimals that are shown."""
        return round(self.times, 2) > 1.0


def sampling(device: str) -> str:
    """Seconds and ratios of the whole sampler."""
    content = load(f"sampling-{device}")
    versions = content["versions"]
    peers = [name for name in content["rows"][0]["median"] if name != "mdkern"]
    rows = [
        [
            f"{row['label']} (`{row['schedule']}`)",
            f"{sum(row['nfe_per_sequence'].values()):.0f}",
            f"{row['median']['mdkern']:.3f} s",
            *(f"{row['median'][peer]:.2f} s ({row['ratio'][peer]:.1f} ×)" for peer in peers),
        ]
        for row in content["rows"]
    ]
    caption = (
        f"{content['num_samples']} samples, L = {content['length']}, T = {content['steps']}, {versions['device']}, "
        f"{versions['threads']} threads, torch {versions['torch']}; medians of "
        f"{len(content['rows'][0]['seconds']['mdkern'])} "
        "interleaved rounds. × is the baseline's time over ours.\n\n"
    )
    return caption + markdown(
        [
            "schedule",
            "passes a sequence",
            "mdkern",
            *(f"`{peer}`" if peer.startswith("ddpm") else peer for peer in peers),
        ],
        rows,
    )


def headline() -> str:
    """The result in one sentence."""
    content = load("paper-setting")
    parts, device = content["parts"], content["environment"]["device"]
    ours = parts["ours"][HEAVY]["median"]
    half = next(row for row in parts["savings"]["rows"] if row["share"] == 0.5)
    middle = len(PAPER_FLOPS) // 2
    return (
        f"> One {device} writes 16 texts of 1,024 tokens in 1,000 steps of a 12-block model in {ours:.2f} s, "
        f"{parts['eager'][HEAVY]['run'] / ours:.1f} times as fast as MDLM's code and "
        f"{parts['compiled'][HEAVY]['run'] / ours:.1f} times as fast as the same sampler under torch.compile; with a "
        f"4-block model at half of the steps it saves {100 * half['flops_saved']:.0f} % of the FLOPs and "
        f"{100 * half['clock_saved']:.0f} % of the time (the paper: {PAPER_FLOPS[middle]:.0f} % and "
        f"{PAPER_CLOCK[middle]:.0f} %).\n"
    )


def decoder_range() -> str:
    """How many times as fast as their plain loops the decoders are, in one sentence."""
    parts = load("decoders")["parts"]
    ratios = {part: [row["ratio"] for row in parts[part].values()] for part in ("size", "pair")}
    paper, small = (f"{min(found):.1f} to {max(found):.1f}" for found in (ratios["size"], ratios["pair"]))
    return (
        f"The {len(ratios['size'])} rules run {paper} times as fast as their plain loops at the paper's size, {small} "
        "times on the shipped pair.\n"
    )


def output_layer(columns: int, depth: int) -> str:
    """The output layer at one shape: ours, the product alone, and the fastest other that gives a token."""
    content = load("vocab_projection")
    body = []
    for row in content["table"]:
        if (row["columns"], row["depth"]) != (columns, depth):
            continue
        times = {name: timing["median"] for name, timing in row["ms"].items() if timing}
        peer = min((name for name in times if name not in (*OURS, GEMM, NO_TOKEN)), key=lambda name: times[name])
        shown = (f"{1e3 * times[name]:.1f} ({times[name] / times[GEMM]:.2f} ×)" for name in OURS)
        best = f"{1e3 * times[peer]:.1f} ({times[peer] / times[GEMM]:.2f} ×), {peer}"
        body.append([f"{row['rows']:,}", *shown, f"{1e3 * times[GEMM]:.1f}", best])
    caption = (
        f"{kernel_tables.caption(content)}, bfloat16, V = {columns:,}, D = {depth}; medians in µs inside CUDA graphs, "
        "L2 emptied; × is over the GEMM alone.\n\n"
    )
    return caption + markdown(["rows", *OURS, GEMM, "fastest other that gives a token"], body)


def agreement() -> str:
    """What the baseline's float32 categorical does to its samples, in two sentences."""
    found = load("agreement-cuda")
    single, ours = found["ddpm in float32 and in float64"], found["mdkern and ddpm in float64"]
    return (
        f"At T = {found['steps']} the samples of `ddpm` are more likely to a judge than those of the same code in "
        f"float64, by {single['judge_baseline'] - single['judge_ours']:.3f} nats a token "
        f"({abs(single['judge_distance']):.1f} standard errors, {found['num_samples']} samples each, "
        f"{found['versions']['device']}). mdkern's were {abs(ours['judge_distance']):.1f} standard errors from the "
        "float64 ones.\n"
    )


def compare_projections() -> Iterator[Comparison]:
    """Each of ours with the product alone and with every peer."""
    rows = [(row, "") for row in load("vocab_projection")["table"]]
    for row, where in rows + [(row, " on a CPU") for row in load("vocab_projection-cpu")["table"]]:
        times = {name: timing["median"] for name, timing in row["ms"].items() if timing}
        work = f"output layer{where}, V = {row['columns']:,}, D = {row['depth']:,}"
        for ours in (name for name in times if name in OURS):
            for theirs in (name for name in times if name not in OURS):
                yield Comparison(work, ours, theirs, f"{row['rows']:,}", times[ours] / times[theirs])


def compare_head_precisions() -> Iterator[Comparison]:
    """The output layer in 8 bits with that in 16 bits, and both with the product alone."""
    if not bench_head_precision.KEPT.exists():
        return
    pairs = ((SAMPLED, GEMM), (FLOAT8, GEMM), (FLOAT8, SAMPLED))
    for row in load("head-precision")["table"]:
        times = {name: timing["median"] for name, timing in row["ms"].items()}
        work = f"output layer in 8 and 16 bits, V = {row['columns']:,}, D = {row['depth']:,}"
        for ours, theirs in pairs:
            yield Comparison(work, ours, theirs, f"{row['rows']:,}", times[ours] / times[theirs])


def compare_selections() -> Iterator[Comparison]:
    """`select` with the chain of PyTorch operations."""
    rows = [(row, "") for row in load("select")["table"]]
    for row, where in rows + [(row, " on a CPU") for row in load("select-cpu")["table"]]:
        times = {name: timing["median"] for name, timing in row["ms"].items()}
        place = f"{row['sequences']:,} × {row['entries']:,}"
        yield Comparison(f"select{where}, {row['rule']}", "mdkern", "torch", place, times["mdkern"] / times["torch"])


def compare_decoders() -> Iterator[Comparison]:
    """Decoders with their plain loops, and caches with none."""
    parts, size = load("decoders")["parts"], Size()
    for part, work in (("size", "decoders, the paper's size"), ("pair", "decoders, the shipped pair")):
        for name, row in parts[part].items():
            yield Comparison(work, "mdkern", "plain loop", name, 1 / row["ratio"])
    speeds = {(row["batch"], row["way"]): row["tokens_per_second"] for row in parts["llada"].values()}
    for (batch, way), speed in speeds.items():
        loop = speeds.get((batch, "plain loop"))
        if way != "plain loop" and loop is not None:
            yield Comparison("LLaDA's shapes", way, "plain loop", f"batch {batch}", loop / speed)
    for name, row in parts["caches"].items():
        decoder, _, cache = name.rpartition(", ")
        if cache != "none":
            times = parts["caches"][f"{decoder}, none"]["tokens_per_second"] / row["tokens_per_second"]
            work = f"caches, the shipped pair, blocks of {size.pair_block}"
            yield Comparison(work, f"cache {cache}", "no cache", decoder, times)


def compare_samplers() -> Iterator[Comparison]:
    """Whole runs of the ancestral sampler with its baselines."""
    parts = load("paper-setting")["parts"]
    for name, label in LABELS.items():
        for peer in ("eager", "compiled"):
            times = parts["ours"][name]["median"] / parts[peer][name]["run"]
            yield Comparison("the paper's setting", "mdkern", peer, label, times)
    for row in parts["other_sizes"]["rows"]:
        place = f"{LABELS[row['model']]}, batch {row['batch_size']}, length {row['length']:,}, {row['steps']:,} steps"
        yield Comparison("other sizes", "mdkern", "eager", place, 1 / row["ratio"])
    for device in ("cpu", "cuda"):
        for row in load(f"sampling-{device}")["rows"]:
            for peer, ratio in row["ratio"].items():
                yield Comparison(f"the shipped pair, {device}", "mdkern", peer, row["label"], 1 / ratio)


def compare_people() -> Iterator[Comparison]:
    """Models built like Llama: passes with the model's own forward, whole runs also with the plain loop."""
    if not bench_people.KEPT.exists():
        return
    content = load("people")
    for row in content["passes"]:
        own = row["ms"]["own forward"]
        for kind in own:
            where = " of ".join((f"{kind} pass", bench_people.place(row)))
            for way, name in (("mdkern", "mdkern's passes"), ("fp8", "mdkern's passes in fp8")):
                yield Comparison("LLaDA-8B's shape", name, "own forward", where, row["ms"][way][kind] / own[kind])
    for row in content["runs"]:
        times = {name: statistics.median(values) for name, values in row["seconds"].items()}
        for cache in bench_people.CACHES:
            for way in ("mdkern", "fp8"):
                name, ours = f"{way}, cache {cache}", times[f"{way}, {cache}"]
                for peer in (f"own forward, {cache}", "plain loop"):
                    yield Comparison("LLaDA-8B's shape", name, peer, bench_people.place(row), ours / times[peer])


def compare_floors() -> Iterator[Comparison]:
    """Passes with the libraries' bare products and attention, which are only a part of them."""
    if not bench_floors.KEPT.exists():
        return
    content = load("floors")
    for row in (content[part] for part in bench_floors.SETTINGS if part in content):
        ours, theirs = (row["ms"][name]["median"] for name in (bench_floors.OURS, bench_floors.LIBRARIES))
        yield Comparison("whole passes", "mdkern", "bare products", bench_floors.name_of(row), ours / theirs)


def compare_diffusion_gemma() -> Iterator[Comparison]:
    """`sample_canvas` with transformers' ``generate``, at each number of texts that both were timed at."""
    if not bench_diffusion_gemma.KEPT.exists():
        return
    times = {(row["way"], row["batch"]): statistics.median(row["ms"]) for row in load("diffusion-gemma")["rows"]}
    for (way, batch), ours in times.items():
        theirs = times.get((bench_diffusion_gemma.THEIRS, batch))
        if way == bench_diffusion_gemma.OURS and theirs is not None:
            yield Comparison("DiffusionGemma", way, bench_diffusion_gemma.THEIRS, f"{batch} texts", ours / theirs)


def compare_sizes() -> Iterator[Comparison]:
    """Models of true size with their authors' loops, at each number of texts, and with their evaluation loop."""
    if not bench_sizes.KEPT.exists():
        return
    for part in load("sizes")["parts"].values():
        for work, ours, theirs, place, times in bench_sizes.pairs(part):
            yield Comparison(work, ours, theirs, place, times)


def all_comparisons() -> list[Comparison]:
    return list(
        chain(
            compare_projections(),
            compare_head_precisions(),
            compare_selections(),
            compare_decoders(),
            compare_people(),
            compare_floors(),
            compare_diffusion_gemma(),
            compare_sizes(),
            compare_samplers(),
        )
    )


def losses_line() -> str:
    """Where ours is the slower one, in one sentence."""
    comparisons = all_comparisons()
    lost = [entry for entry in comparisons if entry.lost]
    most = max(lost, key=lambda entry: entry.times)
    return (
        f"**Where we lose**: of the {len(comparisons)} pairs of times in the results mdkern is slower in {len(lost)}, "
        f"at most {most.times:.2f} times as long ({most.work}: {most.ours} beside {most.theirs}, {most.place}). "
        "[The list](docs/benchmarks.md#where-we-lose).\n"
    )


def losses() -> str:
    """Every pair of times in the results of which ours is the longer, whatever it is compared with."""
    comparisons = all_comparisons()
    groups = groupby(comparisons_by_subject(comparisons), key=subject)
    body, lost = [], 0
    for (work, ours, theirs), members in groups:
        run = list(members)
        times = [entry.times for entry in run if entry.lost]
        lost += len(times)
        if times:
            least, most = f"{min(times):.2f}", f"{max(times):.2f}"
            body.append([work, ours, theirs, places(run), least if least == most else f"{least}–{most}"])
    caption = f"{lost} of the {len(comparisons)} pairs of times in `benchmarks/results`, and no others:\n\n"
    return caption + markdown(["what", "ours", "slower than", "at", "times as long"], body)


def subject(entry: Comparison) -> tuple[str, str, str]:
    return entry.work, entry.ours, entry.theirs


def comparisons_by_subject(comparisons: list[Comparison]) -> list[Comparison]:
    """Those of one subject side by side, subjects and members in the order of their first."""
    order = {key: index for index, key in enumerate(dict.fromkeys(map(subject, comparisons)))}
    return sorted(comparisons, key=lambda entry: order[subject(entry)])


def places(run: list[Comparison]) -> str:
    """Where a subject is lost: ``16, 64, 512–4,096`` if all that was measured between 512 and 4,096 is."""
    sizes = all(re.fullmatch(r"[\d,]+", entry.place) for entry in run)
    named = []
    for slower, members in groupby(run, key=lambda entry: entry.lost):
        found = [entry.place for entry in members]
        if slower:
            named += [f"{found[0]}–{found[-1]}"] if sizes and len(found) > 2 else found
    return ", ".join(named) + " rows" if sizes else "; ".join(named)


TABLES: dict[str, Callable[[], str]] = {
    "headline": headline,
    "losses": losses,
    "losses-line": losses_line,
    "output-layer": partial(output_layer, 50_258, 768),
    "decoder-range": decoder_range,
    "agreement": agreement,
    "sampling-cpu": partial(sampling, "cpu"),
    "sampling-cuda": partial(sampling, "cuda"),
    "vocab-projection": kernel_tables.vocab_projection,
    "select": kernel_tables.select,
    "head-precision": bench_head_precision.head_precision,
    "diffusion-gemma": bench_diffusion_gemma.diffusion_gemma,
    "first-call": bench_first_call.first_call,
    "floors": bench_floors.floors,
    "people": bench_people.people,
    "sizes": bench_sizes.sizes,
    "precision": bench_precision.precision,
    "small-passes": bench_small_passes.small_passes,
    **gpu_tables.TABLES,
    **paper_tables.TABLES,
    **decoder_tables.TABLES,
    **study_tables.TABLES,
    **learning_tables.TABLES,
    **choice_tables.TABLES,
}


def fill(text: str) -> str:
    """A document with its tables as the results are now."""
    return PLACE.sub(lambda place: place[1] + TABLES[place[2]]() + place[3], text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a document is out of date")
    check = parser.parse_args().check
    old = {path: path.read_text() for path in DOCUMENTS}
    new = {path: fill(text) for path, text in old.items()}
    if check:
        return int(old != new)
    for path, text in new.items():
        write_text_whole(path, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
