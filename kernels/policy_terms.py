"""Policy-gradient losses over the log-probs of sampled tokens: slopes, sums and metrics. Two launches forward.

`policy_terms_sweep`, one program a sequence, writes the slopes of all terms, but for the one factor that only the whole
batch can tell, 1 / denominator, and the sums of its sequence, float64. `policy_terms_report`, one program, adds those
up in the order of the sequences, and writes loss, metrics and the factor, which backward applies with the upstream
gradient. No atomics, nothing read by the host.

Within a sequence the tokens are read once; once more before, by terms on the ratio, or with corrections, of the sequence
as a whole, and for the slope of the former the gradient is gone over after.
"""

import triton
import triton.language as tl
from irlfast.kernels._segments import (
    at_least,
    at_most,
    count_tokens,
    exp_accurate,
    load_mask,
    number,
    segment_bounds,
    zero_outside,
)

BLOCK = 1024
NUM_WARPS = 8
REPORT_BLOCK = 256
REPORT_NUM_WARPS = 4

# As irlfast/ops/policy_terms.py numbers them.
_PPO = tl.constexpr(1)
_GSPO = tl.constexpr(2)
_CISPO = tl.constexpr(3)
_K2 = tl.constexpr(1)
_K3 = tl.constexpr(2)
_TOKEN_MEAN = tl.constexpr(0)
_SEQ_MEAN_TOKEN_MEAN = tl.constexpr(1)
_TOKEN_SUM = tl.constexpr(3)
_MAX_LOG_RATIO = tl.constexpr(20.0)

# What the sweep leaves of a sequence: [PARTIALS, sequences].
PARTIALS = 17
METRICS = 18
_TOKENS = tl.constexpr(0)
_POLICY = tl.constexpr(1)
_PENALTY = tl.constexpr(2)  # the KL term as it enters the loss: for k3 times the ratio
_APPROX_KL = tl.constexpr(3)
_RATIO = tl.constexpr(4)
_RATIO_SQUARED = tl.constexpr(5)
_RATIO_MIN = tl.constexpr(6)
_RATIO_MAX = tl.constexpr(7)
_CLIP_LOW = tl.constexpr(8)
_CLIP_HIGH = tl.constexpr(9)
_KL = tl.constexpr(10)
_ENTROPY = tl.constexpr(11)
_GAP = tl.constexpr(12)
_GAP_MAX = tl.constexpr(13)
_ROLLOUT_KL = tl.constexpr(14)
_TIS = tl.constexpr(15)
_ICEPOP = tl.constexpr(16)


@triton.jit
def _difference(a, b, mask, begin, end, BLOCK: tl.constexpr):
    """Sum of a - b over the unmasked tokens, in float64."""
    lanes = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(begin, end, BLOCK):
        index = start + tl.arange(0, BLOCK)
        counts = load_mask(mask, index, index < end)
        lanes += tl.load(a + index, mask=counts, other=0.0).to(tl.float64)
        lanes -= tl.load(b + index, mask=counts, other=0.0).to(tl.float64)
    return tl.sum(lanes, axis=0)


@triton.jit
def _clipped_term(advantage, ratio, moves, floor, ceiling, dual_clip, DUAL: tl.constexpr):
    """The term, its slope by the logarithm of the ratio, and where the clip has stopped it."""
    plain = -ratio * advantage
    clipped = -at_least(at_most(ratio, ceiling), floor) * advantage
    stopped = clipped > plain
    term = tl.where(stopped, clipped, plain)
    if DUAL:
        bound = -dual_clip * advantage
        beyond = (advantage < 0) & (term > bound)
        term = tl.where(beyond, bound, term)
        stopped = stopped | beyond
    return term, tl.where(stopped | (moves == 0), 0.0, plain), stopped


@triton.jit
def _kl(d, ratio, moves, KL: tl.constexpr):
    """The estimate, the penalty made of it and the penalty's slope; d = logp - ref."""
    kl = d
    penalty = d
    slope = tl.zeros_like(d)
    if KL == _K2:
        kl = 0.5 * d * d
        penalty = kl
        slope = d
    if KL == _K3:
        held = at_least(d, -_MAX_LOG_RATIO)
        _, less_one = exp_accurate(-held)
        kl = less_one + held
        penalty = ratio * kl
        # Where both move, kl - less_one is d: written so, the large parts of a small sum do not cancel.
        free = tl.where(moves, d, -less_one)
        slope = ratio * tl.where(held == d, free, tl.where(moves, kl, 0.0))
    return kl, penalty, slope


@triton.jit
def _save(partials, which, sequence, count, value):
    tl.store(partials + which * count + sequence, value)


@triton.jit(
    do_not_specialize=[
        "width", "total", "clip_low", "clip_high", "dual_clip", "kl_coef", "entropy_coef", "tis_cap", "icepop_low",
        "icepop_high",
    ]
)  # fmt: skip
def policy_terms_sweep(
    logprobs,
    old,
    ref,
    rollout,
    entropy,
    advantages,
    mask,
    keep,
    offsets,
    slopes,
    entropy_slopes,
    partials,
    width,
    total,
    clip_low,
    clip_high,
    dual_clip,
    kl_coef,
    entropy_coef,
    tis_cap,
    icepop_low,
    icepop_high,
    TERM: tl.constexpr,
    KL: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    MEAN_OF_TOKENS: tl.constexpr,
    DUAL: tl.constexpr,
    TIS: tl.constexpr,
    ICEPOP: tl.constexpr,
    SEQUENCE_CORRECTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """slopes and entropy_slopes [tokens] or None; partials [PARTIALS, sequences] float64. Options: float64 as bits.

    Inputs share float32 or float64; all but logprobs and advantages may be None. Flags are options that are on.
    """
    sequence = tl.program_id(0)
    count = tl.num_programs(0).to(tl.int64)
    real = logprobs.dtype.element_ty
    first, last = segment_bounds(offsets, width, total, sequence)
    if slopes is not None:
        zero_outside(slopes, offsets, total, BLOCK)
    if entropy_slopes is not None:
        zero_outside(entropy_slopes, offsets, total, BLOCK)
    begin, end = first, last
    if keep is not None:
        # A sequence that is dropped has no token, and zeros for its slopes.
        end = tl.where(tl.load(keep + sequence) != 0, last, first)

    tokens = (end - begin).to(tl.float64)
    if mask is not None:
        tokens = count_tokens(mask, begin, end, BLOCK).to(tl.float64)
    divisor = tl.maximum(tokens, 1.0)
    weight = tl.full([], 1.0, dtype=tl.float64)
    if MEAN_OF_TOKENS:
        weight = 1 / divisor
    sequence_ratio = tl.full([], 1.0, dtype=tl.float64)
    sequence_moves = tokens >= 0
    if TERM == _GSPO:
        mean = _difference(logprobs, old, mask, begin, end, BLOCK) / divisor
        held = at_least(at_most(mean, _MAX_LOG_RATIO), -_MAX_LOG_RATIO)
        sequence_ratio, _ = exp_accurate(held)
        sequence_moves = held == mean
    floor = (1 - number(clip_low)).to(real)
    ceiling = (1 + number(clip_high)).to(real)
    bound = number(dual_clip).to(real)
    cap = number(tis_cap).to(real)
    band_low = number(icepop_low).to(real)
    band_high = number(icepop_high).to(real)
    kl_weight = number(kl_coef).to(real)
    if SEQUENCE_CORRECTION:
        if old is not None:
            gap_sum = _difference(old, rollout, mask, begin, end, BLOCK)
        else:
            gap_sum = _difference(logprobs, rollout, mask, begin, end, BLOCK)
        sequence_sampled, _ = exp_accurate(at_most(gap_sum, _MAX_LOG_RATIO).to(real))
    advantage = tl.zeros([BLOCK], dtype=real)
    if not PER_TOKEN:
        advantage += tl.load(advantages + sequence)

    nothing = tl.zeros([BLOCK], dtype=tl.float64)
    policy = nothing
    penalties = nothing
    approx_kl = nothing
    ratios = nothing
    ratio_squares = nothing
    ratio_min = tl.full([BLOCK], float("inf"), dtype=real)
    ratio_max = tl.full([BLOCK], float("-inf"), dtype=real)
    clips_low = tl.zeros([BLOCK], dtype=tl.int32)
    clips_high = tl.zeros([BLOCK], dtype=tl.int32)
    kls = nothing
    entropies = nothing
    gaps = nothing
    gap_max = tl.zeros([BLOCK], dtype=real)
    rollout_kl = nothing
    capped_tokens = tl.zeros([BLOCK], dtype=tl.int32)
    outside_tokens = tl.zeros([BLOCK], dtype=tl.int32)
    term_slopes = nothing
    for start in range(begin, end, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < end
        counts = load_mask(mask, index, inside)
        # Masked in the load: whatever stands outside the mask takes no part.
        logprob = tl.load(logprobs + index, mask=counts, other=0.0)
        if PER_TOKEN:
            advantage = tl.load(advantages + index, mask=counts, other=0.0)
        old_logprob = logprob
        ratio = tl.full([BLOCK], 1.0, dtype=real)
        moves = counts
        if old is not None:
            old_logprob = tl.load(old + index, mask=counts, other=0.0)
            difference = logprob - old_logprob
            below = at_most(difference, _MAX_LOG_RATIO)
            held = at_least(below, -_MAX_LOG_RATIO)
            moves = held == difference
            ratio, less_one = exp_accurate(held)
            approx_kl += (less_one - below).to(tl.float64)
            seen = tl.where(counts, ratio, 0.0).to(tl.float64)
            ratios += seen
            ratio_squares += seen * seen
            ratio_min = tl.where(counts & (ratio < ratio_min), ratio, ratio_min)
            ratio_max = tl.where(counts & (ratio > ratio_max), ratio, ratio_max)

        if TERM == _PPO or TERM == _GSPO:
            used = ratio
            used_moves = moves.to(tl.int32)
            if TERM == _GSPO:
                used = tl.zeros([BLOCK], dtype=real) + sequence_ratio.to(real)
                used_moves = tl.zeros([BLOCK], dtype=tl.int32) + sequence_moves.to(tl.int32)
            term, slope, stopped = _clipped_term(advantage, used, used_moves, floor, ceiling, bound, DUAL)
            clips_low += (counts & stopped & (used < 1)).to(tl.int32)
            clips_high += (counts & stopped & (used > 1)).to(tl.int32)
        elif TERM == _CISPO:
            clips_high += (counts & (ratio > ceiling)).to(tl.int32)
            slope = -at_most(ratio, ceiling) * advantage
            term = slope * logprob
        else:
            slope = -advantage
            term = slope * logprob
        if rollout is not None:
            gap = old_logprob - tl.load(rollout + index, mask=counts, other=0.0)
            size = tl.abs(gap)
            gaps += size.to(tl.float64)
            gap_max = tl.where(size > gap_max, size, gap_max)
            held = at_most(gap, _MAX_LOG_RATIO)
            sampled, less_one = exp_accurate(held)
            rollout_kl += (less_one - held).to(tl.float64)
            if TIS or ICEPOP:
                if SEQUENCE_CORRECTION:
                    sampled = tl.zeros([BLOCK], dtype=real) + sequence_sampled
                correction = sampled
                if TIS:
                    capped_tokens += (counts & (sampled > cap)).to(tl.int32)
                    correction = at_most(sampled, cap)
                term = term * correction
                slope = slope * correction
                if ICEPOP:
                    outside = (sampled < band_low) | (sampled > band_high)
                    outside_tokens += (counts & outside).to(tl.int32)
                    term = tl.where(outside, 0.0, term)
                    slope = tl.where(outside, 0.0, slope)
        policy += tl.where(counts, term, 0.0).to(tl.float64)
        if TERM == _GSPO:
            term_slopes += tl.where(counts, slope, 0.0).to(tl.float64)
            slope = tl.zeros_like(slope)
        if ref is not None:
            d = logprob - tl.load(ref + index, mask=counts, other=0.0)
            kl, penalty, kl_slope = _kl(d, ratio, moves, KL)
            kls += kl.to(tl.float64)
            penalties += penalty.to(tl.float64)
            slope += kl_slope * kl_weight
        if entropy is not None:
            entropies += tl.load(entropy + index, mask=counts, other=0.0).to(tl.float64)
        if slopes is not None:
            tl.store(slopes + index, tl.where(counts, slope * weight.to(real), 0.0), mask=inside)
        if entropy_slopes is not None:
            bonus = (-number(entropy_coef) * weight).to(real)
            tl.store(entropy_slopes + index, tl.where(counts, bonus, 0.0).to(real), mask=inside)

    if TERM == _GSPO:
        if slopes is not None:
            # The ratio is that of a mean over the tokens: each has the same share in it.
            share = (weight * tl.sum(term_slopes, axis=0) / divisor).to(real)
            tl.debug_barrier()  # a thread may read what another has written
            for start in range(begin, end, BLOCK):
                index = start + tl.arange(0, BLOCK)
                counts = load_mask(mask, index, index < end)
                tl.store(slopes + index, tl.load(slopes + index, mask=counts, other=0.0) + share, mask=counts)
    if keep is not None:
        zeros = tl.zeros([BLOCK], dtype=real)
        for start in range(end, last, BLOCK):
            index = start + tl.arange(0, BLOCK)
            if slopes is not None:
                tl.store(slopes + index, zeros, mask=index < last)
            if entropy_slopes is not None:
                tl.store(entropy_slopes + index, zeros, mask=index < last)

    _save(partials, _TOKENS, sequence, count, tokens)
    _save(partials, _POLICY, sequence, count, tl.sum(policy, axis=0))
    if TERM != 0:
        _save(partials, _CLIP_LOW, sequence, count, tl.sum(clips_low, axis=0).to(tl.float64))
        _save(partials, _CLIP_HIGH, sequence, count, tl.sum(clips_high, axis=0).to(tl.float64))
    if old is not None:
        _save(partials, _APPROX_KL, sequence, count, tl.sum(approx_kl, axis=0))
        if TERM == _GSPO:
            _save(partials, _RATIO, sequence, count, sequence_ratio)
        else:
            _save(partials, _RATIO, sequence, count, tl.sum(ratios, axis=0))
            _save(partials, _RATIO_SQUARED, sequence, count, tl.sum(ratio_squares, axis=0))
            _save(partials, _RATIO_MIN, sequence, count, tl.min(ratio_min, axis=0).to(tl.float64))
            _save(partials, _RATIO_MAX, sequence, count, tl.max(ratio_max, axis=0).to(tl.float64))
    if ref is not None:
        _save(partials, _KL, sequence, count, tl.sum(kls, axis=0))
        _save(partials, _PENALTY, sequence, count, tl.sum(penalties, axis=0))
    if entropy is not None:
        _save(partials, _ENTROPY, sequence, count, tl.sum(entropies, axis=0))
    if rollout is not None:
        _save(partials, _GAP, sequence, count, tl.sum(gaps, axis=0))
        _save(partials, _GAP_MAX, sequence, count, tl.max(gap_max, axis=0).to(tl.float64))
        _save(partials, _ROLLOUT_KL, sequence, count, tl.sum(rollout_kl, axis=0))
        if TIS or ICEPOP:
            _save(partials, _TIS, sequence, count, tl.sum(capped_tokens, axis=0).to(tl.float64))
            _save(partials, _ICEPOP, sequence, count, tl.sum(outside_tokens, axis=0).to(tl.float64))


@triton.jit
def _sum(partials, which, start, count, BLOCK: tl.constexpr):
    """A block of one row of the partials, 0 past its end."""
    index = start + tl.arange(0, BLOCK)
    return tl.load(partials + which * count + index, mask=index < count, other=0.0)


@triton.jit
def _put(metrics, which, value):
    tl.store(metrics + which, value.to(metrics.dtype.element_ty))


@triton.jit(do_not_specialize=["count", "divisor", "kl_coef", "entropy_coef"])
def policy_terms_report(
    partials,
    denominator,
    loss,
    metrics,
    scale,
    count,
    divisor,
    kl_coef,
    entropy_coef,
    TERM: tl.constexpr,
    AGGREGATION: tl.constexpr,
    OLD: tl.constexpr,
    REF: tl.constexpr,
    ENTROPY: tl.constexpr,
    ROLLOUT: tl.constexpr,
    CORRECTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """loss, metrics [18] in the order of METRICS, and scale = 1 / denominator, which every slope still lacks.

    denominator: a number on the device, NaN unless positive; or None, and then divisor, 0 for the batch's own count.
    """
    count = tl.cast(count, tl.int64)
    nothing = tl.zeros([BLOCK], dtype=tl.float64)
    tokens_lanes = nothing
    sequence_lanes = tl.zeros([BLOCK], dtype=tl.int64)
    policy_lanes = nothing
    penalty_lanes = nothing
    bonus_lanes = nothing
    kl_approx_lanes = nothing
    ratio_lanes = nothing
    square_lanes = nothing
    min_lanes = tl.full([BLOCK], float("inf"), dtype=tl.float64)
    max_lanes = tl.full([BLOCK], float("-inf"), dtype=tl.float64)
    low_lanes = nothing
    high_lanes = nothing
    kl_lanes = nothing
    entropy_lanes = nothing
    gap_lanes = nothing
    gap_max_lanes = nothing
    rollout_kl_lanes = nothing
    tis_lanes = nothing
    icepop_lanes = nothing
    for start in range(0, count, BLOCK):
        tokens = _sum(partials, _TOKENS, start, count, BLOCK)
        some = tokens > 0
        tokens_lanes += tokens
        sequence_lanes += some.to(tl.int64)
        shares = tl.full([BLOCK], 1.0, dtype=tl.float64)
        if AGGREGATION == _SEQ_MEAN_TOKEN_MEAN:
            shares = tl.maximum(tokens, 1.0)
        policy_lanes += _sum(partials, _POLICY, start, count, BLOCK) / shares
        if TERM != 0:
            low_lanes += _sum(partials, _CLIP_LOW, start, count, BLOCK)
            high_lanes += _sum(partials, _CLIP_HIGH, start, count, BLOCK)
        if OLD:
            kl_approx_lanes += _sum(partials, _APPROX_KL, start, count, BLOCK)
            ratio = tl.where(some, _sum(partials, _RATIO, start, count, BLOCK), 0.0)
            ratio_lanes += ratio
            if TERM == _GSPO:
                square_lanes += ratio * ratio
                lowest = ratio
                highest = ratio
            else:
                square_lanes += _sum(partials, _RATIO_SQUARED, start, count, BLOCK)
                lowest = _sum(partials, _RATIO_MIN, start, count, BLOCK)
                highest = _sum(partials, _RATIO_MAX, start, count, BLOCK)
            min_lanes = tl.where(some & (lowest < min_lanes), lowest, min_lanes)
            max_lanes = tl.where(some & (highest > max_lanes), highest, max_lanes)
        if REF:
            kl_lanes += _sum(partials, _KL, start, count, BLOCK)
            penalty_lanes += _sum(partials, _PENALTY, start, count, BLOCK) / shares
        if ENTROPY:
            entropy = _sum(partials, _ENTROPY, start, count, BLOCK)
            entropy_lanes += entropy
            bonus_lanes += entropy / shares
        if ROLLOUT:
            gap_lanes += _sum(partials, _GAP, start, count, BLOCK)
            gap_max = _sum(partials, _GAP_MAX, start, count, BLOCK)
            gap_max_lanes = tl.where(gap_max > gap_max_lanes, gap_max, gap_max_lanes)
            rollout_kl_lanes += _sum(partials, _ROLLOUT_KL, start, count, BLOCK)
            if CORRECTS:
                tis_lanes += _sum(partials, _TIS, start, count, BLOCK)
                icepop_lanes += _sum(partials, _ICEPOP, start, count, BLOCK)

    total = tl.sum(tokens_lanes, axis=0)
    answers = tl.sum(sequence_lanes, axis=0).to(tl.float64)
    some_token = total > 0
    tokens = tl.maximum(total, 1.0)
    if denominator is not None:
        own = tl.load(denominator).to(tl.float64)
        own = tl.where(own > 0, own, float("nan"))
    else:
        own = tl.full([], 1.0, dtype=tl.float64)
        if AGGREGATION == _TOKEN_MEAN:
            own = tokens
        elif AGGREGATION != _TOKEN_SUM:
            own = tl.maximum(answers, 1.0)
        given = number(divisor)
        own = tl.where(given != 0, given, own)
    policy = tl.where(some_token, tl.sum(policy_lanes, axis=0) / own, 0.0)
    result = policy
    penalty = number(kl_coef) * tl.sum(penalty_lanes, axis=0) / own
    bonus = number(entropy_coef) * tl.sum(bonus_lanes, axis=0) / own
    result += tl.where(some_token & (number(kl_coef) != 0), penalty, 0.0)
    result -= tl.where(some_token & (number(entropy_coef) != 0), bonus, 0.0)
    tl.store(loss, result.to(loss.dtype.element_ty))
    tl.store(scale, (1 / own).to(scale.dtype.element_ty))

    one = tl.full([], 1.0, dtype=tl.float64)
    ratio_mean = one
    ratio_min = one
    ratio_max = one
    ess = one
    if OLD:
        ratios = tokens
        if TERM == _GSPO:
            ratios = tl.maximum(answers, 1.0)
        ratio_sum = tl.sum(ratio_lanes, axis=0)
        squares = tl.where(some_token, tl.sum(square_lanes, axis=0), 1.0)
        # An extreme forgets a NaN, a sum does not.
        lost = ratio_sum != ratio_sum
        ratio_mean = tl.where(some_token, ratio_sum / ratios, 1.0)
        ratio_min = tl.where(some_token, tl.where(lost, ratio_sum, tl.min(min_lanes, axis=0)), 1.0)
        ratio_max = tl.where(some_token, tl.where(lost, ratio_sum, tl.max(max_lanes, axis=0)), 1.0)
        ess = tl.where(some_token, ratio_sum * ratio_sum / (ratios * squares), 1.0)
    gaps = tl.sum(gap_lanes, axis=0)
    low = tl.sum(low_lanes, axis=0)
    high = tl.sum(high_lanes, axis=0)
    _put(metrics, 0, policy)
    _put(metrics, 1, total)
    _put(metrics, 2, answers)
    _put(metrics, 3, tl.sum(kl_approx_lanes, axis=0) / tokens)
    _put(metrics, 4, ratio_mean)
    _put(metrics, 5, ratio_min)
    _put(metrics, 6, ratio_max)
    _put(metrics, 7, ess)
    _put(metrics, 8, (low + high) / tokens)
    _put(metrics, 9, low / tokens)
    _put(metrics, 10, high / tokens)
    _put(metrics, 11, tl.sum(kl_lanes, axis=0) / tokens)
    _put(metrics, 12, tl.sum(entropy_lanes, axis=0) / tokens)
    _put(metrics, 13, gaps / tokens)
    _put(metrics, 14, tl.where(gaps != gaps, gaps, tl.max(gap_max_lanes, axis=0)))
    _put(metrics, 15, tl.sum(rollout_kl_lanes, axis=0) / tokens)
    _put(metrics, 16, tl.sum(tis_lanes, axis=0) / tokens)
    _put(metrics, 17, tl.sum(icepop_lanes, axis=0) / tokens)
