"""Self-normalised importance weights within groups, and their gradient: one program a group, one launch a pass.

`order` lists rows group by group and `offsets` where each group begins in it, so that a group's sums run over its rows
in one order wherever they stand; without them all rows are one group. Float64 throughout. Rows are read again for each
sum: a group's fit the cache.
"""

import triton
import triton.language as tl

from irlfast.kernels._segments import at_least, at_most, number, segment_bounds


@triton.jit
def _rows(order, start, end, BLOCK: tl.constexpr):
    place = start + tl.arange(0, BLOCK)
    inside = place < end
    row = place
    if order is not None:
        row = tl.load(order + place, mask=inside, other=0)
    return row, inside


@triton.jit
def _log_ratio(target, proposal, row, inside):
    """log p~ - log q, -inf outside the group."""
    return tl.load(target + row, mask=inside, other=float("-inf")).to(tl.float64) - tl.load(
        proposal + row, mask=inside, other=0.0
    ).to(tl.float64)


@triton.jit
def _exponential(log_ratio, highest):
    """exp(log_ratio - highest), 0 for -inf; a finite highest is at least every log_ratio."""
    impossible = log_ratio == float("-inf")
    return tl.where(impossible, 0.0, tl.exp(tl.where(impossible, highest, log_ratio) - highest))


@triton.jit
def _reshape(log_ratio, log_normalizer, low, high, temper):
    """temper * clip(l - log Z), -inf where l is."""
    impossible = log_ratio == float("-inf")
    relative = tl.where(impossible, log_normalizer, log_ratio) - log_normalizer
    return tl.where(impossible, log_ratio, temper * at_most(at_least(relative, low), high))


@triton.jit
def _weigh(target, proposal, order, begin, end, low, high, temper, RESHAPES: tl.constexpr, BLOCK: tl.constexpr):
    """What a group's weights need.

    peak, total: its highest log ratio and the sum of exp(l - peak). highest, mass, squares: of the log weights that
    clip and temper leave, as peak and total, and the sum of the squares. A ratio that is NaN or +inf makes all NaN.
    """
    lanes = tl.full([BLOCK], float("-inf"), dtype=tl.float64)
    invalid = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(begin, end, BLOCK):
        row, inside = _rows(order, start, end, BLOCK)
        log_ratio = _log_ratio(target, proposal, row, inside)
        valid = log_ratio < float("inf")
        invalid = invalid | (1 - valid.to(tl.int32))
        lanes = tl.where(valid & (log_ratio > lanes), log_ratio, lanes)
    peak = tl.max(lanes, axis=0)
    possible = peak > float("-inf")
    # Where nothing is possible any finite number will do in its place.
    peak = tl.where(tl.max(invalid, axis=0) != 0, float("nan"), tl.where(possible, peak, 0.0))
    sums = tl.zeros([BLOCK], dtype=tl.float64)
    square_sums = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(begin, end, BLOCK):
        row, inside = _rows(order, start, end, BLOCK)
        share = _exponential(_log_ratio(target, proposal, row, inside), peak)
        sums += share
        square_sums += share * share
    total = tl.sum(sums, axis=0)
    empty = total == 0
    log_normalizer = peak + tl.log(tl.where(empty, 1.0, total)) - tl.log((end - begin).to(tl.float64))
    highest = peak
    mass = total
    if RESHAPES:
        highest = _reshape(peak, log_normalizer, low, high, temper)
        sums = tl.zeros([BLOCK], dtype=tl.float64)
        square_sums = tl.zeros([BLOCK], dtype=tl.float64)
        for start in range(begin, end, BLOCK):
            row, inside = _rows(order, start, end, BLOCK)
            log_ratio = _log_ratio(target, proposal, row, inside)
            weight = _exponential(_reshape(log_ratio, log_normalizer, low, high, temper), highest)
            sums += weight
            square_sums += weight * weight
        mass = tl.sum(sums, axis=0)
    squares = tl.sum(square_sums, axis=0)
    # Sums of nothing: their quotients are 0.
    total = tl.where(empty, 1.0, total)
    mass = tl.where(empty, 1.0, mass)
    return empty, peak, total, log_normalizer, highest, mass, squares


@triton.jit(do_not_specialize=["rows", "low", "high", "temper"])
def importance_forward(
    target,
    proposal,
    order,
    offsets,
    weights,
    log_normalizer,
    ess,
    rows,
    low: tl.int64,
    high: tl.int64,
    temper: tl.int64,
    RESHAPES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """weights [N]; log_normalizer and ess, one a group: a program whose group has no row writes nothing."""
    group = tl.program_id(0)
    begin, end = segment_bounds(offsets, rows, rows, group, False)
    if begin < end:
        floor, ceiling, exponent = number(low), number(high), number(temper)
        empty, _, _, normalizer, highest, mass, squares = _weigh(
            target, proposal, order, begin, end, floor, ceiling, exponent, RESHAPES, BLOCK
        )
        for start in range(begin, end, BLOCK):
            row, inside = _rows(order, start, end, BLOCK)
            log_weight = _log_ratio(target, proposal, row, inside)
            if RESHAPES:
                log_weight = _reshape(log_weight, normalizer, floor, ceiling, exponent)
            weight = _exponential(log_weight, highest) / mass
            tl.store(weights + row, weight.to(weights.dtype.element_ty), mask=inside)
        kind = log_normalizer.dtype.element_ty
        tl.store(log_normalizer + group, tl.where(empty, float("-inf"), normalizer).to(kind))
        size = tl.where(empty, 0.0, mass * mass / tl.where(empty, 1.0, squares))
        tl.store(ess + group, size.to(kind))


@triton.jit(do_not_specialize=["rows", "low", "high", "temper"])
def importance_backward(
    target,
    proposal,
    order,
    offsets,
    grad_weights,
    grad_log_normalizer,
    grad_ess,
    gradient,
    rows,
    low: tl.int64,
    high: tl.int64,
    temper: tl.int64,
    RESHAPES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """gradient [N], to log_target. Upstream gradients as the outputs, None for zero.

    With g_k the gradient to weight k, through ess = 1 / sum w^2 too, s the shares and h that to log Z, the softmax
    gives b_k = temper w_k (g_k - sum_j w_j g_j), 0 where the clip holds; then b_k + (h - sum_j b_j) s_k.
    """
    group = tl.program_id(0)
    begin, end = segment_bounds(offsets, rows, rows, group, False)
    if begin < end:
        floor, ceiling, exponent = number(low), number(high), number(temper)
        empty, peak, total, normalizer, highest, mass, squares = _weigh(
            target, proposal, order, begin, end, floor, ceiling, exponent, RESHAPES, BLOCK
        )
        to_squares = tl.zeros([], dtype=tl.float64)
        if grad_ess is not None:
            size = tl.where(empty, 0.0, mass * mass / tl.where(empty, 1.0, squares))
            to_squares = -2 * tl.load(grad_ess + group).to(tl.float64) * size * size
        lanes = tl.zeros([BLOCK], dtype=tl.float64)
        for start in range(begin, end, BLOCK):
            row, inside = _rows(order, start, end, BLOCK)
            _, weight, slope = _slopes(
                target, proposal, row, inside, grad_weights, to_squares, normalizer, highest, mass, floor, ceiling,
                exponent, RESHAPES,
            )  # fmt: skip
            lanes += weight * slope
        mean = tl.sum(lanes, axis=0)
        lanes = tl.zeros([BLOCK], dtype=tl.float64)
        for start in range(begin, end, BLOCK):
            row, inside = _rows(order, start, end, BLOCK)
            log_ratio, weight, slope = _slopes(
                target, proposal, row, inside, grad_weights, to_squares, normalizer, highest, mass, floor, ceiling,
                exponent, RESHAPES,
            )  # fmt: skip
            lanes += _to_relative(log_ratio, weight, slope - mean, normalizer, floor, ceiling, exponent, RESHAPES)
        to_normalizer = -tl.sum(lanes, axis=0)
        if grad_log_normalizer is not None:
            to_normalizer += tl.load(grad_log_normalizer + group).to(tl.float64)
        for start in range(begin, end, BLOCK):
            row, inside = _rows(order, start, end, BLOCK)
            log_ratio, weight, slope = _slopes(
                target, proposal, row, inside, grad_weights, to_squares, normalizer, highest, mass, floor, ceiling,
                exponent, RESHAPES,
            )  # fmt: skip
            result = _to_relative(log_ratio, weight, slope - mean, normalizer, floor, ceiling, exponent, RESHAPES)
            result += to_normalizer * (_exponential(log_ratio, peak) / total)
            # A group of impossible samples has no gradient, whatever comes from above.
            result = tl.where(empty, 0.0, result)
            tl.store(gradient + row, result.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def _slopes(
    target,
    proposal,
    row,
    inside,
    grad_weights,
    to_squares,
    normalizer,
    highest,
    mass,
    low,
    high,
    temper,
    RESHAPES: tl.constexpr,
):
    """Log ratios, weights and the gradient to the weights."""
    log_ratio = _log_ratio(target, proposal, row, inside)
    log_weight = log_ratio
    if RESHAPES:
        log_weight = _reshape(log_ratio, normalizer, low, high, temper)
    weight = _exponential(log_weight, highest) / mass
    slope = to_squares * weight
    if grad_weights is not None:
        slope += tl.load(grad_weights + row, mask=inside, other=0.0).to(tl.float64)
    return log_ratio, weight, slope


@triton.jit
def _to_relative(log_ratio, weight, slope, normalizer, low, high, temper, RESHAPES: tl.constexpr):
    """The gradient to l - log Z."""
    result = weight * slope
    if RESHAPES:
        possible = log_ratio > float("-inf")
        relative = tl.where(possible, log_ratio, normalizer) - normalizer
        held = (relative < low) | (relative > high)
        result = tl.where(held, 0.0, temper * result)
    return result
