"""Runs transformers' `DiffusionGemmaForBlockDiffusion` without its logits: the encoder with a cache that stays in
place, and the decoder from a canvas of ids and soft embeddings to hidden states.

The model's own code is run, and nothing in it is changed.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from mdkern.models.fingerprint import Snapshot, describe
from mdkern.models.hf.lean import lean_copy


class SoftInput:
    """Stands for the logits of the step before in the decoder's forward: their expected embedding is known already.

    The decoder computes ``torch.matmul(logits.softmax(...).to(...), embedding)`` and scales it.
    """

    def __init__(self, soft: Tensor) -> None:
        self.soft = soft

    def softmax(self, **_: Any) -> SoftInput:
        return self

    def to(self, *_: Any, **__: Any) -> SoftInput:
        return self

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        if function is torch.matmul and isinstance(args[0], SoftInput):
            return args[0].soft
        raise TypeError(
            f"the model's decoder uses its self-conditioning in {function}, which this version of mdkern does not know"
        )


class InPlace:
    """A layer of keys and values in one tensor of fixed size, of which the model is given the part that is filled.

    The tensor's address depends on the number of tokens alone, so that a captured pass can be replayed.
    """

    room: int
    filled: int
    cumulative_length: int
    window: int  # tokens of the past that are seen, all if it is `room`
    beside: dict[tuple[int, int], Tensor]  # of all layers of a cache, see `with_canvas`
    keys: Tensor
    values: Tensor
    is_initialized: bool

    def start(self, room: int, window: int | None, beside: dict[tuple[int, int], Tensor]) -> None:
        self.room, self.window, self.beside = room, room if window is None else window - 1, beside
        self.held: Tensor | None = None  # [2, B, room, H, head_dim]
        self.place(0)

    def place(self, end: int) -> None:
        """Say that `end` tokens are filled: for a new text, or after a pass that was replayed or broke off."""
        self.filled = self.cumulative_length = end
        self.is_initialized = end > 0
        if self.held is not None:
            self.keys, self.values = self.held[:, :, max(0, end - self.window) : end].transpose(2, 3)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values ``[B, H, n, head_dim]``; what these tokens attend to."""
        if self.held is None:
            shape = key_states.shape
            self.held = key_states.new_zeros(2, shape[0], self.room, shape[1], shape[3])
        before, end = self.filled, self.filled + key_states.shape[2]
        for held, new in zip(self.held, (key_states, value_states)):
            held[:, before:end] = new.transpose(1, 2)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.place(end)
        seen, values_seen = self.held[:, :, max(0, before - self.window) : end].transpose(2, 3)
        return seen, values_seen

    def with_canvas(self, length: int) -> tuple[Tensor, Tensor]:
        """Room for a canvas behind a copy of what it sees of the past; the layers of a cache share it.

        Returns:
            ``[2, B, length + 1, H, head_dim]``, where the canvas's keys and values are to be written, and ``[2, B, H,
            seen + length, head_dim]``, what it attends to then.
        """
        assert self.held is not None
        batch, _, heads, depth = self.held.shape[1:]
        key, columns = (heads, depth), min(self.room, self.window) + length + 1
        if key not in self.beside or self.beside[key].shape[2] < columns:
            self.beside[key] = self.held.new_empty(2, batch, columns, heads, depth)
        first = max(0, self.filled - self.window)
        seen, beside = self.filled - first, self.beside[key]
        beside[:, :, :seen] = self.held[:, :, first : self.filled]
        return beside[:, :, seen : seen + length + 1], beside[:, :, : seen + length].transpose(2, 3)


class WholeLayer(InPlace, DynamicLayer):  # type: ignore[misc]
    """All tokens."""


class WindowLayer(InPlace, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """The last ``sliding_window - 1`` tokens, beside those that are added."""


def parts_of(model: Any) -> tuple[nn.Module, ...]:
    return model.lm_head, model.model.encoder, model.model.decoder


def settings_of(model: Any) -> Hashable:
    configs = model.config, model.config.get_text_config()
    return *(describe(vars(config)) for config in configs), model.final_logit_softcapping


class BlockDiffusion:
    """A `DiffusionGemmaForBlockDiffusion` as the sampler of canvases runs it.

    It holds modules of the model, and not the model, so that it may be kept for as long as the model exists.
    """

    def __init__(self, model: Any) -> None:
        """
        Raises:
            ValueError: an output layer that is not a plain linear one.
        """
        self.config = model.config
        self.settings = settings_of(model)
        self.parts = parts_of(model)
        self.snapshot = Snapshot(*self.parts)
        text = self.config.get_text_config()
        self.vocab_size, self.canvas_length = int(text.vocab_size), int(self.config.canvas_length)
        head = model.lm_head
        if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks:
            raise ValueError(
                f"the model's output layer must be a plain linear one, not {type(head).__name__} with adapters or hooks"
            )
        self.head: nn.Linear = head
        self.embedding: nn.Module = model.model.decoder.embed_tokens
        encoder, decoder = model.model.encoder, model.model.decoder
        fast = self.device.type == "cuda"
        self.encoder: Any = lean_copy(encoder) if fast else encoder
        self.decoder: Any = lean_copy(decoder) if fast else decoder
        self.soft_cap = float(model.final_logit_softcapping or 0.0)

    def is_still(self, model: Any) -> bool:
        """Whether this is how the model is run now, too: nothing of it was replaced, hooked, moved or set anew."""
        same = all(mine is its for mine, its in zip(self.parts, parts_of(model)))
        return same and settings_of(model) == self.settings and self.snapshot.still_holds()

    @property
    def weight(self) -> Tensor:
        return self.head.weight

    @property
    def bias(self) -> Tensor | None:
        return None if self.head.bias is None else self.head.bias.float()

    @property
    def table(self) -> Tensor:
        """The embeddings, which may be the output layer's weight."""
        table: Tensor = self.embedding.weight  # type: ignore[assignment]
        return table

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def new_cache(self, room: int) -> DynamicCache:
        """An empty cache for up to `room` tokens of each sequence."""
        cache = DynamicCache(config=self.config.get_text_config())
        layers: list[Any] = []
        beside: dict[tuple[int, int], Tensor] = {}
        given: list[Any] = list(cache.layers)
        for layer in given:
            if getattr(layer, "is_sliding", False):
                own: Any = WindowLayer(sliding_window=layer.sliding_window)
                own.start(room, layer.sliding_window, beside)
            else:
                own = WholeLayer()
                own.start(room, None, beside)
            layers.append(own)
        cache.layers = layers
        return cache

    def encoder_masks(self, ids: Tensor, attention_mask: Tensor | None, cache: Any, inputs: Mapping[str, Any]) -> Any:
        """The encoder's masks for new ids ``[B, n]``, by kind of layer; None where the attention is plainly causal.

        `attention_mask` is bool ``[B, filled + n]``, of all tokens so far; None: all are seen.
        """
        return self.encoder.create_masks_for_generate(
            config=self.config,
            inputs_embeds=torch.empty((*ids.shape, 0), dtype=self.weight.dtype, device=ids.device),
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=None if attention_mask is None else self.encoder_positions(ids, cache),
            mm_token_type_ids=inputs.get("mm_token_type_ids"),
        )

    def encoder_positions(self, ids: Tensor, cache: Any) -> Tensor:
        """int32 ``[1, n]``: the columns of new ids."""
        filled = cache.layers[0].filled
        return torch.arange(filled, filled + ids.shape[1], dtype=torch.int32, device=ids.device)[None]

    def encode(self, ids: Tensor, masks: Any, cache: Any, inputs: Mapping[str, Any]) -> None:
        """Run the encoder over new ids ``[B, n]`` and put their keys and values into the cache.

        Args:
            masks: those of `encoder_masks`.
            inputs: what else the encoder is given: images.
        """
        positions = self.encoder_positions(ids, cache)
        self.encoder(
            input_ids=ids.contiguous(), attention_mask=masks, past_key_values=cache, position_ids=positions, **inputs
        )

    def masks(self, batch: int, attention_mask: Tensor | None, cache: Any) -> dict[str, Tensor | None]:
        """The decoder's masks by kind of layer; None where everything is seen.

        `attention_mask` is bool, of the tokens in the cache and of the canvas; None: everything is seen.
        """
        dummy = torch.empty(batch, self.canvas_length, 0, dtype=self.weight.dtype, device=self.device)
        made: dict[str, Tensor | None] = self.decoder.create_diffusion_decoder_attention_mask(
            config=self.config,
            inputs_embeds=dummy,
            past_key_values=cache,
            decoder_attention_mask=attention_mask,
        )
        return made

    def hidden(self, canvas: Tensor, soft: Tensor, positions: Tensor, masks: Any, cache: Any) -> Tensor:
        """Hidden states ``[B, C, D]`` of a canvas of ids ``[B, C]``, given soft embeddings ``[B, C, D]``."""
        output = self.decoder(
            decoder_input_ids=canvas,
            past_key_values=cache,
            self_conditioning_logits=SoftInput(soft),
            decoder_attention_mask=masks,
            decoder_position_ids=positions,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden
