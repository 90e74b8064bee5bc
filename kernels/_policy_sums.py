"""What a sweep of policy_terms leaves of every sequence, and how it becomes loss and metrics."""

import triton
import triton.language as tl

from irlfast.kernels._segments import number

METRICS = 18

# As irlfast/ops/policy_terms.py numbers them.
_REINFORCE = tl.constexpr(0)
_GSPO = tl.constexpr(2)
_TOKEN_MEAN = tl.constexpr(0)
_SEQ_MEAN_TOKEN_MEAN = tl.constexpr(1)
_TOKEN_SUM = tl.constexpr(3)

# What the sweep leaves of a sequence: [sequences, PARTIALS].
PARTIALS = tl.constexpr(17)
SUM_TOKENS = tl.constexpr(0)
SUM_POLICY = tl.constexpr(1)
SUM_PENALTY = tl.constexpr(2)  # the KL term as it enters the loss: for k3 times the ratio
SUM_APPROX_KL = tl.constexpr(3)
SUM_RATIO = tl.constexpr(4)
SUM_RATIO_SQUARED = tl.constexpr(5)
SUM_RATIO_MIN = tl.constexpr(6)
SUM_RATIO_MAX = tl.constexpr(7)
SUM_CLIP_LOW = tl.constexpr(8)
SUM_CLIP_HIGH = tl.constexpr(9)
SUM_KL = tl.constexpr(10)
SUM_ENTROPY = tl.constexpr(11)
SUM_GAP = tl.constexpr(12)
SUM_GAP_MAX = tl.constexpr(13)
SUM_ROLLOUT_KL = tl.constexpr(14)
SUM_TIS = tl.constexpr(15)
SUM_ICEPOP = tl.constexpr(16)


@triton.jit
def _of_each(partials, which, start, count, BLOCK: tl.constexpr):
    """One of the sums of a block of sequences, 0 past the last."""
    index = start + tl.arange(0, BLOCK)
    return tl.load(partials + index * PARTIALS + which, mask=index < count, other=0.0)


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
    divisor: tl.int64,
    kl_coef: tl.int64,
    entropy_coef: tl.int64,
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
        tokens = _of_each(partials, SUM_TOKENS, start, count, BLOCK)
        some = tokens > 0
        tokens_lanes += tokens
        sequence_lanes += some.to(tl.int64)
        shares = tl.full([BLOCK], 1.0, dtype=tl.float64)
        if AGGREGATION == _SEQ_MEAN_TOKEN_MEAN:
            shares = tl.maximum(tokens, 1.0)
        policy_lanes += _of_each(partials, SUM_POLICY, start, count, BLOCK) / shares
        if TERM != _REINFORCE:
            low_lanes += _of_each(partials, SUM_CLIP_LOW, start, count, BLOCK)
            high_lanes += _of_each(partials, SUM_CLIP_HIGH, start, count, BLOCK)
        if OLD:
            kl_approx_lanes += _of_each(partials, SUM_APPROX_KL, start, count, BLOCK)
            ratio = tl.where(some, _of_each(partials, SUM_RATIO, start, count, BLOCK), 0.0)
            ratio_lanes += ratio
            if TERM == _GSPO:
                square_lanes += ratio * ratio
                lowest = ratio
                highest = ratio
            else:
                square_lanes += _of_each(partials, SUM_RATIO_SQUARED, start, count, BLOCK)
                lowest = _of_each(partials, SUM_RATIO_MIN, start, count, BLOCK)
                highest = _of_each(partials, SUM_RATIO_MAX, start, count, BLOCK)
            min_lanes = tl.where(some & (lowest < min_lanes), lowest, min_lanes)
            max_lanes = tl.where(some & (highest > max_lanes), highest, max_lanes)
        if REF:
            kl_lanes += _of_each(partials, SUM_KL, start, count, BLOCK)
            penalty_lanes += _of_each(partials, SUM_PENALTY, start, count, BLOCK) / shares
        if ENTROPY:
            entropy = _of_each(partials, SUM_ENTROPY, start, count, BLOCK)
            entropy_lanes += entropy
            bonus_lanes += entropy / shares
        if ROLLOUT:
            gap_lanes += _of_each(partials, SUM_GAP, start, count, BLOCK)
            gap_max = _of_each(partials, SUM_GAP_MAX, start, count, BLOCK)
            gap_max_lanes = tl.where(gap_max > gap_max_lanes, gap_max, gap_max_lanes)
            rollout_kl_lanes += _of_each(partials, SUM_ROLLOUT_KL, start, count, BLOCK)
            if CORRECTS:
                tis_lanes += _of_each(partials, SUM_TIS, start, count, BLOCK)
                icepop_lanes += _of_each(partials, SUM_ICEPOP, start, count, BLOCK)

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
