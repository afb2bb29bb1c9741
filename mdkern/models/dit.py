"""MDLM's denoiser (Sahoo et al., 2406.07524): a bidirectional transformer with adaLN blocks and rotary positions.

With `DiTConfig.block_causal` it is bidirectional inside blocks of the text only.

It is split into `DiT.hidden` (ids -> hidden states) and a head, so that the head runs only at the rows that need it.
The last block computes queries, attention and MLP at the wanted rows only; keys and values are needed everywhere.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdkern.kernels.device import attention_priority
from mdkern.models import dit_fused
from mdkern.models.block_causal import block_mask, mask_at, with_padding
from mdkern.models.soft import soften

VOCAB_MULTIPLE = 128  # 50,258 columns cost cuBLAS 2.8x the time of 50,304 (H200, bf16, 16,384 rows)
TIME_FREQUENCIES = 256
MOST_POSITIONS = 1 << 20  # beyond this, the error of rotary angles in float32 is more than 0.06
LARGEST_SIDE = 1 << 20
TIME_NOISE_EPS = 1e-3  # MDLM's log-linear noise: sigma(t) = -log(1 - (1 - eps) t)


@dataclass(frozen=True)
class DiTConfig:
    """Shape of a `DiT`.

    Attributes:
        vocab_size: number of ids, the mask included.
        mask_id: the id of a position that is not yet revealed.
        eos_id: the id of the end of text, several such ids, or None.
        max_length: longest sequence that the model is meant for.
        num_blocks, width, num_heads, mlp_ratio: the transformer's shape; ``width % num_heads == 0``.
        time_conditioning: whether the blocks are given the diffusion time. If not, the modulation is constant.
        cond_dim: width of the time embedding.
        tie_head: whether the head's weight is the embedding.
        block_causal: length of the blocks of a model that sees the blocks up to a position's own
            (`mdkern.models.block_causal`); None: attention to the whole text. Without time conditioning only, because
            what is computed of a finished block is the same at all later times.
    """

    vocab_size: int
    mask_id: int
    eos_id: int | tuple[int, ...] | None = None
    max_length: int = 1024
    num_blocks: int = 12
    width: int = 768
    num_heads: int = 12
    mlp_ratio: int = 4
    time_conditioning: bool = False
    cond_dim: int = 128
    tie_head: bool = False
    block_causal: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type == "bool" and not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false, not {value!r}")
            if field.type not in ("int", "int | None") or (value is None and field.default is None):
                continue
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise ValueError(f"{name} must be a whole number, not {value!r}")
            if name != "mask_id" and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
            object.__setattr__(self, name, int(value))  # JSON takes none of NumPy's
        if self.max_length > MOST_POSITIONS:
            raise ValueError(f"max_length must be at most {MOST_POSITIONS}, not {self.max_length}")
        if max(self.mlp_ratio, self.cond_dim) > LARGEST_SIDE:
            raise ValueError(f"mlp_ratio and cond_dim must be at most {LARGEST_SIDE}")
        if self.width % self.num_heads or (self.width // self.num_heads) % 2:
            raise ValueError(f"width {self.width} must split into {self.num_heads} heads of an even size")
        if not 0 <= self.mask_id < self.vocab_size:
            raise ValueError(f"mask_id {self.mask_id} must lie in 0..{self.vocab_size - 1}")
        if self.block_causal is not None and self.time_conditioning:
            raise ValueError("block_causal needs time_conditioning=False: finished blocks are computed once")
        if isinstance(self.eos_id, list):  # JSON has no tuples
            object.__setattr__(self, "eos_id", tuple(self.eos_id))

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def rotary_table(length: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 ``[length, head_dim / 2]``."""
    if device.type == "meta":  # whose arithmetic is written in Python, with imports that take a second
        cos, sin = torch.empty((2, length, head_dim // 2), dtype=torch.float32, device=device)
        return cos, sin
    frequency = 10_000.0 ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of ``x [B, H, L, head_dim]``; dimension i is paired with i + head_dim / 2."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.cat(turned, dim=-1).to(x.dtype)


def gather_rows(x: Tensor, positions: Tensor) -> Tensor:
    """``x [B, L, D]`` at ``positions [B, R]`` -> ``[B, R, D]``."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


class Modulation(nn.Module):
    """adaLN's shifts, scales and gates: a linear map of the time embedding, or constants without time conditioning."""

    def __init__(self, parts: int, config: DiTConfig) -> None:
        super().__init__()
        self.parts = parts
        size = parts * config.width
        self.weight = nn.Parameter(torch.zeros(size, config.cond_dim)) if config.time_conditioning else None
        self.bias = nn.Parameter(torch.zeros(size))
        if parts == 6 and not config.time_conditioning:  # constant gates start at 1
            with torch.no_grad():
                self.bias.view(6, -1)[[2, 5]] = 1.0

    def forward(self, condition: Tensor | None) -> tuple[Tensor, ...]:
        """`parts` tensors ``[B, 1, D]`` (``[D]`` without time conditioning)."""
        if self.weight is None:
            return self.bias.chunk(self.parts)
        assert condition is not None
        return F.linear(condition, self.weight, self.bias)[:, None].chunk(self.parts, dim=-1)


class ModulatedNorm(nn.Module):
    """Layer normalisation with a weight and no bias, then adaLN's ``x * (1 + scale) + shift``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        if shift.ndim == 1:  # constant modulation becomes the norm's weight and bias
            return F.layer_norm(x, self.weight.shape, self.weight * (1 + scale), shift)
        return torch.addcmul(shift, F.layer_norm(x, self.weight.shape, self.weight), 1 + scale)


class Block(nn.Module):
    """Attention and MLP, each behind adaLN: ``x + gate * f(norm(x, shift, scale))``."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.norm1 = ModulatedNorm(config.width)
        self.attn_qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.attn_out = nn.Linear(config.width, config.width, bias=False)
        self.norm2 = ModulatedNorm(config.width)
        self.mlp_up = nn.Linear(config.width, config.mlp_ratio * config.width)
        self.mlp_down = nn.Linear(config.mlp_ratio * config.width, config.width)
        self.modulation = Modulation(6, config)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, L, D] -> [B, H, L, head_dim]

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        condition: Tensor | None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """``[B, L, D] -> [B, L, D]``, or ``[B, R, D]`` at ``positions [B, R]``; `mask` as of `with_padding`."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)
        normed = self.norm1(x, shift1, scale1)
        at_positions = None
        if positions is not None:
            x, mask = gather_rows(x, positions), mask_at(mask, positions)
            at_positions = rotary[0][positions][:, None], rotary[1][positions][:, None]
        query, key, value = self.heads(normed, rotary, positions, at_positions)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.finish(x, attended, gate1, shift2, scale2, gate2)

    def heads(
        self,
        normed: Tensor,
        rotary: tuple[Tensor, Tensor],
        positions: Tensor | None = None,
        query_rotary: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of ``normed [B, L, D]``, ``[B, H, L, head_dim]`` each; the first two are rotated.

        With ``positions [B, R]``, the queries are ``[B, H, R, head_dim]`` and rotated by `query_rotary`.
        """
        if positions is not None and dit_fused.is_plain(self.attn_qkv):
            width = normed.shape[-1]
            query_weight, key_value_weight = self.attn_qkv.weight.split([width, 2 * width])
            query = F.linear(gather_rows(normed, positions), query_weight)
            key, value = F.linear(normed, key_value_weight).chunk(2, dim=-1)
        else:  # a hook or adapter changes what it computes, so it must be called
            query, key, value = self.attn_qkv(normed).chunk(3, dim=-1)
            query = query if positions is None else gather_rows(query, positions)
        query, key, value = map(self.split_heads, (query, key, value))
        return rotate(query, *(query_rotary or rotary)), rotate(key, *rotary), value

    def finish(
        self, x: Tensor, attended: Tensor, gate1: Tensor, shift2: Tensor, scale2: Tensor, gate2: Tensor
    ) -> Tensor:
        """The block's output from its input ``x [B, R, D]`` and its attention's result ``[B, H, R, head_dim]``."""
        x = torch.addcmul(x, gate1, self.attn_out(attended.transpose(1, 2).flatten(2)))
        mlp = self.mlp_down(F.gelu(self.mlp_up(self.norm2(x, shift2, scale2)), approximate="tanh"))
        return torch.addcmul(x, gate2, mlp)


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of the noise level sigma(t), then a two-layer MLP."""

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(TIME_FREQUENCIES, cond_dim)
        self.out = nn.Linear(cond_dim, cond_dim)

    def forward(self, t: Tensor) -> Tensor:
        """``t [B]`` in (0, 1] -> ``[B, cond_dim]``."""
        sigma = -torch.log1p(-(1 - TIME_NOISE_EPS) * t.float())
        return self.from_sigma(sigma)

    def from_sigma(self, sigma: Tensor) -> Tensor:
        half = TIME_FREQUENCIES // 2
        frequency = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=sigma.device) / half)
        angle = sigma[:, None] * frequency
        wave = torch.cat((angle.cos(), angle.sin()), dim=-1).to(self.up.weight.dtype)
        return F.silu(self.out(F.silu(self.up(wave))))


class DiT(nn.Module):
    """The denoiser: embedding, blocks, final norm and head. Parameters are initialised for training from scratch."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        vocab = config.padded_vocab_size
        self.embedding = nn.Parameter(torch.empty(vocab, config.width).normal_(std=0.02))
        self.time_embedding = TimeEmbedding(config.cond_dim) if config.time_conditioning else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.norm_final = ModulatedNorm(config.width)
        self.modulation_final = Modulation(2, config)
        self.head_weight = self.embedding if config.tie_head else nn.Parameter(torch.zeros(vocab, config.width))
        self.head_bias = nn.Parameter(torch.zeros(vocab))
        self.rotary = rotary_table(config.max_length, config.width // config.num_heads, self.embedding.device)
        for name, parameter in self.blocks.named_parameters():
            if parameter.ndim == 2 and "modulation" not in name:
                residual = name.endswith(("attn_out.weight", "mlp_down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.num_blocks) if residual else 0.02)
            elif name.endswith("bias") and "modulation" not in name:
                nn.init.zeros_(parameter)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DiT:
        """Move or cast the model. The rotary tables move with it but stay float32, so they cannot be buffers.

        Why they are tables: docs/notes/training.md.
        """
        super()._apply(fn, recurse)
        head_dim = self.config.width // self.config.num_heads
        self.rotary = rotary_table(self.config.max_length, head_dim, self.embedding.device)
        return self

    def hidden(
        self,
        input_ids: Tensor,
        t: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        folds: dit_fused.Folds | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """The head's input: ``[B, L, D]``, or ``[B, R, D]`` at ``positions [B, R]``. See `Denoiser.hidden`.

        With ``weight [B, R]``, the inputs at `positions` are mixtures of tokens and the mask (`mdkern.models.soft`).

        Inference in 16 bits on a GPU uses `dit_fused`, which computes the same in fewer passes over memory, and in
        still fewer with `folds`, which `dit_fused.fold` makes from the present weights.
        """
        in_fp8 = folds is not None and folds.precision == "fp8"  # on a CPU, too
        if not dit_fused.covers(self) and not (in_fp8 and not input_ids.is_cuda):
            return self.plain_hidden(input_ids, t, positions, attention_mask, weight=weight)
        mask = with_padding(self.own_mask(input_ids.shape[1]), attention_mask)
        with attention_priority(input_ids.device):
            return dit_fused.hidden(self, input_ids, self.condition(t), positions, mask, folds, weight)

    def own_mask(self, length: int) -> Tensor | None:
        """What each position of a text sees, bool ``[L, L]``; None: everything."""
        block_length = self.config.block_causal
        return None if block_length is None else block_mask(length, block_length, self.embedding.device)

    def condition(self, t: Tensor | None) -> Tensor | None:
        """The embedded time ``[B, cond_dim]``; None without time conditioning."""
        if self.time_embedding is None:
            return None
        if t is None:
            raise ValueError("t must be given: this DiT is time-conditioned")
        return self.time_embedding(t)

    def plain_hidden(
        self,
        input_ids: Tensor,
        t: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        position: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """`hidden` by calling the modules, in PyTorch's own operators: for training, compilation and comparison.

        Args:
            input_ids, t, positions, attention_mask, weight: as in `hidden`.
            attn_mask: bool ``[L, L]`` (query, key), what each column sees. Default: what the config says.
            position: int64 ``[L]``, the place in its text of each column, below ``max_length``. Default: 0..L-1.
        """
        condition = self.condition(t)
        cos, sin = self.rotary
        length = input_ids.shape[1]
        rotary = (cos[:length], sin[:length]) if position is None else (cos[position], sin[position])
        mask = with_padding(self.own_mask(length) if attn_mask is None else attn_mask, attention_mask)
        x = soften(self.embedding[input_ids], self.embedding[self.config.mask_id], weight, positions)
        with attention_priority(x.device):
            for block in self.blocks[:-1]:
                x = block(x, rotary, condition, None, mask)
            x = self.blocks[-1](x, rotary, condition, positions, mask)
        return self.norm_final(x, *self.modulation_final(condition))

    def logits(self, hidden: Tensor) -> Tensor:
        """``[..., D] -> [..., V]`` over the padded vocabulary, ``-inf`` at the mask and at padded ids."""
        return F.linear(hidden, self.head_weight) + self.suppressed_bias()

    def suppressed_bias(self) -> Tensor:
        """The head's bias, float32 ``[V]``, with ``-inf`` at ids that must never be drawn."""
        ids = torch.arange(self.head_bias.shape[0], device=self.head_bias.device)
        never = (ids >= self.config.vocab_size) | (ids == self.config.mask_id)
        return self.head_bias.float().masked_fill(never, -math.inf)

    def forward(self, input_ids: Tensor, t: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """Logits ``[B, L, V]``, float32."""
        return self.logits(self.hidden(input_ids, t, None, attention_mask)).float()

    def save_pretrained(self, directory: str | os.PathLike[str], max_shard_size: str = "5GB") -> None:
        """Write ``config.json`` and safetensors (sharded when larger than `max_shard_size`), whole or not at all."""
        from mdkern.models.checkpoint import save_dit

        save_dit(self, directory, max_shard_size)

    @staticmethod
    def from_pretrained(
        name_or_path: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> DiT:
        """Load what `save_pretrained` wrote, or a checkpoint laid out as MDLM's own. See `mdkern.models.load_dit`."""
        from mdkern.models.checkpoint import load_dit

        return load_dit(name_or_path, dtype, device)

    def flops(self, length: int, rows: int) -> int:
        """Floating-point operations of one sequence's forward pass with the head at `rows` rows.

        Only matrix products count (2 for a multiply-add), with the last block's queries, output and MLP at `rows` rows.
        What `dit_fused` looks up in a table is counted as the product that it replaces.
        """
        width, ratio = self.config.width, self.config.mlp_ratio
        key_value = 2 * length * width * 2 * width
        per_row = 2 * width * width * (2 + 2 * ratio) + 4 * length * width  # q, out, MLP; attention
        blocks = self.config.num_blocks * key_value + ((self.config.num_blocks - 1) * length + rows) * per_row
        conditioning = 0
        if self.config.time_conditioning:
            modulated = (6 * self.config.num_blocks + 2) * width
            conditioning = 2 * self.config.cond_dim * (TIME_FREQUENCIES + self.config.cond_dim + modulated)
        return blocks + conditioning + 2 * rows * width * self.config.padded_vocab_size
