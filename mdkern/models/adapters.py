"""`adapt`: makes denoisers of models, split into backbone and head where possible; other models run by their logits."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
from torch import nn

from mdkern.models.denoiser import Denoiser, available_device, ids_of, is_whole
from mdkern.models.dit import DiT
from mdkern.models.dit_denoiser import DiTDenoiser
from mdkern.models.float8_head import with_head_precision
from mdkern.models.hf.adapted import LogitsDenoiser
from mdkern.models.hf.introspect import (
    SHIFTED,
    block_setting,
    check_evaluating,
    end_of_text,
    execution_device,
    first_setting,
    longest_input,
    model_type,
    own_blocks,
    wrapped_model,
)
from mdkern.models.hf.kinds import is_block_diffusion
from mdkern.models.hf.probe import examine
from mdkern.models.hf.split import SplitDenoiser


def adapt(
    model: Any,
    *,
    vocab_size: int | None = None,
    mask_id: int | None = None,
    eos_id: int | Sequence[int] | None = None,
    max_length: int | None = None,
    num_blocks: int | None = None,
    device: torch.device | str | None = None,
    shifted: bool | None = None,
    block_causal: int | None = None,
    allow_causal: bool = False,
    precision: str | None = None,
    head_precision: str | None = None,
    name: str | None = None,
) -> Denoiser:
    """Make a `Denoiser` of a model.

    A module with ``get_output_embeddings``, such as those of Hugging Face, is split: its own forward runs up to its
    output layer, which mdkern then runs at the wanted positions only. What the model can do is found out here by a few
    passes over a few ids, once for each model. If it can't be split it runs by its logits, and a warning says why. The
    denoiser's `repr` tells what was found out.

    Args:
        model: a `DiT`; a Hugging Face masked language model; any callable from ids int64 ``[B, L]`` to logits
            ``[B, L, V]`` (it is also given ``t`` ``[B]`` or ``attention_mask`` ``[B, L]`` if it has parameters of
            those names); or a `Denoiser`, which is returned as it is. Wrappers of data parallelism and of weight
            averaging are taken off, and so is that of torch.compile around a DiT.
        vocab_size: V. Needed for callables; taken from the model's config otherwise.
        mask_id: the mask token's id. Needed for callables, and for Hugging Face models whose config has none.
        eos_id: an id that ends a text, or several; taken from the model's config and generation config otherwise.
        max_length: most positions of a sequence; for a DiT at most its own.
        num_blocks: as in `Denoiser`.
        device: the device of a callable's ids; taken from a module's parameters otherwise.
        shifted: whether the logits at a position are for the token of the next one, as in models that were
            autoregressive. Position i then uses the logits at i - 1, or its own at the start of a text. None: True if
            the config's ``model_type`` is Dream's or Fast-dLLM v2's.
        block_causal: B, for a Hugging Face model whose position i sees the columns below ``(i // B + 1) * B``: its own
            block and those before it. The model's attention is replaced by that. None: taken from the config of SDAR,
            LLaDA 2 and Fast-dLLM v2.
        allow_causal: also take a model that sees only what is to the left of a position, or nothing beyond the
            position's block, or whose config says that it was made for blocks. It then runs with the attention of its
            own forward.
        precision: "fp8": a `DiT` without time conditioning computes most of its products in 8 bits (e4m3), which is
            faster and less accurate; see `mdkern.models.dit_fp8` for what is rounded and how. On a GPU passes over
            4,096 positions or more do so, smaller ones gain nothing and stay in 16 bits; on a CPU all do, for
            comparison. A model built like Llama, in bfloat16 on a GPU, computes all products of its blocks so, with
            copies of their weights that take half as much memory. "bf16" or None: products are in the dtype of the
            weights.
        head_precision: "fp8": the output layer's weight is rounded to 8 bits (e4m3) with a scale for each id, so that a
            pass with few rows to sample reads half of the bytes; hidden states keep their dtype, so that many rows gain
            nothing. The model's own weight is not changed, and the copy takes half of its memory more; each call of
            `sample` makes it anew. "bf16" or None: the weight as it is.
        name: its name in messages.

    Raises:
        TypeError: not a model.
        ValueError: a `precision` or `head_precision` that the model can't run in; a `vocab_size` or `mask_id` that is
            missing, impossible or contradicts the model's own; `shifted` or `allow_causal` for a DiT or a `Denoiser`; a
            model in training mode, or a causal one; attention that cannot be made block-causal; a device that does not
            exist or is not the model's.
    """
    for argument, value in (("max_length", max_length), ("num_blocks", num_blocks), ("block_causal", block_causal)):
        if value is not None and (not is_whole(value) or value < 1):
            raise ValueError(f"{argument} must be a whole number of at least 1, not {value!r}")
    for argument, asked in (("precision", precision), ("head_precision", head_precision)):
        if asked not in (None, "bf16", "fp8"):
            raise ValueError(f"{argument} must be 'bf16' (that of the weights) or 'fp8', not {asked!r}")
    model = without_wrappers(model)
    if isinstance(model, Denoiser | DiT):
        own = model if isinstance(model, Denoiser) else model.config
        given = {"vocab_size": vocab_size, "mask_id": mask_id, "num_blocks": num_blocks, "block_causal": block_causal}
        check_same(own, **given)
        where = model.device if isinstance(model, Denoiser) else model.embedding.device
        check_placed(model, where, device, shifted, allow_causal)
    if isinstance(model, Denoiser):
        check_same(model, max_length=max_length, name=name)
        if eos_id is not None:
            check_same(model, eos_ids=ids_of("eos_id", eos_id, model.vocab_size, model.mask_id))
        if precision is not None and precision != (model.precision or "bf16"):
            raise ValueError(f"precision={precision!r} must be given where the model is adapted, not for a Denoiser")
        denoiser = model
    elif isinstance(model, DiT):
        denoiser = DiTDenoiser(model, name, eos_id, max_length, precision)
    else:
        described = describe(model, vocab_size, mask_id, eos_id, max_length, num_blocks, shifted, name)
        denoiser = of_callable(model, described, device, block_causal, allow_causal, precision)
    return denoiser if head_precision is None else with_head_precision(denoiser, head_precision)


def describe(
    model: Any,
    vocab_size: int | None,
    mask_id: int | None,
    eos_id: int | Sequence[int] | None,
    max_length: int | None,
    num_blocks: int | None,
    shifted: bool | None,
    name: str | None,
) -> dict[str, Any]:
    """What is known of a module or a function before it is run, as arguments of `AdaptedDenoiser`."""
    if isinstance(model, str | PathLike):
        raise TypeError(f"model must be loaded first: mdkern.from_pretrained({str(model)!r})")
    if not callable(model):
        raise TypeError(f"model must be a DiT, a masked language model or a callable, not {type(model).__name__}")
    if is_block_diffusion(model):
        raise TypeError(f"{type(model).__name__} writes canvases without a mask token: give it to mdkern.sample_canvas")
    check_evaluating(model)
    vocab_size, mask_id = known_ids(model, vocab_size, mask_id)
    return {
        "vocab_size": vocab_size,
        "mask_id": mask_id,
        "eos_ids": ids_of("eos_id", eos_id, vocab_size, mask_id) or end_of_text(model, vocab_size, mask_id),
        "max_length": max_length if max_length is not None else longest_input(model),
        "num_blocks": num_blocks if num_blocks is not None else first_setting(model, "num_hidden_layers", "n_layers"),
        "shifted": model_type(model) in SHIFTED if shifted is None else shifted,
        "name": name or str(getattr(model, "__name__", type(model).__name__)),
    }


def of_callable(
    model: Any,
    described: dict[str, Any],
    device: torch.device | str | None,
    block_causal: int | None,
    allow_causal: bool,
    precision: str | None,
) -> Denoiser:
    """The denoiser of a module or a function, split if it can be."""
    name, in_fp8 = described["name"], "fp8" if precision == "fp8" else None
    if in_fp8 and not isinstance(model, nn.Module):
        kinds = "mdkern's own DiT and models built like Llama"
        raise ValueError(f"precision={precision!r} is for {kinds}, not for a {type(model).__name__}")
    if isinstance(model, nn.Module) and device is not None:
        check_placed(model, execution_device(model) or torch.device(device), device)
    if block_causal is not None and allow_causal:
        raise ValueError("allow_causal keeps the model's own attention, and block_causal replaces it: give one of them")
    blocks = block_causal if block_causal is not None or allow_causal else own_blocks(model)
    anatomy = examine(model, described["vocab_size"], described["max_length"], device, blocks)
    if blocks is not None and anatomy.reason:
        raise ValueError(
            f"{name} cannot be run with block-causal attention, because {anatomy.reason}: load it with"
            " attn_implementation='sdpa', on one device"
        )
    if not allow_causal and blocks is None:
        check_direction(name, block_setting(model), anatomy.direction)
    if not anatomy.reason:
        split = SplitDenoiser(model, anatomy, precision=in_fp8, **described)
        split.check_precision()
        return split
    reason = anatomy.reason if isinstance(model, nn.Module) else ""  # a function is not expected to be split
    denoiser = LogitsDenoiser(model, reason=reason, padding=anatomy.padding, device=device, **described)
    if in_fp8:
        raise ValueError(f"precision={precision!r} is not for {name}, which {denoiser.description}")
    slow = "the output layer is computed at every position of every forward pass"
    warnings.warn(f"{name} {denoiser.description}: {slow}", stacklevel=3)
    return denoiser


def without_wrappers(model: Any) -> Any:
    """The model without wrappers of data parallelism, weight averaging and compilation."""
    inside = wrapped_model(model)
    kinds = nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel
    compiled = hasattr(model, "_orig_mod") and isinstance(without_wrappers(inside), DiT)
    return without_wrappers(inside) if compiled or isinstance(model, kinds) else model


def check_same(own: Any, **given: Any) -> None:
    """Refuse arguments that contradict the model."""
    for argument, value in given.items():
        if value is not None and value != getattr(own, argument):
            said = getattr(own, argument)
            has = "the model, which has none" if said is None else f"the model's own {said}"
            raise ValueError(f"{argument}={value} contradicts {has}")


def check_placed(
    model: Any,
    own: torch.device,
    device: torch.device | str | None,
    shifted: bool | None = None,
    allow_causal: bool = False,
) -> None:
    """Refuse what would have no effect: another device than the model's, `shifted` or `allow_causal` where it can't."""
    if allow_causal:
        raise ValueError(
            f"allow_causal must not be given for a {type(model).__name__}: it is taken with its own attention"
        )
    if shifted:
        raise ValueError(f"shifted must not be given for a {type(model).__name__}: its states are in their places")
    if device is not None:
        asked = available_device(device)
        if asked.type != own.type or asked.index not in (None, own.index):
            raise ValueError(f"device={asked} is not where the model is, {own}: move it by model.to({str(asked)!r})")


def check_direction(name: str, configured: tuple[str, int] | None, observed: str) -> None:
    """Refuse models that do not see the whole text."""
    if configured is None and not observed:
        return
    seen, length = observed, "B"
    if configured is not None:
        setting, length = configured[0], str(configured[1])
        seen = f"was made for attention by blocks of {length} ({setting} in its config)"
    raise ValueError(
        f"{name} {seen}, while a masked diffusion model needs attention to all of a text, on both sides of a position,"
        " or to the blocks up to a position's own. If it was trained for the latter, adapt(model, …, block_causal="
        f"{length}) runs it so. If it has been made bidirectional, switch its causal mask off. With allow_causal=True"
        " it runs as it is"
    )


def known_ids(model: Any, vocab_size: Any, mask_id: Any) -> tuple[int, int]:
    """`vocab_size` and `mask_id`, as given or from the config, checked."""
    given = {
        "vocab_size": vocab_size if vocab_size is not None else first_setting(model, "vocab_size"),
        "mask_id": mask_id if mask_id is not None else first_setting(model, "mask_token_id"),
    }
    missing = [argument for argument, value in given.items() if value is None]
    if missing:
        kind, inside = type(model).__name__, wrapped_model(model)
        call = f"mdkern.adapt(model, {', '.join(f'{argument}=…' for argument in missing)})"
        hint = " (tokenizer.mask_token_id, if it has one)" if missing == ["mask_id"] else ""
        where = "" if inside is None else f"; or adapt the {type(inside).__name__} inside it"
        raise ValueError(f"{missing[0]} must be given: {kind} does not tell it. Write {call}{hint}{where}")
    for argument, value in given.items():
        if not is_whole(value):
            raise ValueError(f"{argument} must be a whole number, not {value!r}")
    columns, mask = int(given["vocab_size"]), int(given["mask_id"])
    if columns < 1:
        raise ValueError(f"vocab_size must be at least 1, not {columns}")
    if not 0 <= mask <= columns:
        raise ValueError(f"mask_id must lie in 0..{columns} for logits of {columns} columns, not {mask}")
    return columns, mask
