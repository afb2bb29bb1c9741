"""``mdkern sample``'s prompt, and the schedule: what the text begins as and which model runs when."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from mdkern.schedule import Schedule

LIGHT_SHARE = 0.25  # of the default schedule: L32 H192 L32 at 256 steps
PLACEHOLDER = re.compile(r"\[MASK:(\d{1,9})\]")


def read_prompt(text: str | None, file: Path | None) -> str:
    """The prompt's text, from the option or from the file.

    Raises:
        ValueError: both are given, or the file cannot be read or is not UTF-8.
    """
    if file is None:
        return text or ""
    if text is not None:
        raise ValueError("--prompt and --prompt-file must not both be given")
    try:
        return file.read_bytes().decode("utf-8-sig")  # removes the byte-order mark that some editors write
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--prompt-file {file} is not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x}): convert it "
            "first, e.g. with iconv -f latin1 -t utf-8"
        ) from None
    except OSError as error:
        raise ValueError(f"--prompt-file {file} cannot be read: {error.strerror}") from None


def read_prompts(file: Path) -> list[str]:
    """The prompts of a file of JSON lines, plain or .xz: each is an object with ``prompt``; other keys are left alone.

    Raises:
        ValueError: the file cannot be read, has a line that is none, or has no line.
    """
    from mdkern.files import open_text

    prompts = []
    try:
        with open_text(file) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        prompts.append(check_text(json.loads(line)["prompt"]))
                    except (ValueError, KeyError, TypeError):
                        where = f"--prompts {file}, line {number}"
                        raise ValueError(f"{where}: not a JSON object with a text `prompt`") from None
    except OSError as error:
        raise ValueError(f"--prompts {file} cannot be read: {error.strerror}") from None
    if not prompts:
        raise ValueError(f"--prompts {file} has no prompts")
    return prompts


def check_text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a text is wanted, not {value!r}")
    return value


def all_start_ids(prompts: Sequence[str], tokenizer: Any, mask_id: int, length: int | None, longest: int) -> Tensor:
    """`start_ids` of many prompts, all up to one length: int64 ``[N, L]``.

    Raises:
        ValueError: what `start_ids` raises, with the prompt's number.
    """
    import torch

    rows = []
    for number, prompt in enumerate(prompts, start=1):
        try:
            rows.append(start_ids(prompt, tokenizer, mask_id, length or longest, longest))
        except ValueError as error:
            raise ValueError(f"--prompts: prompt {number}: {error}") from None
    return torch.cat(rows)


def in_conversation(prompts: Sequence[str], tokenizer: Any, system: str | None) -> list[str]:
    """Each prompt as a user's turn in the tokenizer's chat template, after the system's turn if there is one."""
    from mdkern.models.tokenizers import chat_text

    before = [] if system is None else [{"role": "system", "content": system}]
    return [chat_text(tokenizer, [*before, {"role": "user", "content": prompt}]) for prompt in prompts]


def start_ids(
    prompt: str, tokenizer: Any, mask_id: int, length: int | None, longest: int, new_tokens: int | None = None
) -> Tensor:
    """The prompt's tokens, and mask ids for its placeholders and for what follows: int64 ``[1, L]``.

    `new_tokens`: length of what follows, where there is no `length`.
    """
    import torch

    if length is not None and length > longest:
        raise ValueError(f"--length {length} is beyond the {longest} positions of the models")
    ids: list[int] = []
    for index, piece in enumerate(PLACEHOLDER.split(prompt)):  # text, count, text, count, …, text
        if index % 2 == 0:
            ids += tokenizer.encode(piece, add_special_tokens=False)
        elif len(ids) + int(piece) > longest:
            raise ValueError(f"the prompt's [MASK:{piece}] goes beyond the {longest} positions of the models")
        else:
            ids += [mask_id] * int(piece)
    if new_tokens is not None:
        length = len(ids) + new_tokens
        if length > longest:
            raise ValueError(
                f"the prompt's {len(ids)} tokens and --new-tokens {new_tokens} are more than the {longest} positions of"
                " the models: lower --new-tokens, or shorten the prompt"
            )
    most = length or longest
    if len(ids) > most:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, but {'the models take' if length is None else '--length is'} {most}"
        )
    length = length or (len(ids) if mask_id in ids else longest)
    ids += [mask_id] * (length - len(ids))
    if mask_id not in ids:
        raise ValueError(f"the prompt fills all {length} positions: nothing is left to write")
    return torch.tensor([ids])


def choose_schedule(text: str | None, models: Sequence[str]) -> Schedule:
    from mdkern.schedule import Schedule

    if text is None and len(models) == 1:
        return Schedule.constant(models[0])
    if text is None and set(models) == {"H", "L"}:
        return Schedule.sandwich(LIGHT_SHARE)
    if text is None:
        raise ValueError(f"--schedule must be given to say when each of {', '.join(models)} runs")
    kind, _, share = text.partition(":")
    if kind.strip().lower() != "sandwich":
        return Schedule(text)
    try:
        return Schedule.sandwich(float(share))
    except ValueError:
        raise ValueError(
            f"--schedule {text!r} must give the light model's share in 0..1, as in sandwich:0.25"
        ) from None
