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
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mdkern
from benchmarks import block_cache, evaluation_loop, published
from benchmarks.bench_people import LLADA_8B, SMALL, bidirectional_llama
from benchmarks.harness import RESULTS, environment, host_environment, seconds
from benchmarks.kernel_tables import caption, markdown
from mdkern import Denoiser, decoders
from mdkern.compat import dream
from mdkern.files import write_whole
from mdkern.models.hf.compat import old_model_code

GIVEN, BLOCK = 128, 32
BATCHES = 1, 8
PATIENCE = 2.0  # seconds after which a way is timed no more; three runs at most
OURS, CACHED, THEIRS = "mdkern", "mdkern, cache", "authors' loop"
KEPT = RESULTS / "sizes.json"
ABSENT = "Not measured yet.\n"


@dataclass(frozen=True)
class Way:
    """One way to write texts: ``run(prompts, written, steps)`` with so many steps for each 32 tokens."""

    name: str
    run: Callable[[Tensor, int, int], Any]
    alone: bool = False  # takes one text at a time


@dataclass(frozen=True)
class Subject:
    """A model and the ways to run it."""

    model: Any
    denoiser: Denoiser
    ways: list[Way]
    weights: int  # bytes that are allocated with the model alone
    skipped: str | None  # why the authors' loop is not among the ways


@dataclass(frozen=True)
class Family:
    label: str
    make: Callable[[Path | None, bool], Subject]
    written: int  # tokens
    rule: str
    greedy: bool = True  # both sides take the most probable tokens, so that their texts can be compared


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def subject(
    family: str, peers: Path | None, tiny: bool, ours: Callable[[Denoiser], list[Way]], theirs: Callable[[Any], Way]
) -> Subject:
    """The family's model of its authors' code with their loop, or one of transformers' of the same shape without it."""
    device = "cpu" if tiny else "cuda"
    loops = ("generate.py",) if family in ("llada", "sdar") else ()
    skipped = published.missing(peers, family, *loops)
    if skipped is None:
        assert peers is not None
        model = published.build(peers, family, tiny, device)
        weights = allocated()
        denoiser = mdkern.adapt(model)
        return Subject(model, denoiser, [*ours(denoiser), theirs(model)], weights, None)
    if family == "llada":
        model, denoiser = bidirectional_llama(SMALL if tiny else LLADA_8B, device)
    elif family == "sdar":
        denoiser = block_cache.qwen3(block_cache.SMALL if tiny else block_cache.SDAR_4B, 4, device)
        model = denoiser
    else:
        raise FileNotFoundError(f"{skipped}, and transformers has no class of that shape")
    return Subject(model, denoiser, ours(denoiser), allocated(), skipped)


def write(denoiser: Denoiser, prompts: Tensor, written: int, **options: Any) -> Any:
    """`mdkern.sample` for masks after prompts, as one batch."""
    blanks = prompts.new_full((len(prompts), written), denoiser.mask_id)
    ids = torch.cat((prompts, blanks), 1)
    return mdkern.sample(denoiser, input_ids=ids, batch_size=len(ids), seed=0, progress=False, **options)


def total_steps(written: int, steps: int) -> int:
    return steps * (written // BLOCK)


def llada(peers: Path | None, tiny: bool) -> Subject:
    """LLaDA's `generate`: in blocks of 32, the surest tokens of each step, greedily."""

    def ours(denoiser: Denoiser) -> list[Way]:
        def run(cache: str, prompts: Tensor, written: int, steps: int) -> Any:
            options: dict[str, Any] = {"decoder": "top_probability", "block_length": BLOCK, "temperature": 0.0}
            return write(denoiser, prompts, written, steps=total_steps(written, steps), cache=cache, **options)

        return [Way(OURS, partial(run, "none")), Way(f"{CACHED} dual", partial(run, "dual"))]

    def theirs(model: Any) -> Way:
        assert peers is not None
        generate = published.load(peers, "llada", "generate").generate

        def run(prompts: Tensor, written: int, steps: int) -> Any:
            options: dict[str, Any] = {"gen_length": written, "block_length": BLOCK, "temperature": 0.0}
            mask_id = model.config.mask_token_id
            return generate(model, prompts, steps=total_steps(written, steps), mask_id=mask_id, **options)

        return Way(THEIRS, run)

    return subject("llada", peers, tiny, ours, theirs)


def dream_7b(peers: Path | None, tiny: bool) -> Subject:
    """Dream's `diffusion_generate` with ``alg="entropy"``, greedily. In blocks with a cache the order is another."""

    def ours(denoiser: Denoiser) -> list[Way]:
        def whole(prompts: Tensor, written: int, steps: int) -> Any:
            count = total_steps(written, steps)
            decoder = dream.decoder_of(dream.DreamGenerationConfig(alg="entropy", steps=count), None)
            return write(denoiser, prompts, written, decoder=decoder, steps=count, temperature=0.0)

        def blocks(prompts: Tensor, written: int, steps: int) -> Any:
            options: dict[str, Any] = {"decoder": "entropy", "block_length": BLOCK, "cache": "dual"}
            return write(denoiser, prompts, written, steps=total_steps(written, steps), temperature=0.0, **options)

        return [Way(OURS, whole), Way(f"{CACHED} dual", blocks)]

    def theirs(model: Any) -> Way:
        assert peers is not None
        kind = published.load(peers, "dream", "generation_utils").DreamGenerationConfig

        def run(prompts: Tensor, written: int, steps: int) -> Any:
            options: dict[str, Any] = {"steps": total_steps(written, steps), "max_new_tokens": written}
            with old_model_code():
                config = kind(mask_token_id=model.config.mask_token_id, alg="entropy", temperature=0.0, **options)
                return model.diffusion_generate(prompts, config, attention_mask=torch.ones_like(prompts))

        return Way(THEIRS, run)

    return subject("dream", peers, tiny, ours, theirs)


def sdar(peers: Path | None, tiny: bool) -> Subject:
    """SDAR's `block_diffusion_generate` with its defaults: blocks and steps of 4, threshold 0.85, temperature 1."""

    def ours(denoiser: Denoiser) -> list[Way]:
        def run(prompts: Tensor, written: int, steps: int) -> Any:
            return write(denoiser, prompts, written, decoder=decoders.Threshold(0.85), temperature=1.0, cache="block")

        return [Way(f"{CACHED} block", run)]

    def theirs(model: Any) -> Way:
        assert peers is not None
        generate = published.load(peers, "sdar", "generate").block_diffusion_generate

        def run(prompts: Tensor, written: int, steps: int) -> Any:
            options: dict[str, Any] = {"gen_length": written, "block_length": 4, "denoising_steps": min(steps, 4)}
            with published.old_caches():
                return generate(
                    model, {"input_ids": prompts}, model.config.mask_token_id, confidence_threshold=0.85, **options
                )

        return Way(THEIRS, run, alone=True)

    return subject("sdar", peers, tiny, ours, theirs)


def llada2(peers: Path | None, tiny: bool) -> Subject:
    """LLaDA 2's own `generate` with its defaults: blocks and steps of 32, threshold 0.95, greedily, no cache."""

    def ours(denoiser: Denoiser) -> list[Way]:
        def run(prompts: Tensor, written: int, steps: int) -> Any:
            return write(denoiser, prompts, written, decoder=decoders.Threshold(0.95), temperature=0.0, cache="block")

        return [Way(f"{CACHED} block", run)]

    def theirs(model: Any) -> Way:
        def run(prompts: Tensor, written: int, steps: int) -> Any:
            options: dict[str, Any] = {"gen_length": written, "block_length": BLOCK, "steps": steps, "eos_id": -1}
            answer = model.generate(prompts, threshold=0.95, mask_id=model.config.mask_token_id, **options)
            return torch.cat((prompts, answer), 1)

        return Way(THEIRS, run, alone=True)

    return subject("llada2", peers, tiny, ours, theirs)


FAMILIES: dict[str, Family] = {
    "llada": Family("LLaDA-8B", llada, 64, "low-confidence remasking, blocks of 32"),
    "dream": Family("Dream-7B", dream_7b, 64, 'alg="entropy"'),
    "sdar": Family("SDAR-4B", sdar, 128, "threshold 0.85, blocks of 4, temperature 1", greedy=False),
    "llada2": Family("LLaDA 2 mini, 16B-A1B", llada2, 32, "threshold 0.95, blocks of 32"),
}
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
