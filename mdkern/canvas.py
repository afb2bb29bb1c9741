"""`sample_canvas`: text from transformers' DiffusionGemma, canvas by canvas, without logits."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mdkern.engine.canvas import CanvasSettings
from mdkern.engine.canvas_run import Texts, Written, keep, padded_length, workspace_for, write_texts
from mdkern.engine.checks import MOST_FLOAT32, check_count, check_flag, check_real
from mdkern.engine.resolve import check_ids, check_mask, check_streamer, resolve_sample_ids, resolve_seed
from mdkern.models.hf.kinds import is_block_diffusion
from mdkern.output import SampleOutput, joined

DEFAULT_BATCH_SIZE = 8  # more is hardly faster, see docs/notes/diffusion-gemma.md
IMAGES = ("pixel_values", "image_position_ids", "mm_token_type_ids")  # what else the encoder takes
DEFAULTS: dict[str, Any] = {  # where neither the call nor the model's generation config has a value, as in transformers
    "max_new_tokens": 256,
    "max_denoising_steps": 48,
    "entropy_bound": 0.1,
    "t_min": 0.4,
    "t_max": 0.8,
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
}


@torch.inference_mode(False)  # what is kept for later calls must not be tensors of inference mode
@torch.no_grad()
def sample_canvas(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    num_samples: int | None = None,
    max_new_tokens: int | None = None,
    max_denoising_steps: int | None = None,
    entropy_bound: float | None = None,
    t_min: float | None = None,
    t_max: float | None = None,
    stability_threshold: int | None = None,
    confidence_threshold: float | None = None,
    batch_size: int | None = None,
    streamer: Any = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    sample_ids: Sequence[int] | Tensor | None = None,
    cuda_graphs: bool = True,
    **inputs: Any,
) -> SampleOutput:
    """Sample from transformers' ``DiffusionGemmaForBlockDiffusion`` as its own ``generate`` does, without its logits.

    A canvas of tokens starts from uniform noise and is denoised in up to `max_denoising_steps` steps: tokens with low
    entropy are accepted, others replaced by fresh noise; the temperature falls from `t_max` to `t_min`. It ends early
    when its most probable tokens are stable and sure, and these are its text. The next canvas follows what is written.
    Arguments that are None have the values of the model's generation config. Each sample depends on the seed, its
    sample number and its prompt, and not on the rest of the batch.

    Args:
        model: a ``DiffusionGemmaForBlockDiffusion``.
        input_ids: int64 ``[N, L]``, prompts. One row is repeated `num_samples` times.
        attention_mask: ``[N, L]`` of 0 and 1, 0 at padding, which must be on the left.
        num_samples: N, for a single prompt.
        max_new_tokens: rounded up to whole canvases.
        max_denoising_steps: of a canvas.
        entropy_bound: of the accepted tokens' entropies, in nats, without the largest.
        t_min, t_max: the temperature falls linearly from nearly `t_max` to `t_min`.
        stability_threshold: steps for which the most probable tokens must have been the same for an early end.
        confidence_threshold: mean entropy in nats, of the tempered distributions, below which an early end is allowed.
        batch_size: texts at a time. Default 8. It changes speed and memory, not samples.
        streamer: as for transformers' ``generate``: ``put`` is given the prompt and each canvas, ``put_draft`` the most
            probable tokens after each step.
        seed, generator, sample_ids, cuda_graphs: as in `mdkern.sample`.
        inputs: images, as the model's processor returns them (``pixel_values``, ``image_position_ids``,
            ``mm_token_type_ids``), for N prompts in one batch.

    Returns:
        `SampleOutput`: ``sequences`` are prompts and whole canvases, padded after the end of text. ``nfe`` counts the
        decoder's passes under ``"H"``.

    Raises:
        ValueError, TypeError: an argument that cannot be right, before any pass.
        FloatingPointError: no token could be drawn for some samples, because their logits were NaN or infinite.
            ``partial`` is the `SampleOutput` of the others.
    """
    began = time.perf_counter()
    if not is_block_diffusion(model):
        raise TypeError(f"sample_canvas needs a DiffusionGemmaForBlockDiffusion, not {type(model).__name__}")
    unknown = sorted(inputs.keys() - set(IMAGES))
    if unknown:
        raise TypeError(f"sample_canvas takes no {', '.join(unknown)}; of other inputs only {', '.join(IMAGES)}")
    inputs = {name: value for name, value in inputs.items() if value is not None}
    config = getattr(model, "generation_config", None)
    given = {
        "max_new_tokens": max_new_tokens,
        "max_denoising_steps": max_denoising_steps,
        "entropy_bound": entropy_bound,
        "t_min": t_min,
        "t_max": t_max,
        "stability_threshold": stability_threshold,
        "confidence_threshold": confidence_threshold,
    }
    new_tokens, settings = resolve_settings(given, config)
    ids, mask = resolve_prompts(model, input_ids, attention_mask, num_samples)
    batch = DEFAULT_BATCH_SIZE if batch_size is None else check_count("batch_size", batch_size)
    numbers = resolve_sample_ids(sample_ids, len(ids), ids.device)
    seed = resolve_seed(seed, generator)
    check_streamer(streamer, len(ids))
    if streamer is not None and (len(ids) > batch or getattr(streamer, "_takes_logits", False)):
        raise ValueError(
            "a streamer needs all samples in one batch (raise batch_size), and must not ask for logits, which there are"
            " none of"
        )
    if inputs and len(ids) > batch:
        raise ValueError(f"images need all {len(ids)} prompts in one batch: raise batch_size from {batch}")
    cuda_graphs = check_flag("cuda_graphs", cuda_graphs)
    canvas_length = int(model.config.canvas_length)
    canvases = -(-new_tokens // canvas_length)
    end_ids, pad_id = end_and_padding(model)
    outputs: list[SampleOutput] = []
    failed: list[tuple[int, int]] = []
    for start in range(0, len(ids), batch):
        part = slice(start, start + batch)
        texts = Texts(ids[part], mask[part], numbers[part], seed, canvases, end_ids, pad_id, inputs)
        room = padded_length(texts, ids.device) + (canvases - 1) * canvas_length
        workspace = workspace_for(model, settings, len(texts.input_ids), room)
        written = write_texts(workspace, texts, cuda_graphs, *streaming(streamer, texts.input_ids))
        keep(model, workspace)
        outputs.append(summarise(texts, written))
        bad = (written.bad >= 0).nonzero()[:, 0].tolist()
        failed += [(int(texts.sample_ids[row]), int(written.bad[row])) for row in bad]
    if streamer is not None:
        streamer.end()
    output = finish(outputs, failed, pad_id or 0, seed)
    output.timings = {"total": time.perf_counter() - began}
    return output


def resolve_settings(given: Mapping[str, Any], config: Any) -> tuple[int, CanvasSettings]:
    """The number of new tokens and the settings: those given, else those of the generation config, else `DEFAULTS`."""
    configured = {name: getattr(config, name, None) for name in DEFAULTS}
    sampler = getattr(config, "sampler_config", None)
    configured["entropy_bound"] = getattr(sampler, "entropy_bound", None)
    values = {}
    for name, default in DEFAULTS.items():
        value = given[name] if given[name] is not None else configured[name]
        values[name] = default if value is None else value
    for name in ("entropy_bound", "t_min", "t_max", "confidence_threshold"):
        values[name] = check_real(name, values[name], 0, MOST_FLOAT32)
    if not values["t_min"] < values["t_max"]:
        raise ValueError(f"t_max must be above t_min, not {values['t_max']} and {values['t_min']}")
    steps = check_count("max_denoising_steps", values["max_denoising_steps"])
    stable = values["stability_threshold"]
    stable = 0 if stable == 0 else check_count("stability_threshold", stable)
    settings = CanvasSettings(
        steps, values["entropy_bound"], values["t_min"], values["t_max"], stable, values["confidence_threshold"]
    )
    return check_count("max_new_tokens", values["max_new_tokens"]), settings


def resolve_prompts(model: Any, input_ids: Any, attention_mask: Any, num_samples: int | None) -> tuple[Tensor, Tensor]:
    """int64 and bool ``[N, L]``."""

    class Named:  # what `check_ids` says of the model
        device = model.lm_head.weight.device

    check_ids("input_ids", input_ids, Named)  # type: ignore[arg-type]
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids must be [N, L] with N and L at least 1, not {tuple(input_ids.shape)}")
    ids = input_ids.to(torch.int64)
    vocab = int(model.config.get_text_config().vocab_size)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab:
        raise ValueError(f"input_ids must lie in 0..{vocab - 1}, but run from {low} to {high}")
    mask = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else check_mask(attention_mask, ids)
    if not bool(mask[:, -1].all()) or bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise ValueError("attention_mask must have padding on the left only (tokenizer.padding_side = 'left')")
    if num_samples is not None and check_count("num_samples", num_samples) != len(ids):
        if len(ids) != 1:
            raise ValueError(f"num_samples={num_samples} does not fit the {len(ids)} rows of input_ids")
        ids, mask = ids.expand(num_samples, -1), mask.expand(num_samples, -1)
    return ids, mask


def end_and_padding(model: Any) -> tuple[tuple[int, ...], int | None]:
    """The ids that end a text, and the one that fills it up: those of the generation config, as in transformers."""
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    ids: tuple[int, ...] = () if ends is None else tuple(ends) if isinstance(ends, list | tuple) else (int(ends),)
    pad = getattr(config, "pad_token_id", None)
    return ids, (ids[0] if ids else None) if pad is None else int(pad)


def streaming(
    streamer: Any, prompts: Tensor
) -> tuple[Callable[[Tensor], None] | None, Callable[[Tensor], None] | None]:
    """What is called after each step and each canvas. The streamer is given the prompts at once."""
    if streamer is None:
        return None, None
    streamer.put(prompts.cpu())
    put_draft = getattr(streamer, "put_draft", None)
    draft = None if put_draft is None else lambda argmax: put_draft(value=argmax.cpu())
    return draft, lambda canvas: streamer.put(canvas.cpu())


def summarise(texts: Texts, written: Written) -> SampleOutput:
    """The output for the texts of a batch that did not fail."""
    own = texts.attention_mask.sum(-1)
    fill = torch.ones_like(written.sequences[:, texts.input_ids.shape[1] :], dtype=torch.bool)
    kept = written.bad < 0
    mask = torch.cat((texts.attention_mask, fill), dim=1)
    return SampleOutput(
        sequences=written.sequences[kept],
        sample_ids=texts.sample_ids[kept],
        nfe={"H": written.passes[kept]},
        tokens_per_forward=((written.lengths - own) / written.passes)[kept],
        steps=written.passes[kept],
        stop_reason=["end_of_text" if ended else "all_revealed" for ended in written.ended[kept].tolist()],
        lengths=written.lengths[kept],
        prompt_lengths=own[kept],
        attention_mask=mask[kept],
    )


def finish(outputs: list[SampleOutput], failed: list[tuple[int, int]], pad_id: int, seed: int) -> SampleOutput:
    """The samples of all batches, filled up to one length.

    Raises:
        FloatingPointError: some samples have failed.
    """
    longest = max(output.sequences.shape[1] for output in outputs if output.sequences is not None)
    for output in outputs:
        assert output.sequences is not None
        assert output.attention_mask is not None
        missing = longest - output.sequences.shape[1]
        output.sequences = torch.nn.functional.pad(output.sequences, (0, missing), value=pad_id)
        output.attention_mask = torch.nn.functional.pad(output.attention_mask, (0, missing), value=True)
    whole: SampleOutput = joined(outputs, torch.cat, sum)
    whole.seed = seed
    if bool(whole.attention_mask.all()):  # type: ignore[union-attr]
        whole.attention_mask = None
    if failed:
        sample, number = failed[0]
        others = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        error = FloatingPointError(
            f"sample {sample}{others}: NaN or infinite logits in pass {number}, so no token could be drawn"
        )
        error.partial = whole  # type: ignore[attr-defined]
        raise error
    return whole


def of_sample(model: Any, arguments: Mapping[str, Any], defaults: Mapping[str, Any]) -> SampleOutput:
    """`mdkern.sample` of such a model: the arguments that both functions have.

    Raises:
        ValueError: an argument that has no effect on canvases.
    """
    changed = {name: value for name, value in arguments.items() if value is not defaults[name]}
    shared = inspect.signature(sample_canvas).parameters
    new = {"steps": "max_denoising_steps"}
    refused = sorted(name for name in changed if new.get(name, name) not in shared and name != "progress")
    if refused or arguments["input_ids"] is None:
        what = f"{', '.join(refused)} cannot be given" if refused else "input_ids must be given"
        raise ValueError(
            f"{what} for a {type(model).__name__}: it writes canvases after a prompt, as its generation config says. "
            "mdkern.sample_canvas has its arguments"
        )
    changed.pop("progress", None)
    return sample_canvas(model, **{new.get(name, name): value for name, value in changed.items()})
