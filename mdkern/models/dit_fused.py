"""`DiT.hidden` for inference on a GPU: the same computation in fewer passes over memory.

Without time conditioning, `fold` puts the norms into the weights (`kernels.backbone.folded_norm`), which it may also
round to 8 bits (`dit_fp8`), and the first block's queries, keys and values of each id into a table, once for each call
of `sample`. What each part gains, and what was tried and left out: docs/notes/backbone.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdkern.kernels.backbone import attention as in_16_bits
from mdkern.kernels.backbone import attention_fp8 as in_fp8
from mdkern.kernels.backbone import linear as products
from mdkern.kernels.backbone.folded_norm import fold_norm
from mdkern.kernels.backbone.linear_fp8 import scaled_gelu, scaled_heads, scaled_residual, scaled_rotary
from mdkern.kernels.backbone.modulated_norm import gathered_norm, modulated_norm, runs_fused
from mdkern.kernels.backbone.quantise import FP8, quantise_columns, quantised_norm
from mdkern.kernels.backbone.rotary import gathered_qkv, rotary
from mdkern.kernels.device import is_hopper
from mdkern.kernels.invariant import rows_to_choose_by
from mdkern.models import dit_fp8
from mdkern.models.block_causal import mask_at
from mdkern.models.denoiser import PREPARED
from mdkern.models.dit_fp8 import QuantisedBlock
from mdkern.models.soft import soften

if TYPE_CHECKING:
    from mdkern.models.dit import Block, DiT, Modulation


def covers(model: DiT) -> bool:
    """Whether `hidden` may be used in place of the modules as they are now.

    This needs 16-bit parameters on a GPU with Triton, no gradients, no autocast, no compiler, and only our own modules:
    hooks and replaced layers (adapters, quantised layers) would be skipped.
    """
    embedding = model.embedding
    return (
        embedding.dtype in (torch.bfloat16, torch.float16)
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cuda")
        and runs_fused(embedding)
        and all(is_plain(module) for module in model.modules())
    )


def is_plain(module: nn.Module) -> bool:
    """Whether a module's parameters tell all that it computes: it is a module of ours or of PyTorch's, unchanged.

    Hooks (weight and spectral norm are hooks), parametrisations, adapters, a replaced ``forward``, and parameters of a
    subclass of tensors (quantised, distributed) mean that the module must be called. Global hooks, on all modules at
    once, are assumed only to observe, like PyTorch's counter of operations.
    """
    from mdkern.models import dit  # which imports this module

    kinds = (dit.DiT, dit.Block, dit.ModulatedNorm, dit.Modulation, dit.TimeEmbedding, nn.Linear, nn.ModuleList)
    return (
        type(module) in kinds
        and not is_hooked(module)
        and all(type(parameter) in (nn.Parameter, Tensor, type(None)) for parameter in module._parameters.values())
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does anything besides its class's ``forward``, or something else instead."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__


class Folded(NamedTuple):
    """A layer with the norm before it folded in, see `mdkern.kernels.backbone.folded_norm`. It is a tuple so that
    `mdkern.engine.graphs` finds its addresses."""

    weight: Tensor
    bias: Tensor


class FoldedBlock(NamedTuple):
    """The two layers of a block whose input is a norm. In the first block the first one is not folded."""

    attn_qkv: Folded | None
    mlp_up: Folded


class Folds(NamedTuple):
    """What is computed from the weights once for each call of `sample`."""

    qkv: Tensor | None  # [V, 3 D]: the first block's queries, keys and values of each id, not rotated
    blocks: tuple[FoldedBlock | QuantisedBlock, ...]

    @property
    def precision(self) -> str | None:
        """Of the blocks: "fp8", or None for the model's own."""
        return "fp8" if isinstance(self.blocks[0], QuantisedBlock) else None


class Kept(NamedTuple):
    """What `PREPARED` holds of a model."""

    own: Folds | None = None  # of the model's dtype
    fp8: Folds | None = None


LARGEST_TABLE = 1 << 28  # most bytes of `Folds.qkv`
TABLE_PART = 1 << 14  # rows of `Folds.qkv` that are computed at a time


def fold(model: DiT, rows: int, precision: str | None = None) -> Folds | None:
    """`room_for` a model's folds, and `fill` it."""
    folds = room_for(model, rows, precision)
    if folds is not None:
        fill(model, folds)
    return folds


def room_for(model: DiT, rows: int, precision: str | None = None) -> Folds | None:
    """Memory for the blocks' folded layers and the first block's table, for `fill`.

    They take as much memory as the layers themselves (in e4m3 half of it), and up to 256 MiB for the table. They are
    kept, at the same addresses, as long as the model exists on its device, or until `mdkern.engine.graphs.clear`. In
    float16, products of weight and modulation below 6e-5 lose bits. None if `hidden` would not use them: for numbers of
    rows that `linear.folds` refuses, with time conditioning, and on other cards than Hopper's; in e4m3 for passes of
    fewer than 4,096 rows on a GPU.
    """
    if not covers(model) and (precision is None or model.embedding.is_cuda):
        PREPARED.pop(model, None)
        return None
    if not (pays(rows, model.embedding) if precision == "fp8" else folds_fit(model, rows)):
        return None
    kept: Kept = PREPARED.get(model) or Kept()
    field = precision or "own"
    folds: Folds | None = getattr(kept, field)
    device = model.embedding.device
    if (
        folds is None
        or folds.blocks[0].mlp_up.weight.device != device
        or sizes(folds) != sizes(room(model, "meta", precision))
    ):
        with torch.inference_mode(False):  # later calls may be outside of inference mode
            folds = room(model, device, precision)
            PREPARED[model] = kept._replace(**{field: folds})
    return folds


def fill(model: DiT, folds: Folds) -> None:
    """Compute the folds from the present weights."""
    for number, (block, folded) in enumerate(zip(cast("list[Block]", list(model.blocks)), folds.blocks)):
        parts = modulation(block.modulation, None)
        shift1, scale1, _, shift2, scale2, _ = parts
        if number == 0 and folds.qkv is not None:
            for ids, qkv in zip(model.embedding.split(TABLE_PART), folds.qkv.split(TABLE_PART)):
                torch.mm(modulated_norm(ids, block.norm1.weight, shift1, scale1), block.attn_qkv.weight.T, out=qkv)
        if isinstance(folded, QuantisedBlock):
            dit_fp8.quantise_block(block, parts, folded)
            continue
        if folded.attn_qkv is not None:
            fold_norm(block.attn_qkv.weight, None, block.norm1.weight, shift1, scale1, out=folded.attn_qkv)
        fold_norm(block.mlp_up.weight, block.mlp_up.bias, block.norm2.weight, shift2, scale2, out=folded.mlp_up)


def pays(rows: int, x: Tensor) -> bool:
    """Whether e4m3 is used in a pass over so many rows: where that is faster, and always on a CPU."""
    return rows_to_choose_by(rows) >= products.FEWEST_ROWS or not x.is_cuda


def room(model: DiT, device: torch.device | str, precision: str | None = None) -> Folds:
    """Uninitialised memory for the folds of a model."""
    blocks = cast("list[Block]", list(model.blocks))
    embedding, qkv = model.embedding, blocks[0].attn_qkv.weight
    table = embedding.new_empty((len(embedding), len(qkv)), device="meta")
    return Folds(
        table.new_empty(table.shape, device=device) if table.nbytes <= LARGEST_TABLE else None,
        tuple(
            dit_fp8.room(block, device, attention=bool(number))
            if precision == "fp8"
            else FoldedBlock(new_fold(block.attn_qkv, device) if number else None, new_fold(block.mlp_up, device))
            for number, block in enumerate(blocks)
        ),
    )


def new_fold(layer: nn.Linear, device: torch.device | str) -> Folded:
    shape = layer.weight.shape
    return Folded(*(layer.weight.new_empty(size, device=device) for size in (shape, shape[:1])))


def sizes(folds: Folds) -> list[tuple[torch.Size, torch.dtype] | None]:
    tensors = [folds.qkv, *dit_fp8.tensors_of(folds.blocks)]
    return [None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors]


def folds_fit(model: DiT, rows: int) -> bool:
    """Whether folds, other than those in e4m3, are used in a pass over so many rows."""
    config = model.config
    return (
        model.time_embedding is None
        and is_hopper(model.embedding.device)
        and products.folds(rows, config.width, model.rotary[0], config.num_heads)
    )


class Operands(NamedTuple):
    """The operands of a product: normed rows and a layer, or the stream, its sums and a folded layer."""

    rows: Tensor
    weight: Tensor
    bias: Tensor | None
    sums: Tensor | None = None


class Stream:
    """The residual stream ``[N, D]``. The last sublayer's update may be left to the next norm."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.sums: Tensor | None = None  # `folded_norm.row_sums` of its rows, if they are known
        self.update: Tensor | None = None
        self.gate: Tensor | None = None

    def add(self, rows: Tensor, layer: nn.Linear, gate: Tensor, sums: bool = False) -> None:
        """``x += gate * layer(rows)``, now or in the next norm. If it is done now, `sums` also sums the new rows."""
        self.sums = None
        if products.adds_in_place(rows, layer.weight, gate, sums):
            self.sums = products.sums_of_stream(self.x) if sums else None
            products.linear_residual(self.x, rows, layer.weight, layer.bias, gate, sums=self.sums)
        else:
            self.update, self.gate = layer(rows), gate

    def norm(self, weight: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        normed = modulated_norm(self.x, weight, shift, scale, update=self.update, gate=self.gate)
        self.update = self.gate = None
        return normed

    def into(self, layer: nn.Linear, norm: Tensor, shift: Tensor, scale: Tensor, folded: Folded | None) -> Operands:
        """The operands of the product of `layer` with the norm of the stream."""
        if folded is not None and self.sums is not None:
            return Operands(self.x, *folded, self.sums)
        return Operands(self.norm(norm, shift, scale), layer.weight, layer.bias)


def hidden(
    model: DiT,
    input_ids: Tensor,
    condition: Tensor | None,
    positions: Tensor | None,
    mask: Tensor | None,
    folds: Folds | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """`DiT.hidden` with the time embedded, ``condition [B, cond_dim]``; `mask` as of `block_causal.with_padding`.

    `folds` must have been made from the present weights, which is not checked.
    """
    batch, length = input_ids.shape
    if folds is not None:
        fp8 = folds.precision == "fp8"
        folds = folds if (pays(batch * length, input_ids) if fp8 else folds_fit(model, batch * length)) else None
    stream = None
    whole = model.config.block_causal is None  # whether every query of a text sees the same
    arrived = in_16_bits.new_arrivals(batch, length, model.config.num_heads, input_ids.device) if whole else None
    head_dim = model.config.width // model.config.num_heads
    attends_in_fp8 = mask is None and in_fp8.fits(input_ids.device, length, model.config.width, head_dim)
    blocks = cast("list[Block]", list(model.blocks))
    for number, block in enumerate(blocks):
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(block.modulation, condition)
        folded = None if folds is None else folds.blocks[number]
        last = number + 1 == len(blocks)
        pruned = positions is not None and last
        if attends_in_fp8 and stream is not None and isinstance(folded, QuantisedBlock) and not pruned:
            add_quantised(stream, quantised_attention(model, stream, folded, length), block, gate1, folded)
            continue
        kinds, rotated = (2, 1) if pruned else (3, 2)  # how many of queries, keys and values
        if stream is None:
            soft = None if weight is None else soft_rows(model, input_ids, weight, positions)
            stream, qkv = first_qkv(model, block, input_ids, kinds, rotated, shift1, scale1, folds, soft)
        elif isinstance(folded, QuantisedBlock):
            qkv = quantised_qkv(model, stream, folded, kinds, rotated, length)
        else:
            operands = stream.into(block.attn_qkv, block.norm1.weight, shift1, scale1, folded and folded.attn_qkv)
            qkv = qkv_of(block, operands, kinds, rotated, model.rotary, length)
        *queries, key, value = qkv.view(batch, length, kinds, block.num_heads, -1).unbind(2)
        if positions is not None and pruned:
            first = torch.arange(0, batch * length, length, device=positions.device)[:, None]
            x, normed = gathered_norm(stream.x, (first + positions).flatten(), block.norm1.weight, shift1, scale1)
            stream = Stream(x)
            queries, mask = [queries_at(block, normed, positions, model.rotary)], mask_at(mask, positions)
            folded = None if isinstance(folded, QuantisedBlock) else folded
        attended = attend(queries[0], key, value, mask, arrived).view(stream.x.shape)
        if isinstance(folded, QuantisedBlock):
            add_quantised(stream, attended, block, gate1, folded)
            continue
        stream.add(attended, block.attn_out, gate1, sums=folded is not None)
        up = stream.into(block.mlp_up, block.norm2.weight, shift2, scale2, folded and folded.mlp_up)
        assert up.bias is not None
        mlp = products.linear_gelu(up.rows, up.weight, up.bias, sums=up.sums)
        stream.add(mlp, block.mlp_down, gate2, sums=folded is not None and not last)
    assert stream is not None
    return stream.norm(model.norm_final.weight, *modulation(model.modulation_final, condition)).unflatten(
        0, (batch, -1)
    )


def quantised_qkv(model: DiT, stream: Stream, block: QuantisedBlock, kinds: int, rotated: int, length: int) -> Tensor:
    """`qkv_of` the norm of the stream, in e4m3."""
    assert block.attention is not None
    columns, heads = kinds * model.config.width, rotated * model.config.num_heads
    weight, scale, bias = (part[-columns:] for part in block.attention.qkv)
    cos, sin = model.rotary
    rows, dtype = quantised_norm(stream.x), stream.x.dtype
    return scaled_rotary(rows, weight, scale, bias, cos, sin, heads=heads, length=length, dtype=dtype)


def quantised_attention(model: DiT, stream: Stream, block: QuantisedBlock, length: int) -> Tensor:
    """Attention over the norm of the stream, all in e4m3, ``[N, D]`` times its level."""
    assert block.attention is not None
    rows, weight = quantised_norm(stream.x), block.attention.qkv.weight
    heads, values = scaled_heads(rows, weight, *block.attention.levelled, *model.rotary, length=length)
    return in_fp8.attention_fp8(heads, values, block.attention.softmax)


def add_quantised(stream: Stream, attended: Tensor, block: Block, gate: Tensor, folded: QuantisedBlock) -> None:
    """Add to the stream what comes after attention: its projection, and the MLP, in e4m3."""
    if folded.attention is None:
        products.linear_residual(stream.x, attended, block.attn_out.weight, block.attn_out.bias, gate)
    else:
        if attended.dtype != FP8:
            attended = quantise_columns(attended, folded.attention.level)
        scaled_residual(stream.x, attended, *folded.attention.out)
    units = scaled_gelu(quantised_norm(stream.x), *folded.mlp_up, folded.level)
    scaled_residual(stream.x, units, *folded.mlp_down)


def modulation(module: Modulation, condition: Tensor | None) -> tuple[Tensor, ...]:
    """The parts of a modulation as ``[D]``, or ``[B, D]`` with time conditioning."""
    return tuple(part.squeeze(1) if part.ndim == 3 else part for part in module(condition))


def first_qkv(
    model: DiT,
    block: Block,
    input_ids: Tensor,
    kinds: int,
    rotated: int,
    shift: Tensor,
    scale: Tensor,
    folds: Folds | None,
    soft: Tensor | None,
) -> tuple[Stream, Tensor]:
    """The stream at its beginning, and `qkv_of` the first block, from the table if there is one.

    `soft` are the embeddings as rows, if they are not those of the ids.
    """
    ids, length = input_ids.flatten(), input_ids.shape[1]
    if soft is not None:
        operands = Operands(modulated_norm(soft, block.norm1.weight, shift, scale), block.attn_qkv.weight, None)
        return Stream(soft), qkv_of(block, operands, kinds, rotated, model.rotary, length)
    if folds is not None and folds.qkv is not None:
        table = folds.qkv[:, -kinds * model.config.width :]
        cos, sin = model.rotary
        x, qkv = gathered_qkv(model.embedding, table, ids, cos, sin, heads=rotated * block.num_heads, length=length)
        return Stream(x), qkv
    x, normed = gathered_norm(model.embedding, ids, block.norm1.weight, shift, scale)
    operands = Operands(normed, block.attn_qkv.weight, None)
    return Stream(x), qkv_of(block, operands, kinds, rotated, model.rotary, length)


def soft_rows(model: DiT, input_ids: Tensor, weight: Tensor, positions: Tensor | None) -> Tensor:
    """`soft.soften` of the ids' embeddings, as rows ``[B * L, D]``."""
    mask = model.embedding[model.config.mask_id]
    return soften(model.embedding[input_ids], mask, weight, positions).flatten(0, 1)


def qkv_of(
    block: Block, operands: Operands, kinds: int, rotated: int, tables: tuple[Tensor, Tensor], length: int
) -> Tensor:
    """The last `kinds` of queries, keys and values, ``[N, kinds * D]``; the first `rotated` of these are rotated."""
    rows, weight, bias, sums = operands
    columns = kinds * rows.shape[1]
    bias = None if bias is None else bias[-columns:]
    heads = rotated * block.num_heads
    return products.linear_rotary(rows, weight[-columns:], *tables, heads=heads, length=length, bias=bias, sums=sums)


def queries_at(block: Block, normed: Tensor, positions: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Queries ``[B, R, H, head_dim]`` of the rows at `positions`."""
    query = F.linear(normed, block.attn_qkv.weight[: normed.shape[1]]).unflatten(-1, (block.num_heads, -1))
    rotary(query, *tables, positions=positions.flatten())
    return query.unflatten(0, positions.shape)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, arrived: Tensor | None = None) -> Tensor:
    """Attention of ``[B, L, H, head_dim]`` each, of any strides -> ``[B, Lq, H * head_dim]``.

    With `arrived`, the counters of `kernels.backbone.attention`, that runs where it pays. Its `mask` then is that of
    padding, ``[B, 1, 1, L]``.
    """
    if arrived is not None and in_16_bits.pays(query, key, value, mask):
        return in_16_bits.attention(query, key, value, arrived, None if mask is None else mask[:, 0, 0])
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
