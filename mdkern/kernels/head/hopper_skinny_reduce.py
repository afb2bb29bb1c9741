"""The second kernel of `hopper_skinny`: merges the programs' records of each row and writes the outputs."""

# mypy: ignore-errors
# ruff: noqa: N803

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_wait

from mdkern.kernels.head.triton_projection import MIXED
from mdkern.kernels.head.triton_reduce import RECORD, write_outputs, write_record
from mdkern.kernels.triton_common import LOG2E, LOWEST, NOWHERE, flip_order, halves, load_row_count


@gluon.jit
def _largest(x):
    """The largest number of a vector, found as integers, for which a warp has an instruction."""
    return flip_order(gl.max(flip_order(x.to(gl.int32, bitcast=True)), 0)).to(gl.float32, bitcast=True)


@gluon.jit
def _numbers(records):
    """Split ``[SPLITS, RECORD]`` into vectors, without moving a register."""
    left, right = halves(records)
    a, b = halves(left)
    c, d = halves(right)
    top, total = a.split()
    moment, second = b.split()
    score, token = c.split()
    logit, top_id = d.split()
    return (
        top, total, moment, second, score, token.to(gl.int32, bitcast=True), logit, top_id.to(gl.int32, bitcast=True),
    )  # fmt: skip


@gluon.jit(do_not_specialize=["capacity"])
def vocab_projection_skinny_reduce_kernel(
    records,  # [M, PROGRAMS, RECORD]
    row_count,
    temperature,
    uniform_temperature,
    token_out,
    log_prob,
    logsumexp,
    top1,
    top2,
    entropy,
    argmax,
    shard_records,  # [M, RECORD], written instead of the outputs unless it is None
    capacity,
    PROGRAMS: gl.constexpr,
    SPLITS: gl.constexpr,  # a power of two, at least PROGRAMS
    MODE: gl.constexpr,
    WANT_TOP: gl.constexpr,
    WANT_ENTROPY: gl.constexpr,
    WANT_ARGMAX: gl.constexpr,
    OF_SAMPLER: gl.constexpr,
):
    """Each warp has one row, and its lanes read whole records: `triton_reduce._merge` for one row.

    The records are those of `mdkern.kernels.head.sharded`, one for each program.
    """
    row = gl.program_id(0)
    count = load_row_count(row_count, capacity)
    value = uniform_temperature
    if temperature is not None:
        value = gl.load(temperature + row, mask=row < count, other=1.0)
    inv_temperature = gl.where(value == 0.0, 0.0, 1.0 if OF_SAMPLER else 1.0 / value)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [gl.num_warps(), 1], [1, 0])
    split = gl.expand_dims(gl.arange(0, SPLITS, layout=gl.SliceLayout(1, layout)), 1)
    number = gl.expand_dims(gl.arange(0, RECORD, layout=gl.SliceLayout(0, layout)), 0)
    at = records + (row * PROGRAMS + split) * RECORD + number
    gdc_wait()
    found = gl.load(at, mask=(split < PROGRAMS) & (row < count), other=0.0)

    tops, totals, moments, seconds, scores, tokens, logits, top_ids = _numbers(found)
    split = gl.arange(0, SPLITS, layout=tops.type.layout)
    tops = gl.where(split < PROGRAMS, tops, LOWEST)
    top = _largest(tops)
    offset = top * LOG2E
    shift = tops * LOG2E - offset
    rescale = gl.exp2(shift)
    if MODE == MIXED:
        scores = gl.where(inv_temperature == 0.0, scores, scores * gl.exp2(shift * inv_temperature))
    scores = gl.where(split < PROGRAMS, scores, -float("inf"))
    best = _largest(scores)
    tokens = gl.where(scores == best, tokens, NOWHERE)
    token = gl.min(tokens, 0)
    logit = _largest(gl.where(tokens == token, logits, -float("inf")))
    total = gl.sum(totals * rescale, 0)
    moment = gl.sum((moments + totals * shift) * rescale, 0)
    top_id = gl.min(gl.where(tops == top, top_ids, NOWHERE), 0)
    place = gl.min(gl.where(tops == top, split, NOWHERE), 0)
    second = _largest(gl.where(split == place, seconds, tops))
    if shard_records is not None:
        write_record(
            shard_records, row, row < capacity, row < count, top, total, moment, second, best, token, logit, top_id
        )
    else:
        write_outputs(
            row, row < capacity, row < count, token, logit, top, total, moment, second, top_id, token_out, log_prob,
            logsumexp, top1, top2, entropy, argmax, WANT_TOP, WANT_ENTROPY, WANT_ARGMAX,
        )  # fmt: skip
