"""Models of true size with random weights: mdkern beside the authors' own loops, and beside their evaluation loop.

    python -m benchmarks.bench_sizes FOLDER --peers PEERS     # one GPU of 80 GB, four minutes; FOLDER/sizes.json
    python -m benchmarks.bench_sizes FOLDER --peers PEERS --parts sdar llada2
    python -m benchmarks.bench_sizes FOLDER --peers PEERS --size tiny   # small models on a CPU, to try it out

PEERS is a folder of the authors' code, which is not part of this repository; `benchmarks.published` says what lies
where. Without it LLaDA and SDAR are transformers' classes of the same shape, everything else is skipped, and the result
says so. Parts that FOLDER/sizes.json has already are kept unless they are chosen again.

Texts mean nothing, as weights are random; passes are what they would be. Both sides decode by the authors' rule with
their defaults, and no probability reaches a threshold, so that every pass reveals one token of a text. Both load the
same weights into the authors' own classes. Of each way the first call, which compiles and captures, is not counted in
the time; memory is that of all calls, above the weights. The loops of SDAR and LLaDA 2 take one text at a time.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mdkern
from benchmarks import evaluation_loop, published
from benchmarks.harness import RESULTS, environment, host_environment, seconds
from benchmarks.kernel_tables import caption, markdown
from benchmarks.true_sizes import BLOCK, FAMILIES, THEIRS, Family, Subject, Way, allocated
from mdkern.files import write_whole

GIVEN = 128  # tokens
BATCHES = 1, 8
PATIENCE = 2.0  # seconds after which a way is timed no more; three runs at most
KEPT = RESULTS / "sizes.json"
ABSENT = "Not measured yet.\n"


PARTS = (*FAMILIES, "evaluation")


def measure_way(made: Subject, way: Way, batch: int, written: int) -> tuple[dict[str, Any], Tensor]:
    """Seconds of runs, passes of each text, and bytes above the weights; the texts."""
    device, ours = made.denoiser.device, way.name != THEIRS
    mdkern.graphs.clear()
    base = made.weights if ours else allocated()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    generator = torch.Generator().manual_seed(0)
    limit = made.denoiser.vocab_size - 16 if made.denoiser.vocab_size < 1000 else 100_000  # below all special ids
    prompts = torch.randint(1, limit, (batch, GIVEN), generator=generator).to(device)
    began = time.perf_counter()
    way.run(prompts, written, BLOCK if ours else 1)  # ours captures this shape; theirs has nothing to prepare
    first = time.perf_counter() - began
    times: list[float] = []
    passes, text = 0, prompts
    while len(times) < 3 and sum(times) < PATIENCE:
        if ours:
            took, out = seconds(partial(way.run, prompts, written, BLOCK), device.type)
            passes, text = int(out.nfe["H"].max()), out.sequences
        else:
            with published.counted(made.model) as calls:
                took, text = seconds(partial(way.run, prompts, written, BLOCK), device.type)
            passes = len(calls)
        times.append(took)
    peak = torch.cuda.max_memory_allocated(device) - base if device.type == "cuda" else 0
    return {
        "way": way.name, "batch": batch, "seconds": times, "first": first, "passes": passes,
        "tokens_per_second": batch * written / statistics.median(times), "bytes_above_weights": peak,
    }, text  # fmt: skip


def shares(texts: dict[str, Tensor], batch: int) -> dict[str, float]:
    """Of each way, the share of written tokens that are the authors' loop's."""
    written = {name: text[:, GIVEN:] for name, text in texts.items()}
    return {
        f"{name}, {batch}": float((text == written[THEIRS]).double().mean())
        for name, text in written.items()
        if name != THEIRS
    }


def measure_family(family: Family, peers: Path | None, tiny: bool, save: Callable[[dict[str, Any]], None]) -> None:
    """All ways at 1 and at 8 texts; `save` is called with what there is after each."""
    torch.manual_seed(0)
    began = time.perf_counter()
    made = family.make(peers, tiny)
    content: dict[str, Any] = {
        "environment": here(tiny), "label": family.label, "rule": family.rule, "given": GIVEN,
        "written": family.written, "how": made.denoiser.description, "weights_bytes": made.weights,
        "authors_classes": made.skipped is None, "skipped": made.skipped, "rows": [], "same_tokens": {}, "failed": [],
    }  # fmt: skip
    print(f"{family.label}: built in {time.perf_counter() - began:.1f} s, {made.denoiser.description}", flush=True)
    save(content)
    for batch in BATCHES:
        texts: dict[str, Tensor] = {}
        for way in made.ways:
            if batch > 1 and way.alone:
                continue
            began = time.perf_counter()
            try:
                row, texts[way.name] = measure_way(made, way, batch, family.written)
                content["rows"].append(row)
                if way.name == THEIRS and family.greedy:
                    content["same_tokens"] |= shares(texts, batch)
                shown = f"{row['tokens_per_second']:.0f} tokens/s, {row['passes']} passes"
            except Exception:
                traceback.print_exc()
                content["failed"].append(f"{way.name}, {batch} texts")
                shown = "failed"
            print(f"{family.label}, {way.name}, {batch}: {shown}; {time.perf_counter() - began:.1f} s", flush=True)
            save(content)


def here(tiny: bool) -> dict[str, Any]:
    if tiny:
        return host_environment() | {"triton": "–", "transformers": version("transformers")}
    return environment("transformers")


def measure(folder: Path, peers: Path | None, tiny: bool, parts: Sequence[str]) -> dict[str, Any]:
    """Run the parts, write what there is after each step, and go on after one that fails."""
    path, size = folder / "sizes.json", "tiny" if tiny else "true"
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if content.get("size", size) != size:
        raise SystemExit(f"{path} has measurements of size {content['size']}: give another folder")
    content = {"size": size, "parts": content.get("parts", {})}

    def save(part: str, found: dict[str, Any]) -> None:
        content["parts"][part] = found
        write_whole(path, json.dumps(content, indent=1) + "\n")

    for part in parts:
        try:
            if part == "evaluation":
                evaluation_loop.measure_evaluation(peers, tiny, here(tiny), partial(save, part))
            else:
                measure_family(FAMILIES[part], peers, tiny, partial(save, part))
        except FileNotFoundError as error:  # no code of the authors
            save(part, {"environment": here(tiny), "skipped": str(error), "rows": [], "failed": []})
            print(f"{part} skipped: {error}")
        except Exception as error:
            traceback.print_exc()
            found = content["parts"].get(part, {"environment": here(tiny), "rows": [], "failed": []})
            found["failed"].append(f"{type(error).__name__}: {error}"[:500])
            save(part, found)
        finally:
            mdkern.graphs.clear()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return content


def table(content: dict[str, Any]) -> str:
    """Every family at 1 and at 8 texts, then the evaluation."""
    parts = [content["parts"][name] for name in FAMILIES if content["parts"].get(name, {}).get("rows")]
    text = ""
    if parts:
        known = parts[0]["environment"]
        text = (
            f"{caption(parts[0])}, transformers {known['transformers']}. bfloat16, random weights; {GIVEN} given "
            "tokens. ×: tokens/s to the authors' loop at as many texts; where it takes one text at a time, to its "
            "speed with one. GiB: above the weights.\n\n"
        )
        header = ["model, tokens written, rule", "texts", "", "passes", "tokens/s", "×", "GiB"]
        text += markdown(header, [line for part in parts for line in lines(part)])
        text += "".join(
            f"\n{part['label']}: {note}.\n" for part in parts for note in ([part["skipped"]] if part["skipped"] else [])
        )
    if content["parts"].get("evaluation", {}).get("rows"):
        text += "\n" + evaluation_loop.evaluation_table(content["parts"]["evaluation"])
    return text


def speeds(part: dict[str, Any]) -> dict[tuple[str, int], float]:
    """Tokens a second by way and texts. A loop that takes one text at a time has one speed."""
    found = {(row["way"], row["batch"]): row["tokens_per_second"] for row in part["rows"]}
    if (THEIRS, 1) in found:
        found.setdefault((THEIRS, 8), found[THEIRS, 1])
    return found


def lines(part: dict[str, Any]) -> list[list[str]]:
    found, body = speeds(part), []
    for index, row in enumerate(part["rows"]):
        theirs = found.get((THEIRS, row["batch"]))
        ratio = "–" if theirs is None else f"{row['tokens_per_second'] / theirs:.1f}"
        first = f"{part['label']}, {part['written']}, {part['rule']}" if index == 0 else ""
        gib = f"{row['bytes_above_weights'] / 2**30:.2f}"
        speed = f"{row['tokens_per_second']:,.0f}"
        body.append([first, str(row["batch"]), row["way"], str(row["passes"]), speed, ratio, gib])
    return body


def pairs(part: dict[str, Any]) -> Iterator[tuple[str, str, str, str, float]]:
    """What was done, ours, theirs, where, and how many times as long ours took."""
    if "requests" in part:
        yield from evaluation_loop.pairs(part)
        return
    found = speeds(part)
    for (way, batch), speed in found.items():
        if way != THEIRS and (THEIRS, batch) in found:
            yield part["label"], way, THEIRS, f"{batch} texts", found[THEIRS, batch] / speed


def sizes() -> str:
    """The tables of the kept results."""
    return table(json.loads(KEPT.read_text())) if KEPT.exists() else ABSENT


def failures(content: dict[str, Any]) -> list[str]:
    return [f"{name}: {what}" for name, part in content["parts"].items() for what in part["failed"]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_sizes", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peers", type=Path, help="folder of the authors' code")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--size", choices=("true", "tiny"), default="true", help="tiny: small models on a CPU")
    arguments = parser.parse_args(argv)
    content = measure(arguments.folder, arguments.peers, arguments.size == "tiny", arguments.parts)
    print(table(content))
    failed = failures(content)
    print("\n".join(f"failed: {what}" for what in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
