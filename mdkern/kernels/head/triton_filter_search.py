"""Which logits of a row the filters keep: those at or above one value, found without a sort.

`top_k` asks for the largest value that so many logits reach, `top_p` for the largest value such that the logits that
reach it hold so much of the probability: one search with two measures. The value is known to lie between two others.
Each survey of the row measures what lies at or above eight values between them, most of them close to where
interpolation expects the answer. After one or two surveys only a few thousand logits are in question. They are
collected, some by each thread, and the search goes on among them, collecting what is left each time, until all that are
left are equal.
"""

# mypy: ignore-errors
# ruff: noqa: N803, RUF005

import triton
import triton.language as tl

from mdkern.kernels.triton_common import LOG2E, LOWEST, flip_order

PIVOTS = tl.constexpr(8)
PER_LANE = tl.constexpr(32)  # places of each lane for collected logits
FILL = tl.constexpr(12)  # how many of them are used on average, at most, so that hardly ever a lane of 512 has too few


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
    """Between them by ordered bits: halves any interval of floats at last, whatever their values."""
    low_key, high_key = _ordered(low).to(tl.int64), _ordered(high).to(tl.int64)
    return _unordered(((low_key + high_key) >> 1).to(tl.int32))


@triton.jit
def _first_pivots(low, top):
    """`low` itself, for the measure of the whole; then distances from the top, in nats, that suit text and noise."""
    return (low, top - 0.5, top - 1.5, top - 3.0, top - 5.0, top - 7.5, top - 11.0, top - 16.0)


@triton.jit
def _next_pivots(low, high, measure_low, measure_high, goal, BY_MASS: tl.constexpr):
    """Values between `low` and `high`, neither of them: halfway, and around the interpolated place of `goal`."""
    if BY_MASS:
        part = (measure_low - goal) / (measure_low - measure_high)
    else:  # how many lie above a value falls off about exponentially with it
        log_low, log_high = tl.log2(measure_low), tl.log2(tl.maximum(measure_high, 0.5))
        part = (log_low - tl.log2(goal)) / (log_low - log_high)
    part = tl.where((part >= 0.0) & (part <= 1.0), part, 0.5)
    span = high - low
    far = span > 64.0  # only suppressed ids are so improbable: look near the upper end, at growing distances
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
    """The highest of the values that reach the goal, the lowest of those that do not."""
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
    """``[4 * n]`` as four ``[n]``, without moving a register: each thread holds four neighbours."""
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
    """The measure of what lies at or above each pivot. Sums are in one order, whichever pivot they are of."""
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
            more = more + (measures[j] + tl.sum(tl.sum(part, 2), 0),)  # within threads: each holds four neighbours
        measures = more
    return tl.reduce(measures, 0, _add_eight)


@triton.jit
def _append(x, collected, lane, low, high, state, LANES: tl.constexpr):
    """Put the logits in ``[low, high)`` into their lanes' next places, while there are any."""
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
    """Collect the row's logits in ``[low, high)``. How many places each lane has used, or would have; and the least and
    the largest of the logits."""
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
    tl.debug_barrier()  # what is collected may be read by other threads than wrote it
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
    """Keep, in the first places, what is in ``[low, high)`` of the collected logits."""
    lane = tl.arange(0, LANES)
    state = _empty(LANES)
    for r in range(0, used, 4):
        parts = _collected_at(collected, r, taken, LANES)
        tl.debug_barrier()  # what is written now has been read
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
    """The search among the collected logits, which are all there are in ``[low, high)``."""
    used = tl.max(taken, 0)
    if goal < 0.0:  # nothing has been measured before
        if high == next_float(low):  # all are equal, and perhaps more than there are places
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
    expected,  # about how many logits are at or above it, in float32
    goal,  # BY_MASS: the share of the mass of those; else the number of them
    left_out,  # BY_MASS: what of that mass does not count
    BY_MASS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """The largest logit such that those at or above it reach `goal`, `low` if they never do.

    Returns:
        That logit; the measure of what is at or above it, and of what is above it; the goal as a measure.

    It lies in ``[low, high)``: what is at or above `low` reaches the goal, what is at or above `high` does not.
    """
    high = next_float(top)
    measure_low, measure_high = tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    share = goal + measure_low
    aim = share
    if BY_MASS:
        aim = measure_low - 1.0  # not known
    surveys = tl.zeros([], tl.int32)
    searching = True
    while searching:
        survey = not (expected <= FILL * LANES)  # NaN is not
        if (not survey) | (surveys % 3 == 2):  # now and then although they may be too many: all may be equal
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
            if BY_MASS:  # the fewer the wider the interval, for then many have more than the least possible
                expected = expected / (tl.exp2((low - top) * LOG2E) * (1.0 + 0.5 * (high - low)))
            searching = (measure_low >= aim) & (high > next_float(low))
    return low, measure_low, measure_high, aim
