"""Tells from a ``config.json``, before any weights are read, what kind of model of transformers a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CANVAS = "DiffusionGemmaForBlockDiffusion"
# Of the classes that a checkpoint's own code offers, the first of these is taken, as it yields logits.
AUTO_CLASSES = ("AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModel")


def is_block_diffusion(model: Any) -> bool:
    """Whether a model is transformers' DiffusionGemma with its output layer, or a subclass of it."""
    return any(kind.__name__ == CANVAS for kind in type(model).__mro__)


def architecture(settings: Mapping[str, Any]) -> str:
    return str((settings.get("architectures") or [""])[0])


def of_transformers(settings: Mapping[str, Any]) -> str:
    """The class of transformers that loads it with an output layer, "" if none does.

    An encoder's checkpoint of another class is tried as a masked language model; weights that it lacks are noticed.
    """
    from transformers.models.auto import modeling_auto

    masked = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    named, kind = architecture(settings), str(settings.get("model_type") or "")
    if named == masked.get(kind):
        return "AutoModelForMaskedLM"
    if named == causal.get(kind) or (not named and kind in causal and kind not in masked):
        return "AutoModelForCausalLM"
    return "AutoModelForMaskedLM" if kind in masked else ""


def offered(settings: Mapping[str, Any]) -> str:
    """The class for which the checkpoint's own code has a model, "" if it has none."""
    auto_map = settings.get("auto_map") or {}
    return next((name for name in AUTO_CLASSES if name in auto_map), "")


def auto_class(settings: Mapping[str, Any]) -> str:
    """The class of transformers whose ``from_pretrained`` loads the checkpoint."""
    return offered(settings) or of_transformers(settings)


def check_masked(name: str, settings: Mapping[str, Any], mask_id: int | None, trusted: bool) -> None:
    """Refuse what cannot be a masked diffusion language model, in a sentence that says what to do.

    Args:
        mask_id: the mask token's id as the config or the tokenizer says; None if none of them has one.
        trusted: whether the checkpoint's own code may be run.

    Raises:
        ValueError: an encoder-decoder, a model without an output layer over the vocabulary, an autoregressive one, one
            without a mask token, or one whose code may not be run.
    """
    kind = architecture(settings) or str(settings.get("model_type") or "a model of no known type")
    native, needs_code = of_transformers(settings), bool(offered(settings))
    if kind == CANVAS:
        raise ValueError(
            f"{name} is DiffusionGemma, which has no masks: load it by transformers.{CANVAS}.from_pretrained, and"
            " sample from it by mdkern.sample_canvas(model, input_ids=...)"
        )
    if settings.get("is_encoder_decoder"):
        raise ValueError(f"{name} ({kind}) is an encoder-decoder: a masked diffusion model is one transformer")
    if needs_code and not trusted and native != "AutoModelForMaskedLM":
        raise ValueError(
            f"{name} ({kind}) comes with code of its own, which is run only if you allow it: read it, then give"
            " trust_remote_code=True (--trust-remote-code)"
        )
    if not needs_code and not native:
        raise ValueError(
            f"{name} ({kind}) is no language model that transformers knows, or has no output layer over a vocabulary:"
            " a masked diffusion model is a masked language model, a decoder made bidirectional, or brings its own code"
        )
    if mask_id is None and not needs_code and native == "AutoModelForCausalLM":
        raise ValueError(
            f"{name} ({kind}) is autoregressive: it writes from left to right and has no mask token. mdkern samples"
            " from masked diffusion models. If this one was made into such a model, give mask_id"
        )
    if mask_id is None:
        raise ValueError(
            f"{name} ({kind}) has no mask token, neither in its config nor in its tokenizer: give mask_id, the id that"
            " it was trained to replace"
        )
