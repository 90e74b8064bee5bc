"""How the kernels over a vocabulary walk a row: where it begins, its blocks, its logits as the statistics see them."""

import triton
import triton.language as tl

from irlfast.kernels._online_softmax import softcap_value


@triton.jit
def row_offset(row, inner, outer_stride, inner_stride):
    """Where a row begins, in 64 bits."""
    return (row // inner) * outer_stride + (row % inner) * inner_stride


@triton.jit
def temperature_of(row, row_temperature, temperature):
    """T of a row, NaN where it is no positive number."""
    if row_temperature is not None:
        temperature = tl.load(row_temperature + row)
        temperature = tl.where((temperature > 0.0) & (temperature < float("inf")), temperature, float("nan"))
    return temperature


@triton.jit
def block_columns(LANES: tl.constexpr, VECTOR: tl.constexpr):
    """[LANES, VECTOR]: the columns of a block."""
    return tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def capped(logits, softcap, SOFTCAP: tl.constexpr):
    """Logits as the statistics see them: float32, after the softcap where there is one."""
    logits = logits.to(tl.float32)
    if SOFTCAP:
        logits = softcap_value(logits, softcap)
    return logits


@triton.jit
def last_block(base, columns, end, softcap, SOFTCAP: tl.constexpr):
    """The logits of the block that the row ends in. What lies beyond is -inf, as no softcap would leave it."""
    logits = capped(tl.load(base + columns, mask=columns < end, other=0.0), softcap, SOFTCAP)
    return tl.where(columns < end, logits, float("-inf"))


@triton.jit
def slope_of_capped(value, softcap, SOFTCAP: tl.constexpr):
    """dl / dlogit where the softcapped logit l is `value`: 1 - tanh^2, or 1 without a softcap."""
    slope = 1.0
    if SOFTCAP:
        slope = (1.0 - value / softcap) * (1.0 + value / softcap)
    return slope
