"""Checkpoints on disk, small and random: models of transformers and a tokenizer in a folder, as people have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS, MASK, END, TURN = 30, 27, 3, 5  # as in tests.problems.hf_models
TEMPLATE = (
    "{% for turn in messages %}<|{{ turn.role }}|> {{ turn.content }} <|turn|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(mask: str | None = "<|mask|>", template: str | None = TEMPLATE, words: int = WORDS) -> Any:
    """A tokenizer of `words` ids, one for each word ``w0``, ``w1``, ...; 3 ends a text and 5 a turn.

    `mask`: what it says is its mask token; None: it says nothing, and has the token all the same.
    """
    special = {END: "<|end|>", TURN: "<|turn|>", 6: "<|user|>", 7: "<|assistant|>", 1: "<|pad|>", MASK: "<|mask|>"}
    vocab = {special.get(number, f"w{number}"): number for number in range(words)}
    bare = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bare.add_special_tokens([text for number, text in special.items() if number < words])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<|end|>", pad_token="<|pad|>")
    if mask is not None:
        tokenizer.mask_token = mask
    tokenizer.chat_template = template
    return tokenizer


def save(folder: Path, model: Any = None, tokenizer: Any = None, **config: Any) -> str:
    """A folder with a model, a tokenizer, and some settings of the config changed; None takes a setting out."""
    folder.mkdir(exist_ok=True)
    if model is not None:
        model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    file = folder / "config.json"
    settings = json.loads(file.read_text()) if file.exists() else {}
    settings = {name: value for name, value in (settings | config).items() if value is not None}
    file.write_text(json.dumps(settings))
    return str(folder)
