"""What the kernels over sequences of tokens share: bounds, masks, numbers, and an exp that keeps exp(x) - 1.

One program has one sequence, walks it in blocks and adds in float64, lane by lane: the order of a sum depends on the
sequence alone, not on the batch, the padding or the layout.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# ln 2 in two parts, the first with so few bits that a multiple of it up to 2^10 is exact in either type.
LN2_HIGH = tl.constexpr(0.693359375)
LN2_LOW = tl.constexpr(-2.1219444005469057e-4)


@triton.jit
def number(bits):
    """The float64 whose bits an integer argument has: a Python float would arrive as float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def segment_bounds(offsets, width, total, sequence, ALIGNED: tl.constexpr):
    """[begin, end) of a sequence: `width` wide each, or between two offsets, which are held in [0, total].

    ALIGNED: the width is a multiple of 16, so that a thread's loads can be wide.
    """
    if offsets is None:
        begin = sequence.to(tl.int64) * width
        end = begin + width
        if ALIGNED:
            begin = tl.multiple_of(begin, 16)
            end = tl.multiple_of(end, 16)
    else:
        begin = tl.load(offsets + sequence).to(tl.int64)
        end = tl.load(offsets + sequence + 1).to(tl.int64)
        begin = tl.minimum(tl.maximum(begin, 0), total)
        end = tl.minimum(tl.maximum(end, begin), total)
    return begin, end


@triton.jit
def load_mask(mask, index, inside):
    """Which of the tokens inside the sequence count."""
    if mask is not None:
        inside = inside & (tl.load(mask + index, mask=inside, other=0) != 0)
    return inside


@triton.jit
def load_tokens(data, index, inside, counts):
    """A block's values, 0 where they do not count: whatever stands there takes no part.

    Read by `inside`, which lets a thread read wide, and then selected.
    """
    return tl.where(counts, tl.load(data + index, mask=inside, other=0.0), 0.0)


@triton.jit
def count_tokens(mask, begin, end, BLOCK: tl.constexpr):
    """Tokens of a sequence that count, int64."""
    count = end - begin
    if mask is not None:
        lanes = tl.zeros([BLOCK], dtype=tl.int32)
        for start in range(begin, end, BLOCK):
            index = start + tl.arange(0, BLOCK)
            lanes += load_mask(mask, index, index < end).to(tl.int32)
        count = tl.sum(lanes.to(tl.int64), axis=0)
    return count


@triton.jit
def fill_zero(data, begin, end, BLOCK: tl.constexpr):
    for start in range(begin, end, BLOCK):
        index = start + tl.arange(0, BLOCK)
        tl.store(data + index, tl.zeros([BLOCK], dtype=data.dtype.element_ty), mask=index < end)


@triton.jit
def zero_outside(data, offsets, total, BLOCK: tl.constexpr):
    """Zeros before the first offset and after the last: offsets on a GPU are not looked at, so there may be a gap."""
    if offsets is not None:
        sequence, count = tl.program_id(0), tl.num_programs(0)
        if sequence == 0:
            fill_zero(data, tl.zeros([], tl.int64), tl.minimum(tl.load(offsets).to(tl.int64), total), BLOCK)
        if sequence == count - 1:
            last = tl.load(offsets + count).to(tl.int64)
            fill_zero(data, tl.maximum(last, 0), total, BLOCK)


# tl.minimum and tl.maximum give the other operand where one is NaN: here a NaN stays.
@triton.jit
def at_most(x, limit):
    return tl.where(x > limit, limit, x)


@triton.jit
def at_least(x, limit):
    return tl.where(x < limit, limit, x)


@triton.jit
def exp_accurate(x):
    """exp(x) and exp(x) - 1, which does not cancel for small x; x <= 87. Exactly 1 and 0 at 0; a NaN stays.

    At least exp(-87): 2^n, put together from bits, knows no underflow.
    """
    x = at_least(x, -87.0)
    n = tl.floor(x * LOG2_E + 0.5)
    f = (x - n * LN2_HIGH) - n * LN2_LOW
    # Taylor's series of expm1(f) / f, |f| <= 0.35, to the end of the type's precision.
    if x.dtype.is_fp64():
        q = f * (1 / 87178291200) + 1 / 6227020800
        q = q * f + 1 / 479001600
        q = q * f + 1 / 39916800
        q = q * f + 1 / 3628800
        q = q * f + 1 / 362880
        q = q * f + 1 / 40320
        q = q * f + 1 / 5040
    else:
        q = f * (1 / 40320) + 1 / 5040
    q = q * f + 1 / 720
    q = q * f + 1 / 120
    q = q * f + 1 / 24
    q = q * f + 1 / 6
    q = q * f + 0.5
    fraction = (q * f * f) + f
    exponent = tl.where(n == n, n, 0.0).to(tl.int32)
    if x.dtype.is_fp64():
        scale = ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    return scale * fraction + scale, scale * fraction + (scale - 1)
