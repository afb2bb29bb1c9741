"""Writes a page that replays the denoising of texts, each token coloured by its step and marked by its model.

The page is one file without outside resources: `trace.html` with the data filled in.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from mdkern.files import write_whole
from mdkern.schedule import Schedule

if TYPE_CHECKING:
    from mdkern.output import History, SampleOutput

__all__ = ["write_trace"]

TEMPLATE = Path(__file__).with_name("trace.html")
USUAL_MODELS = {"H": "heavy model", "L": "light model"}
INCOMPLETE = "\ufffd"  # what tokenizers put for bytes that are not a whole character


class About(TypedDict, total=False):
    """What a page can show besides the samples. All of it is optional."""

    title: str  # the page's heading
    schedule: Schedule | str  # the schedule; if it is not given, it is inferred from the history
    models: Mapping[str, str]  # descriptions of the schedule's models, e.g. {"H": "12 blocks"}
    decoder: str  # the decoder's name


def write_trace(path: str | os.PathLike[str], output: SampleOutput, tokenizer: Any, **about: Unpack[About]) -> None:
    """Write the page, whole or not at all.

    Args:
        path: the file to write.
        output: what ``sample(..., return_history=True)`` returned.
        tokenizer: a tokenizer of transformers, or any object with its ``decode``.
        about: the fields of `About`: title, schedule, models, decoder.

    Raises:
        ValueError: `output` has no history.
        TypeError: an argument that is not a field of `About`.
    """
    write_whole(path, render_trace(output, tokenizer, **about))


def render_trace(output: SampleOutput, tokenizer: Any, **about: Unpack[About]) -> str:
    """The page as a string; see `write_trace`."""
    contents = trace_data(output, tokenizer, **about)
    data = json.dumps(contents, separators=(",", ":"))
    values = {
        "TITLE": html.escape(contents["title"]),
        "DATA": data.replace("<", "\\u003c"),  # neither </script> nor <!-- may appear; it is the same JSON
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"__(TITLE|DATA)__", lambda match: values[match[1]], template)


def trace_data(output: SampleOutput, tokenizer: Any, **about: Unpack[About]) -> dict[str, Any]:
    """The page's data, as a value for JSON. Steps and models are those of `History`.

    Both are -1 where the token was given. Only the model is -1 where no model ran, such as after the end of a text.
    """
    unknown = about.keys() - About.__annotations__
    if unknown:
        raise TypeError(f"a trace has no {', '.join(sorted(unknown))}: there is {', '.join(About.__annotations__)}")
    history = output.history
    if history is None or output.sequences is None or output.nfe is None:
        raise ValueError("output has no history: call sample(..., return_history=True)")
    rows = zip(output.sequences.tolist(), history.step.tolist(), history.model.tolist())
    described = USUAL_MODELS | dict(about.get("models", {}))
    return {
        "title": about.get("title", "mdkern trace"),
        "decoder": about.get("decoder"),
        "seed": None if output.seed is None else str(output.seed),  # JavaScript's numbers hold fewer than 64 bits
        "steps": history.steps,
        "models": list(history.models),
        "described": [described.get(name, "") for name in history.models],
        "segments": schedule_segments(history, about.get("schedule")),
        "samples": [
            {
                "ids": ids,
                "step": step,
                "model": model,
                "units": text_units(ids, lambda part: decode(tokenizer, part)),
                "nfe": [int(output.nfe[name][number]) for name in history.models],
            }
            for number, (ids, step, model) in enumerate(rows)
        ],
    }


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of `ids`, special tokens included."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def text_units(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[tuple[str, int]]:
    """Cut a text into the smallest runs of tokens that are whole characters, as pairs (text, number of tokens).

    A unit is nearly always one token; a byte-level vocabulary may need several for a character. Each unit is decoded
    together with the one before it, because some tokenizers write a token differently at the start of a text. The texts
    of all units joined are the whole text.
    """
    units: list[tuple[str, int]] = []
    context = start = 0
    for stop in range(1, len(ids) + 1):
        before, text = decode(ids[context:start]), decode(ids[context:stop])
        if text.endswith(INCOMPLETE) and stop < len(ids):
            continue
        units.append((text[len(before) :], stop - start))
        context, start = start, stop
    return units


def schedule_segments(history: History, schedule: Schedule | str | None) -> list[tuple[int, int, int]]:
    """(model, first, stop) of each segment, models as indices into ``history.models``."""
    if schedule is not None:
        schedule = Schedule(schedule) if isinstance(schedule, str) else schedule
        return [(history.models.index(part.model), part.first, part.stop) for part in schedule.segments(history.steps)]
    pairs = zip(history.step.flatten().tolist(), history.model.flatten().tolist())
    known = {step: model for step, model in pairs if step >= 0 and model >= 0}
    current = known[min(known)]
    segments: list[tuple[int, int, int]] = []
    for step in range(history.steps):
        current = known.get(step, current)
        if segments and segments[-1][0] == current:
            segments[-1] = (current, segments[-1][1], step + 1)
        else:
            segments.append((current, step, step + 1))
    return segments
