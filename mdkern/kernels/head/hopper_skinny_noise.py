"""The warps of `hopper_skinny` that draw the noise of the next groups."""

# mypy: ignore-errors
# ruff: noqa: N803, N806

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from mdkern.kernels import triton_noise as noise
from mdkern.kernels.gluon_common import ring_advance
from mdkern.kernels.head.triton_projection import MIXED
from mdkern.kernels.triton_common import GROUP_SIZE, load_keys, load_row_count

NOISE_STAGES = gl.constexpr(2)  # number of groups whose noise is drawn ahead


@gluon.jit
def in_whole(group, first_id):
    """A group's number in the whole vocabulary, by which the noise is keyed."""
    place = group
    if first_id is not None:
        place = group + first_id // GROUP_SIZE
    return place


@gluon.jit
def _group_race(seed, keys, group):
    """``1 / exponential`` of a group for each row."""
    sample, position, step = keys
    w0, w1, w2, w3 = noise.random_words(seed, sample, position, step, (sample * 0) + (group >> 1), noise.GROUP)
    odd = (group & 1) == 1
    return noise.inverse_exponential(gl.where(odd, w2, w0), gl.where(odd, w3, w1))


@gluon.jit
def _token_noise(seed, keys, pair):
    """The Gumbel noise of ``[32]`` pairs of ids for all rows: ``[64, ROWS]``."""
    sample, position, step = keys
    w0, w1, w2, w3 = noise.random_words(
        seed, sample[None, :], position[None, :], step[None, :], gl.expand_dims(pair, 1), noise.TOKEN
    )
    both = gl.join(noise.gumbel(w0, w1), noise.gumbel(w2, w3)).permute(0, 2, 1)
    return both.reshape(2 * pair.shape[0], sample.shape[0])


@gluon.jit
def produce_noise(
    keys,
    row_count,
    seed,
    capacity,
    draws,
    program,
    groups,
    first_id,
    PROGRAMS: gl.constexpr,
    MODE: gl.constexpr,
):
    """The producer warps of noise: for all rows, the race of each group and the noise of its ids."""
    races, noises, drawn, used = draws
    ROWS: gl.constexpr = races.shape[1]
    by_row: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    pairs: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [4, 1], [1, 0])  # pairs of ids, which a Philox call serves
    if MODE == MIXED:
        seed_value = gl.load(seed)
        count = load_row_count(row_count, capacity)
        group_row = gl.arange(0, ROWS, layout=by_row)
        token_row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, pairs))
        group_keys = load_keys(keys, group_row, group_row < count)
        token_keys = load_keys(keys, token_row, token_row < count)
        pair = gl.arange(0, GROUP_SIZE // 2, layout=gl.SliceLayout(1, pairs))
        noise_stage = program * 0
        phase = noise_stage + 1
        for group in range(program, groups, PROGRAMS):
            place = in_whole(group, first_id)
            race = _group_race(seed_value, group_keys, place)
            token_noise = _token_noise(seed_value, token_keys, pair + place * (GROUP_SIZE // 2))
            mbarrier.wait(used.index(noise_stage), phase)
            races.index(noise_stage).store(race)
            noises.index(noise_stage).store(token_noise)
            mbarrier.arrive(drawn.index(noise_stage))
            noise_stage, phase = ring_advance(noise_stage, phase, NOISE_STAGES)
