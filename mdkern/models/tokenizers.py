"""Loads tokenizers, and finds in them what a model's config may not say: the mask, and what ends an answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdkern.models.weight_files import PathLike, find_local, plain_file, read_json

if TYPE_CHECKING:
    from mdkern.models.denoiser import Denoiser

# Any one of these in a folder says that it has a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model")
PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")  # the class of a tokenizer that is all in its tokenizer.json
PROBE = "\u2402 answer \u2403"  # an answer that no chat template has in it


def load_tokenizer(name_or_path: PathLike, trust_remote_code: bool = False, **options: Any) -> Any:
    """The tokenizer of a ``tokenizer.json``, a folder or a repository. The user is not asked anything.

    Args:
        trust_remote_code: run a tokenizer's own code, if it has any. Without it, one that also has a ``tokenizer.json``
            is read from that.
        options: as for ``AutoTokenizer.from_pretrained``.

    Raises:
        ValueError, OSError, or any exception of a foreign file: it cannot be loaded.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    local = find_local(name_or_path, "tokenizer", single_names=True)
    if local is not None and not local.is_dir():
        return PreTrainedTokenizerFast(tokenizer_file=str(plain_file(local)))
    if local is not None:
        for file in local.glob("*.json"):
            plain_file(file)
        file = local / "tokenizer_config.json"
        settings = read_json(file) if file.exists() else {}
        code = settings.get("auto_map") if not trust_remote_code else None
        if code and not (local / "tokenizer.json").exists():
            raise ValueError(
                "it needs code of its own, which is not run: save it as a fast one, a tokenizer.json, or read the code"
                " and allow it by trust_remote_code=True (--trust-remote-code)"
            )
        plain = settings.get("tokenizer_class") in PLAIN and not settings.get("auto_map")
        if code or (plain and (local / "tokenizer.json").exists()):  # without a look at the model's config, as Auto has
            return PreTrainedTokenizerFast.from_pretrained(str(name_or_path), local_files_only=True)
        options["local_files_only"] = True
    return AutoTokenizer.from_pretrained(str(name_or_path), trust_remote_code=trust_remote_code, **options)


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in TOKENIZER_FILES)


def mask_of(tokenizer: Any) -> int | None:
    """The id of a tokenizer's mask token: the one that it names or, if it names none, its only added token whose
    letters are "mask", as in LLaDA 2's ``<|mask|>``, or "mdm_mask", as in LLaDA's; None if there is none."""
    if tokenizer is None:
        return None
    if tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    added: dict[str, int] = tokenizer.get_added_vocab() if hasattr(tokenizer, "get_added_vocab") else {}
    masks = {number for text, number in added.items() if re.fullmatch(r"\W*(?:mdm_)?mask\W*", text.lower())}
    return masks.pop() if len(masks) == 1 else None


def end_of_turn(tokenizer: Any) -> int | None:
    """The id of the special token that a tokenizer's chat template puts after an answer; None if it puts none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
    try:
        text = tokenizer.apply_chat_template(talk, tokenize=False)
    except Exception:  # a template may ask for more, or refuse
        return None
    _, answered, after = text.rpartition(PROBE)
    specials = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    found = [number for number, token in specials.items() if after.strip().startswith(token)]
    return max(found, key=lambda number: len(specials[number]), default=None) if answered else None


def chat_text(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation in the tokenizer's chat template, up to where the next answer begins.

    Args:
        messages: each with ``role`` (``"system"``, ``"user"``, ``"assistant"``) and ``content``.

    Raises:
        ValueError: the tokenizer has no chat template, or the template refuses the conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the tokenizer has no chat template, so that its model was not made for conversations: continue texts with"
            " mdkern sample --prompt, or give an instruct model"
        )
    try:
        return str(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False))
    except Exception as error:  # a template is a program
        raise ValueError(f"the tokenizer's chat template refuses the conversation: {error}") from error


def check_tokenizer(
    tokenizer: Any, denoiser: Denoiser, what: str = "the tokenizer", model: str = "the model", masks: bool = True
) -> None:
    """Refuse a tokenizer that belongs to another model: one with more ids, or with another mask.

    Args:
        what, model: how a message names them.
        masks: whether the masks must agree.
    """
    if len(tokenizer) > denoiser.vocab_size:
        raise ValueError(
            f"{what} has {len(tokenizer)} ids, {model} only {denoiser.vocab_size}: it belongs to another model"
        )
    if masks and tokenizer.mask_token_id not in (None, denoiser.mask_id):
        raise ValueError(
            f"{what} has mask id {tokenizer.mask_token_id}, {model} has {denoiser.mask_id}: it belongs to another model"
        )
