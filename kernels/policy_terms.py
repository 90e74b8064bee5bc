"""Policy-gradient losses over the log-probs of sampled tokens: slopes, sums and metrics. Two launches forward.

`policy_terms_sweep`, one program a sequence, writes the slopes of all terms, but for the one factor that only the whole
batch can tell, 1 / denominator, and the sums of its sequence, float64. `policy_terms_report`, one program, adds those
up in the order of the sequences, and writes loss, metrics and the factor, which backward applies with the upstream
gradient. No atomics, nothing read by the host.

Within a sequence the tokens are read once. Terms on the ratio of the sequence as a whole, and corrections of it as a
whole, read two arrays before; the former go over their gradient once more after, for only then is its sum known.
"""

import triton
import triton.language as tl

from irlfast.kernels._policy_sums import (
    PARTIALS,
    SUM_APPROX_KL,
    SUM_CLIP_HIGH,
    SUM_CLIP_LOW,
    SUM_ENTROPY,
    SUM_GAP,
    SUM_GAP_MAX,
    SUM_ICEPOP,
    SUM_KL,
    SUM_PENALTY,
    SUM_POLICY,
    SUM_RATIO,
    SUM_RATIO_MAX,
    SUM_RATIO_MIN,
    SUM_RATIO_SQUARED,
    SUM_ROLLOUT_KL,
    SUM_TIS,
    SUM_TOKENS,
)
from irlfast.kernels._segments import (
    at_least,
    at_most,
    count_tokens,
    exp_accurate,
    load_mask,
    load_tokens,
    number,
    segment_bounds,
    zero_outside,
)

# As irlfast/ops/policy_terms.py numbers them.
_REINFORCE = tl.constexpr(0)
_PPO = tl.constexpr(1)
_GSPO = tl.constexpr(2)
_CISPO = tl.constexpr(3)
_K2 = tl.constexpr(1)
_K3 = tl.constexpr(2)
_MAX_LOG_RATIO = tl.constexpr(20.0)


@triton.jit
def _difference(a, b, mask, begin, end, BLOCK: tl.constexpr):
    """Sum of a - b over the unmasked tokens, in float64."""
    lanes = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(begin, end, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < end
        counts = load_mask(mask, index, inside)
        lanes += load_tokens(a, index, inside, counts).to(tl.float64)
        lanes -= load_tokens(b, index, inside, counts).to(tl.float64)
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
def _save(sums, which, value):
    tl.store(sums + which, value)


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
    clip_low: tl.int64,
    clip_high: tl.int64,
    dual_clip: tl.int64,
    kl_coef: tl.int64,
    entropy_coef: tl.int64,
    tis_cap: tl.int64,
    icepop_low: tl.int64,
    icepop_high: tl.int64,
    TERM: tl.constexpr,
    KL: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    MEAN_OF_TOKENS: tl.constexpr,
    DUAL: tl.constexpr,
    TIS: tl.constexpr,
    ICEPOP: tl.constexpr,
    SEQUENCE_CORRECTION: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """slopes and entropy_slopes [tokens] or None; partials [sequences, PARTIALS] float64. Options: float64 as bits.

    Inputs share float32 or float64; all but logprobs and advantages may be None. Flags are options that are on.
    """
    sequence = tl.program_id(0)
    real = logprobs.dtype.element_ty
    first, last = segment_bounds(offsets, width, total, sequence, ALIGNED)
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
    inverse = 1 / tl.maximum(tokens, 1.0)
    weight = tl.full([], 1.0, dtype=tl.float64)
    if MEAN_OF_TOKENS:
        weight = inverse
    sequence_ratio = tl.full([], 1.0, dtype=tl.float64)
    sequence_moves = tokens >= 0
    if TERM == _GSPO:
        mean = _difference(logprobs, old, mask, begin, end, BLOCK) * inverse
        held_mean = at_least(at_most(mean, _MAX_LOG_RATIO), -_MAX_LOG_RATIO)
        sequence_ratio, _ = exp_accurate(held_mean)
        sequence_moves = held_mean == mean
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
        logprob = load_tokens(logprobs, index, inside, counts)
        if PER_TOKEN:
            advantage = load_tokens(advantages, index, inside, counts)
        old_logprob = logprob
        ratio = tl.full([BLOCK], 1.0, dtype=real)
        moves = counts
        if old is not None:
            old_logprob = load_tokens(old, index, inside, counts)
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

        if TERM == _PPO or TERM == _GSPO:  # noqa: SIM109  Triton has no `in`
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
            gap = old_logprob - load_tokens(rollout, index, inside, counts)
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
            d = logprob - load_tokens(ref, index, inside, counts)
            kl, penalty, kl_slope = _kl(d, ratio, moves, KL)
            kls += kl.to(tl.float64)
            penalties += penalty.to(tl.float64)
            slope += kl_slope * kl_weight
        if entropy is not None:
            entropies += load_tokens(entropy, index, inside, counts).to(tl.float64)
        if slopes is not None:
            tl.store(slopes + index, tl.where(counts, slope * weight.to(real), 0.0), mask=inside)
        if entropy_slopes is not None:
            bonus = (-number(entropy_coef) * weight).to(real)
            tl.store(entropy_slopes + index, tl.where(counts, bonus, 0.0).to(real), mask=inside)

    if TERM == _GSPO and slopes is not None:
        # The ratio is that of a mean over the tokens: each has the same share in it.
        share = (weight * tl.sum(term_slopes, axis=0) * inverse).to(real)
        tl.debug_barrier()  # a thread may read what another has written
        for start in range(begin, end, BLOCK):
            index = start + tl.arange(0, BLOCK)
            inside = index < end
            counts = load_mask(mask, index, inside)
            slope = load_tokens(slopes, index, inside, counts) + share
            tl.store(slopes + index, tl.where(counts, slope, 0.0), mask=inside)
    if keep is not None:
        zeros = tl.zeros([BLOCK], dtype=real)
        for start in range(end, last, BLOCK):
            index = start + tl.arange(0, BLOCK)
            if slopes is not None:
                tl.store(slopes + index, zeros, mask=index < last)
            if entropy_slopes is not None:
                tl.store(entropy_slopes + index, zeros, mask=index < last)

    sums = partials + sequence.to(tl.int64) * PARTIALS
    _save(sums, SUM_TOKENS, tokens)
    _save(sums, SUM_POLICY, tl.sum(policy, axis=0))
    if TERM != _REINFORCE:
        _save(sums, SUM_CLIP_LOW, tl.sum(clips_low, axis=0).to(tl.float64))
        _save(sums, SUM_CLIP_HIGH, tl.sum(clips_high, axis=0).to(tl.float64))
    if old is not None:
        _save(sums, SUM_APPROX_KL, tl.sum(approx_kl, axis=0))
        if TERM == _GSPO:
            _save(sums, SUM_RATIO, sequence_ratio)
        else:
            _save(sums, SUM_RATIO, tl.sum(ratios, axis=0))
            _save(sums, SUM_RATIO_SQUARED, tl.sum(ratio_squares, axis=0))
            _save(sums, SUM_RATIO_MIN, tl.min(ratio_min, axis=0).to(tl.float64))
            _save(sums, SUM_RATIO_MAX, tl.max(ratio_max, axis=0).to(tl.float64))
    if ref is not None:
        _save(sums, SUM_KL, tl.sum(kls, axis=0))
        _save(sums, SUM_PENALTY, tl.sum(penalties, axis=0))
    if entropy is not None:
        _save(sums, SUM_ENTROPY, tl.sum(entropies, axis=0))
    if rollout is not None:
        _save(sums, SUM_GAP, tl.sum(gaps, axis=0))
        _save(sums, SUM_GAP_MAX, tl.max(gap_max, axis=0).to(tl.float64))
        _save(sums, SUM_ROLLOUT_KL, tl.sum(rollout_kl, axis=0))
        if TIS or ICEPOP:
            _save(sums, SUM_TIS, tl.sum(capped_tokens, axis=0).to(tl.float64))
            _save(sums, SUM_ICEPOP, tl.sum(outside_tokens, axis=0).to(tl.float64))
