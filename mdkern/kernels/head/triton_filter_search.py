"""Which logits of a row the filters keep: those at or above one value, the threshold, which is found without sorting.

The threshold of `top_k` is the largest value such that k logits are at or above it; that of `top_p` is the largest
value such that the logits at or above it hold p of the probability. It is one search with two measures, a number or a
mass. An interval is known that holds the threshold. Each survey of the row measures the logits at or above eight values
of this interval, most of them close to where interpolation expects the threshold. After one or two surveys only a few
thousand logits are left in the interval. They are collected, some by each thread, and the search continues among them,
collecting what is left each time, until all that are left are equal.
"""

# mypy: ignore-errors
# ruff: noqa: N803, RUF005

import triton
import triton.language as tl

from mdkern.kernels.triton_common import LOG2E, LOWEST, flip_order

PIVOTS = tl.constexpr(8)
PER_LANE = tl.constexpr(32)  # places of each lane for collected logits
FILL = tl.constexpr(12)  # most places used on average, so that it is rare for one of 512 lanes to have too few


@triton.jit
def _ordered(value):
    """float32 as int32 in the same order."""
    return flip_order(value.to(tl.int32, bitcast=True))


@triton.jit
def _unordered(key):
    return flip_order(key).to(tl.float32, bitcast=True)


@triton.jit
def next_float(value):
    return _unordered(_ordered(value) + 1)


@triton.jit
def _halfway(low, high):
    """The middle of two floats by their ordered bits, with which bisection ends whatever their values are."""
    low_key, high_key = _ordered(low).to(tl.int64), _ordered(high).to(tl.int64)
    return _unordered(((low_key + high_key) >> 1).to(tl.int32))


@triton.jit
def _first_pivots(low, top):
    """`low` itself, to measure the whole row; then values at distances from the top, in nats, for text and noise."""
    return (low, top - 0.5, top - 1.5, top - 3.0, top - 5.0, top - 7.5, top - 11.0, top - 16.0)


@triton.jit
def _next_pivots(low, high, measure_low, measure_high, goal, BY_MASS: tl.constexpr):
    """Values strictly between `low` and `high`: the middle, and values around the interpolated place of `goal`."""
    if BY_MASS:
        part = (measure_low - goal) / (measure_low - measure_high)
    else:  # the number of logits above a value falls about exponentially with the value
        log_low, log_high = tl.log2(measure_low), tl.log2(tl.maximum(measure_high, 0.5))
        part = (log_low - tl.log2(goal)) / (log_low - log_high)
    part = tl.where((part >= 0.0) & (part <= 1.0), part, 0.5)
    span = high - low
    far = span > 64.0  # only suppressed ids are so improbable, so look near the upper end, at growing distances
    middle = tl.where(far, high - 4.0, low + span * part)
    pivots = (_halfway(low, high), middle)
    step, distance = span, 4.0 + 0.0 * span
    for _ in tl.static_range((PIVOTS - 2) // 2):
        step = step * 0.25
        near, distant = distance * 4.0, distance * 16.0
        distance = distant
        pivots = pivots + (tl.where(far, high - near, middle - step), tl.where(far, high - distant, middle + step))
    least, most = next_float(low), _unordered(_ordered(high) - 1)
    bounded = ()
    for j in tl.static_range(PIVOTS):
        bounded = bounded + (tl.minimum(tl.maximum(pivots[j], least), most),)
    return bounded


@triton.jit
def _narrow(pivots, measures, goal, low, high, measure_low, measure_high):
    """Narrow the interval to the highest value that reaches the goal and the lowest one that does not."""
    for j in tl.static_range(PIVOTS):
        rise = (measures[j] >= goal) & (pivots[j] > low)
        fall = (measures[j] < goal) & (pivots[j] < high)
        low, measure_low = tl.where(rise, pivots[j], low), tl.where(rise, measures[j], measure_low)
        high, measure_high = tl.where(fall, pivots[j], high), tl.where(fall, measures[j], measure_high)
    return low, high, measure_low, measure_high


@triton.jit
def _add_eight(a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7


@triton.jit
def _least_and_most(a_least, a_most, b_least, b_most):
    return tl.minimum(a_least, b_least), tl.maximum(a_most, b_most)


@triton.jit
def _quarters(x):
    """Split ``[4 * n]`` into four of ``[n]`` without moving a register, as each thread holds four neighbours."""
    left, right = x.reshape(x.shape[0] // 4, 2, 2).split()
    a, b = left.split()
    c, d = right.split()
    return (a, b, c, d)


@triton.jit
def _weight(x, top, BY_MASS: tl.constexpr):
    if BY_MASS:
        return tl.exp2((x - top) * LOG2E)
    else:
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def _survey(row, width, top, pivots, BY_MASS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """The measure of the logits at or above each pivot. The order of the sums does not depend on the pivots."""
    measures = ()
    for _ in tl.static_range(PIVOTS):
        measures = measures + (tl.zeros([LANES], tl.float32),)
    within = tl.arange(0, ROWS)[:, None] * (4 * LANES) + tl.arange(0, 4 * LANES)[None, :]
    for start in range(0, width, ROWS * LANES * 4):
        x = tl.load(row + start + within, mask=start + within < width, other=LOWEST)
        weight = _weight(x, top, BY_MASS)
        more = ()
        for j in tl.static_range(PIVOTS):
            part = tl.where(x >= pivots[j], weight, 0.0).reshape(ROWS, LANES, 4)
            more = more + (measures[j] + tl.sum(tl.sum(part, 2), 0),)  # within threads, which hold four neighbours
        measures = more
    return tl.reduce(measures, 0, _add_eight)


@triton.jit
def _append(x, collected, lane, low, high, state, LANES: tl.constexpr):
    """Put the logits in ``[low, high)`` into the next places of their lanes, as long as there are any."""
    taken, least, most = state
    inside = (x >= low) & (x < high)
    tl.store(collected + taken * LANES + lane, x, mask=inside & (taken < PER_LANE))
    least = tl.minimum(least, tl.where(inside, x, float("inf")))
    most = tl.maximum(most, tl.where(inside, x, -float("inf")))
    return taken + inside.to(tl.int32), least, most


@triton.jit
def _empty(LANES: tl.constexpr):
    infinity = tl.full([LANES], float("inf"), tl.float32)
    return tl.zeros([LANES], tl.int32), infinity, -infinity


@triton.jit
def _collect(row, collected, width, low, high, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Collect the row's logits in ``[low, high)``. Returns the number of places that each lane has used, or would have
    needed, and the least and the largest of these logits."""
    lane = tl.arange(0, LANES)
    state = _empty(LANES)
    within = tl.arange(0, 4 * LANES)
    for start in range(0, width, 4 * ROWS * LANES):
        parts = ()
        for r in tl.static_range(ROWS):
            offset = start + r * 4 * LANES + within
            parts = parts + _quarters(tl.load(row + offset, mask=offset < width, other=LOWEST))
        for i in tl.static_range(4 * ROWS):
            state = _append(parts[i], collected, lane, low, high, state, LANES)
    tl.debug_barrier()  # collected logits may be read by other threads than those that wrote them
    least, most = tl.reduce((state[1], state[2]), 0, _least_and_most)
    return state[0], least, most


@triton.jit
def _collected_at(collected, r, taken, LANES: tl.constexpr):
    parts = ()
    for i in tl.static_range(4):
        at = collected + (r + i) * LANES + tl.arange(0, LANES)
        parts = parts + (tl.load(at, mask=r + i < taken, other=LOWEST),)
    return parts


@triton.jit
def _collect_again(collected, taken, used, low, high, LANES: tl.constexpr):
    """Keep the collected logits that are in ``[low, high)``, in the first places."""
    lane = tl.arange(0, LANES)
    state = _empty(LANES)
    for r in range(0, used, 4):
        parts = _collected_at(collected, r, taken, LANES)
        tl.debug_barrier()  # everything that is overwritten now has been read
        for i in tl.static_range(4):
            state = _append(parts[i], collected, lane, low, high, state, LANES)
    tl.debug_barrier()
    least, most = tl.reduce((state[1], state[2]), 0, _least_and_most)
    return state[0], least, most


@triton.jit
def _survey_collected(collected, taken, used, top, pivots, BY_MASS: tl.constexpr, LANES: tl.constexpr):
    measures = ()
    for _ in tl.static_range(PIVOTS):
        measures = measures + (tl.zeros([LANES], tl.float32),)
    for r in range(0, used, 4):
        parts = _collected_at(collected, r, taken, LANES)
        for i in tl.static_range(4):
            weight = _weight(parts[i], top, BY_MASS)
            more = ()
            for j in tl.static_range(PIVOTS):
                more = more + (measures[j] + tl.where(parts[i] >= pivots[j], weight, 0.0),)
            measures = more
    return tl.reduce(measures, 0, _add_eight)


@triton.jit
def _search_collected(
    collected,
    taken,  # [LANES]
    top,
    low,
    high,
    measure_low,
    measure_high,
    goal,
    share,
    left_out,
    BY_MASS: tl.constexpr,
    LANES: tl.constexpr,
):
    """The search among the collected logits, which are all logits in ``[low, high)``."""
    used = tl.max(taken, 0)
    if goal < 0.0:  # nothing has been measured yet
        if high == next_float(low):  # all are equal, and there may be more of them than places
            measure_low = tl.sum(taken, 0).to(tl.float32) * tl.exp2((low - top) * LOG2E)
        else:
            measure_low, _, _, _, _, _, _, _ = _survey_collected(
                collected, taken, used, top, (low, high, high, high, high, high, high, high), BY_MASS, LANES
            )
        goal = share * (measure_low - left_out)
    while high > next_float(low):
        pivots = _next_pivots(low, high, measure_low, measure_high, goal, BY_MASS)
        sums = _survey_collected(collected, taken, used, top, pivots, BY_MASS, LANES)
        measures = ()
        for j in tl.static_range(PIVOTS):
            measures = measures + (measure_high + sums[j],)
        low, high, measure_low, measure_high = _narrow(pivots, measures, goal, low, high, measure_low, measure_high)
        taken, least, most = _collect_again(collected, taken, used, low, high, LANES)
        used = tl.max(taken, 0)
        some = least <= most
        low, high = tl.where(some, least, low), tl.where(some, next_float(most), next_float(low))
    return low, measure_low, measure_high, goal


@triton.jit
def find_threshold(
    row,
    collected,  # [PER_LANE, LANES], to write to
    width,
    top,
    low,  # a value that is low enough
    expected,  # about how many logits are at or above `low`, in float32
    goal,  # BY_MASS: a share of the mass of the logits at or above `low`; else a number of logits
    left_out,  # BY_MASS: part of that mass that does not count
    BY_MASS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """The largest logit such that the logits at or above it reach `goal`; `low` if they never do.

    Returns:
        That logit; the measure of the logits at or above it, and of those above it; the goal as a measure.

    During the search it lies in ``[low, high)``: logits at or above `low` reach the goal, those at or above `high`
    don't.
    """
    high = next_float(top)
    measure_low, measure_high = tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    share = goal + measure_low
    aim = share
    if BY_MASS:
        aim = measure_low - 1.0  # not known yet
    surveys = tl.zeros([], tl.int32)
    searching = True
    while searching:
        survey = not (expected <= FILL * LANES)  # written so that NaN means a survey
        if (not survey) | (surveys % 3 == 2):  # now and then even if they may be too many, as all may be equal
            taken, least, most = _collect(row, collected, width, low, high, ROWS, LANES)
            low, high = least, next_float(most)
            survey = (tl.max(taken, 0) > PER_LANE) & (least < most)
            if not survey:
                low, measure_low, measure_high, aim = _search_collected(
                    collected, taken, top, low, high, measure_low, measure_high, aim, share, left_out, BY_MASS, LANES
                )
                searching = False
        if survey:
            if surveys == 0:
                pivots = _first_pivots(low, top)
            else:
                pivots = _next_pivots(low, high, measure_low, measure_high, aim, BY_MASS)
            measures = _survey(row, width, top, pivots, BY_MASS, ROWS, LANES)
            if surveys == 0:
                measure_low = measures[0]
                if BY_MASS:
                    aim = share * (measure_low - left_out)
            low, high, measure_low, measure_high = _narrow(pivots, measures, aim, low, high, measure_low, measure_high)
            surveys += 1
            expected = measure_low - measure_high
            if BY_MASS:  # fewer in a wider interval, where many logits have more than the least possible mass
                expected = expected / (tl.exp2((low - top) * LOG2E) * (1.0 + 0.5 * (high - low)))
            searching = (measure_low >= aim) & (high > next_float(low))
    return low, measure_low, measure_high, aim
