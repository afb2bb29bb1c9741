"""The sampler of canvases: DiffusionGemma's, with everything of a step on the device and no logits.

A canvas of C tokens starts from uniform noise. At each step the model proposes a token for every position; those with
the lowest entropies are accepted, as many as an entropy bound admits (Ben-Hamu et al., 2505.24857), and all others get
fresh noise. The model is also given what it believed at the step before, as expected embeddings (self-conditioning). A
canvas ends with the most probable tokens, when these are stable and sure, or after the last step. The encoder then
reads it, and the next one begins.

`canvas_step` is one step. It runs eagerly, or is captured in a CUDA graph and replayed: the same function either way.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mdkern.kernels import noise, soft_embedding, vocab_projection
from mdkern.models.hf.block_diffusion import BlockDiffusion


@dataclass(frozen=True)
class CanvasSettings:
    """How canvases are sampled, with the names of transformers' ``DiffusionGemmaGenerationConfig``."""

    max_denoising_steps: int
    entropy_bound: float
    t_min: float  # where the temperature ends
    t_max: float  # the first step's
    stability_threshold: int  # steps at which the most probable tokens must have been the same
    confidence_threshold: float  # nats, of the mean entropy

    def temperatures(self, device: torch.device) -> Tensor:
        """float32 ``[N]``, falling from step to step."""
        left = torch.arange(self.max_denoising_steps, 0, -1, dtype=torch.int32, device=device)
        return self.t_min + (self.t_max - self.t_min) * (left / self.max_denoising_steps)


@dataclass(eq=False)
class CanvasState:
    """What a step reads and writes, at fixed addresses. B sequences, canvases of C tokens, at most N steps."""

    seed: Tensor  # int64 []
    step: Tensor  # int64 [1]: number of steps done
    temperatures: Tensor  # float32 [N]
    noise: Tensor  # int64 [N + 1, B, C]: the canvas at the start, and what is not accepted at each step
    keys: Tensor  # int64 [B * C, 3]
    rows: Tensor  # int64 [B * C]: all of them
    positions: Tensor  # int32 [1, C], columns
    canvas: Tensor  # int64 [B, C]
    argmax: Tensor  # int64 [B, C]: the most probable tokens of the last step
    accepted: Tensor  # bool [B, C]: at the last step
    history: Tensor  # int64 [k, B, C]: the most probable tokens of the k steps before, in a ring
    soft: Tensor  # [B, C, D]: expected embeddings of the last step
    finished: Tensor  # bool [B]: the canvas is done
    passes: Tensor  # int64 [B]: forward passes of the decoder
    bad: Tensor  # int64 [B]: the first step, from 0 over all canvases, at which no token could be drawn; -1: none
    left: Tensor  # int64 [1]: canvases that are not done, 0 after the last step

    @classmethod
    def allocate(cls, network: BlockDiffusion, settings: CanvasSettings, count: int) -> CanvasState:
        length, device = network.canvas_length, network.device

        def whole(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            seed=whole(),
            step=whole(1),
            temperatures=settings.temperatures(device),
            noise=whole(settings.max_denoising_steps + 1, count, length),
            keys=whole(count * length, 3),
            rows=torch.arange(count * length, device=device),
            positions=whole(1, length, dtype=torch.int32),
            canvas=whole(count, length),
            argmax=whole(count, length),
            accepted=whole(count, length, dtype=torch.bool),
            history=whole(settings.stability_threshold, count, length),
            soft=whole(count, length, network.table.shape[1], dtype=network.table.dtype),
            finished=whole(count, dtype=torch.bool),
            passes=whole(count),
            bad=whole(count),
            left=whole(1),
        )

    def begin_text(self, seed: int) -> None:
        self.seed.fill_(seed)
        self.passes.zero_()
        self.bad.fill_(-1)

    def begin_canvas(self, sample_ids: Tensor, starts: Tensor, column: int, vocab: int, done: Tensor) -> None:
        """Start a canvas.

        Args:
            sample_ids: int64 ``[B]``.
            starts: int64 ``[B]``: number of tokens before the canvas, padding not counted.
            column: the canvas's first column.
            done: bool ``[B]``: texts that have ended and are not worked on.
        """
        length = self.canvas.shape[1]
        place = torch.arange(length, device=self.canvas.device)
        position = starts[:, None] + place
        sample = sample_ids[:, None].expand_as(position)
        step = torch.arange(self.noise.shape[0], device=place.device)[:, None, None]
        self.noise.copy_(noise.uniform_ids(self.seed, sample, position, step, vocab))
        self.keys.copy_(torch.stack((sample, position, torch.zeros_like(sample)), -1).view(-1, 3))
        self.positions.copy_(place + column)
        self.canvas.copy_(self.noise[0])
        self.argmax.copy_(self.noise[0])
        self.accepted.zero_()
        self.history.fill_(-1)
        self.soft.zero_()
        self.finished.copy_(done)
        self.left.copy_((~done).sum())
        self.step.zero_()

    def bytes(self) -> int:
        return sum(getattr(self, field.name).nbytes for field in fields(self))


def admitted(entropy: Tensor, bound: float) -> Tensor:
    """bool ``[B, C]``: the positions of lowest entropy, as many as have ``sum - largest <= bound``, at least one."""
    ascending, order = entropy.sort(dim=-1, stable=True)
    return torch.zeros_like(entropy, dtype=torch.bool).scatter_(-1, order, ascending.cumsum(-1) - ascending <= bound)


def canvas_step(network: BlockDiffusion, state: CanvasState, settings: CanvasSettings, cache: Any, masks: Any) -> None:
    """One denoising step of all canvases that are not finished. Finished ones stay as they are."""
    count, length = state.canvas.shape
    hidden = network.hidden(state.canvas, state.soft, state.positions, masks, cache).flatten(0, 1)
    temperature = state.temperatures.index_select(0, state.step).expand(count * length).contiguous()
    state.keys[:, 2] = state.step
    drawn = vocab_projection(
        hidden,
        network.weight,
        network.bias,
        state.rows,
        temperature,
        state.seed,
        state.keys,
        soft_cap=network.soft_cap,
        want_entropy=True,
        want_argmax=True,
        of="sampler",
    )
    assert drawn.entropy is not None
    assert drawn.argmax is not None
    token, entropy = drawn.token.view(count, length), drawn.entropy.view(count, length)
    open_ = ~state.finished[:, None]
    fresh = state.noise.index_select(0, state.step + 1)[0]
    accepted = admitted(entropy, settings.entropy_bound) & (token >= 0)
    failed = (token < 0).any(-1) & ~state.finished
    state.bad.copy_(torch.where(failed & (state.bad < 0), state.passes, state.bad))
    state.canvas.copy_(torch.where(open_, torch.where(accepted, token, fresh), state.canvas))
    state.accepted.copy_(accepted)
    argmax = torch.where(open_, drawn.argmax.view(count, length).clamp(min=0), state.argmax)
    state.argmax.copy_(argmax)
    state.passes.add_(~state.finished)
    sure = entropy.mean(-1) < settings.confidence_threshold
    if settings.stability_threshold:
        sure = sure & (state.history == argmax).all(-1).all(0)
        state.history.index_copy_(0, state.step % settings.stability_threshold, argmax[None])
    state.finished.logical_or_(sure)
    state.finished.logical_or_(failed)
    soft = soft_embedding(
        hidden,
        network.weight,
        network.bias,
        drawn.logsumexp,
        temperature,
        None if network.table is network.weight else network.table,
        soft_cap=network.soft_cap,
    )
    state.soft.copy_(soft.view_as(state.soft))
    state.step.add_(1)
    state.left.copy_((~state.finished).sum() * (state.step < settings.max_denoising_steps))
