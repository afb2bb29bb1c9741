"""The evaluation of LLaDA by its authors' ``eval_llada.py`` and by `mdkern.harness`, on the same requests.

Both are models of lm-evaluation-harness, given one model with random weights and one tokenizer. The authors' class
generates one answer after the other, and scores one continuation after the other with 128 masks, 32 in a pass. Theirs
is made without its constructor, which would read a checkpoint, and with an ``accelerator``, without which its
``generate_until`` ends with an error on a single GPU. Neither looks for the greedy continuation, as the authors
recommend.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import mdkern
from benchmarks import published
from benchmarks.harness import seconds
from benchmarks.kernel_tables import markdown

THEIRS, OURS = "eval_llada.py", "mdkern.harness"
BLOCK, MASKS, BATCH = 32, 128, 32
REQUESTS, WRITTEN = 16, 64  # answers of 64 tokens in 64 steps, one token a pass


def tokenizer_of(vocab_size: int) -> Any:
    """A tokenizer whose word ``t7`` is the token 7."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"t{number}": number for number in range(vocab_size)}
    made = Tokenizer(models.WordLevel(words, unk_token="t0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="t0")


def words(count: int, limit: int, generator: torch.Generator) -> str:
    return " ".join(f"t{number}" for number in torch.randint(1, limit, (count,), generator=generator).tolist())


def requests_of(count: int, limit: int, longest: int) -> dict[str, list[Any]]:
    """Questions of different lengths, and contexts with continuations as in multiple-choice tasks."""
    generator = torch.Generator().manual_seed(0)

    def length(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (1,), generator=generator))

    asked = [
        (words(length(longest // 2, longest), limit, generator), {"until": ["no such text"]}) for _ in range(count)
    ]
    scored = [
        (words(length(longest // 2, longest), limit, generator), " " + words(length(2, 16), limit, generator))
        for _ in range(count)
    ]
    return {
        "generate_until": [SimpleNamespace(args=pair) for pair in asked],
        "loglikelihood": [SimpleNamespace(args=pair) for pair in scored],
    }


def authors_model(peers: Path, model: Any, tokenizer: Any, written: int) -> Any:
    """An `LLaDAEvalHarness` with the settings of ours."""
    kind = published.load(peers, "llada", "eval_llada").LLaDAEvalHarness
    made = object.__new__(kind)
    kind.__bases__[0].__init__(made)
    made.__dict__ |= {
        "model": model, "tokenizer": tokenizer, "device": model.device, "_device": model.device,
        "mask_id": model.config.mask_token_id, "mc_num": MASKS, "batch_size": BATCH, "sampling_eps": 0.0,
        "max_length": 4096, "is_check_greedy": False,
        "cfg": 0.0, "steps": written, "gen_length": written, "block_length": BLOCK, "remasking": "low_confidence",
        "accelerator": SimpleNamespace(wait_for_everyone=lambda: None),
    }  # fmt: skip
    return made


def our_model(denoiser: Any, tokenizer: Any, written: int, cache: str) -> Any:
    from mdkern.harness import MdkernLM

    return MdkernLM(
        denoiser, tokenizer=tokenizer, gen_length=written, decoder="top_probability", block_length=BLOCK,
        steps_per_block=BLOCK, cache=cache, stop_at_eos=False, samples=MASKS, check_greedy=False, batch_size=BATCH,
    )  # fmt: skip


def measure_evaluation(
    peers: Path | None, tiny: bool, known: dict[str, Any], save: Callable[[dict[str, Any]], None]
) -> None:
    """Requests a second of both kinds; `save` is called with what there is after each."""
    absent = published.missing(peers, "llada", "generate.py", "eval_llada.py")
    lacking = [name for name in ("lm_eval", "accelerate", "datasets") if importlib.util.find_spec(name) is None]
    if lacking:
        absent = f"no {', '.join(lacking)} is installed: pip install 'mdkern[harness]' accelerate datasets"
    if absent is not None:
        raise FileNotFoundError(absent)
    assert peers is not None
    device = "cpu" if tiny else "cuda"
    model = published.build(peers, "llada", tiny, device)
    denoiser = mdkern.adapt(model)
    tokenizer = tokenizer_of(model.config.vocab_size)
    count, longest = (4, 24) if tiny else (REQUESTS, 192)
    limit = model.config.vocab_size - 16 if tiny else 100_000
    asked = requests_of(count, limit, longest)
    theirs = authors_model(peers, model, tokenizer, WRITTEN)
    ours = {cache: our_model(denoiser, tokenizer, WRITTEN, cache) for cache in ("none", "dual")}
    content: dict[str, Any] = {
        "environment": known, "requests": count, "written": WRITTEN, "masks": MASKS, "batch_size": BATCH,
        "how": denoiser.description, "skipped": None, "rows": [], "failed": [],
    }  # fmt: skip
    contenders = [
        ("generate_until", OURS, ours["none"]),
        ("generate_until", f"{OURS}, cache dual", ours["dual"]),
        ("generate_until", THEIRS, theirs),
        ("loglikelihood", OURS, ours["none"]),
        ("loglikelihood", THEIRS, theirs),
    ]
    answers: dict[tuple[str, str], list[Any]] = {}
    for kind, name, contender in contenders:
        try:
            run = getattr(contender, kind)
            warm_up = asked[kind][:1] if name == THEIRS else asked[kind]  # ours compiles and captures by width
            first = seconds(partial(run, warm_up), device)[0]
            took, answers[kind, name] = seconds(partial(run, asked[kind]), device)
            content["rows"].append({"kind": kind, "way": name, "seconds": took, "first": first})
            print(f"{kind}, {name}: {count / took:.2f} requests/s, first {first:.1f} s, then {took:.1f} s", flush=True)
        except Exception as error:
            content["failed"].append(f"{kind}, {name}: {type(error).__name__}: {error}"[:500])
            print(content["failed"][-1], flush=True)
        content["agreement"] = agreement(answers)
        save(content)


def agreement(answers: dict[tuple[str, str], list[Any]]) -> dict[str, float]:
    """The share of answers that are the same, and the mean log-likelihood of both."""
    found: dict[str, float] = {}
    texts = [answers.get(("generate_until", name)) for name in (OURS, THEIRS)]
    if texts[0] and texts[1]:
        found["same_answers"] = statistics.mean(ours == theirs for ours, theirs in zip(*texts))
    for name in (OURS, THEIRS):
        if ("loglikelihood", name) in answers:
            found[f"mean_loglikelihood, {name}"] = statistics.mean(value for value, _ in answers["loglikelihood", name])
    return found


def pairs(part: dict[str, Any]) -> Iterator[tuple[str, str, str, str, float]]:
    """What was done, ours, theirs, where, and how many times as long ours took."""
    times = {(row["kind"], row["way"]): row["seconds"] for row in part["rows"]}
    for (kind, way), took in times.items():
        if way != THEIRS and (kind, THEIRS) in times:
            yield f"LLaDA-8B, {kind}", way, THEIRS, f"{part['requests']} requests", took / times[kind, THEIRS]


def evaluation_table(part: dict[str, Any]) -> str:
    times = {(row["kind"], row["way"]): row["seconds"] for row in part["rows"]}
    body = []
    for (kind, way), took in times.items():
        theirs = times.get((kind, THEIRS))
        ratio = "–" if theirs is None else f"{theirs / took:.1f} ×"
        body.append([f"`{kind}`", f"`{way.split(',')[0]}`{way[len(way.split(',')[0]) :]}",
                     f"{part['requests'] / took:.2f}", ratio])  # fmt: skip
    text = (
        f"LLaDA-8B in the harness: {part['requests']} requests, contexts of 96 to 192 tokens. Answers of "
        f"{part['written']} tokens, one a pass, in blocks of {BLOCK}; likelihoods of 2 to 16 tokens by "
        f"{part['masks']} masks, {part['batch_size']} in a pass.\n\n"
    )
    return text + markdown(["request", "", "requests/s", "to the authors' loop"], body)
