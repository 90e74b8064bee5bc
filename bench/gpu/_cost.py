"""What each op has to move and multiply, and the time that takes at a GPU's published bandwidth and rate.

A pass takes at least as long as its matrix products (or the memory traffic inside them, if that is longer) and, after
one another with those, the sweeps that are no products. Left out: the launch of a kernel, a few microseconds; labels,
masks and statistics beside a vocabulary; and adding up dX over chunks of the vocabulary, which depends on the chunk.
Logits of the linear ops count as float32 [N, V] that goes to memory and comes back, unless a mode never makes them
whole and a cache holds a chunk: then the time is shorter. Where they stay in registers ("fused") nothing hides their
exponentials, which are counted then; elsewhere reading the logits takes longer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.gpu._cases import FROZEN, GpuCase
from bench.policy_terms import WITH_KL

FORWARD, BACKWARD, BOTH_PASSES = "forward", "backward", "forward + backward"
WITH_DX, WITH_DX_DW = "forward + dX", "forward + dX + dW"
STATISTIC_BYTES = 4  # logits that a product leaves are float32


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Published figures.

    Attributes:
        bandwidth: bytes a second.
        rate: floating-point operations a second in dense products of bfloat16.
        exp2: how many of those take the time of one exponential. A multiprocessor of compute capability 9.0 makes 16 in
            a cycle (CUDA C++ Programming Guide, arithmetic throughput) and multiplies with 4096 operations; a compute
            unit of CDNA3, at a quarter of the vector rate, 16 beside 2048.
    """

    name: str
    bandwidth: float
    rate: float
    exp2: float
    source: str

    def exponentials(self, count: float) -> float:
        """Seconds."""
        return count * self.exp2 / self.rate


CHIPS = (
    Chip(name="H100 SXM", bandwidth=3.35e12, rate=989e12, exp2=256, source="NVIDIA H100 Tensor Core GPU data sheet"),
    Chip(name="H200", bandwidth=4.8e12, rate=989e12, exp2=256, source="NVIDIA H200 Tensor Core GPU data sheet"),
    Chip(name="MI300X", bandwidth=5.3e12, rate=1307e12, exp2=128, source="AMD Instinct MI300X Accelerator data sheet"),
)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one pass in one mode.

    Attributes:
        sweeps: bytes that work other than products reads and writes.
        products: matrix products of rows x depth x vocabulary.
        flop: their operations.
        operands: bytes that products read and write.
        exponentials: those that no reading hides.
    """

    sweeps: float
    products: int = 0
    flop: float = 0
    operands: float = 0
    exponentials: float = 0

    @property
    def nbytes(self) -> float:
        return self.sweeps + self.operands

    def seconds(self, chip: Chip) -> float:
        products = max(self.flop / chip.rate, self.operands / chip.bandwidth)
        return products + self.sweeps / chip.bandwidth + chip.exponentials(self.exponentials)


Costs = dict[tuple[str, str], Cost]  # by pass and mode; the mode is "" where there is one alone


def costs(case: GpuCase) -> Costs:
    """Of every pass that is measured."""
    return _OPS[case.op](case)


def _token_stats(case: GpuCase) -> Costs:
    """Forward reads each logit once; backward reads it once and writes it once. Masked rows are not read."""
    rows, vocab = case.shape
    whole = rows * vocab * case.torch_dtype.itemsize
    read = whole * (100 - case.masked) / 100
    return {
        (FORWARD, ""): Cost(sweeps=read),
        (BACKWARD, ""): Cost(sweeps=read + whole),
        (BOTH_PASSES, ""): Cost(sweeps=2 * read + whole),
    }


def _token_kl(case: GpuCase) -> Costs:
    """Forward reads both rows once; backward reads them again and writes the policy's gradient."""
    rows, vocab = case.shape
    whole = rows * vocab * case.torch_dtype.itemsize
    return {(FORWARD, ""): Cost(sweeps=2 * whole), (BOTH_PASSES, ""): Cost(sweeps=5 * whole)}


class _Products:
    """Counts a linear op's products with what they read and write, and the sweeps between them."""

    def __init__(self, case: GpuCase) -> None:
        rows, self.depth, self.vocab = case.shape
        self.rows = rows * (100 - case.masked) / 100  # masked rows enter no product
        self.narrow = case.torch_dtype.itemsize
        self.logits = self.rows * self.vocab * STATISTIC_BYTES
        self.factors = self.rows * self.vocab * self.narrow  # the logits' gradient, an operand of products
        self.hidden = self.rows * self.depth * self.narrow
        self.head = self.vocab * self.depth * self.narrow

    def cost(self, *, logits: int, backward: int, trained: bool, sweeps: float, fused: bool = False) -> Cost:
        """`logits` products that make logits, and `backward` times that for dX, and for dW of a trained head.

        fused: the first of them leaves none.
        """
        products = logits + backward * (1 + trained)
        operands = logits * (self.hidden + self.head + self.logits) - fused * self.logits
        operands += backward * (self.factors + self.head + self.hidden)
        if trained:
            operands += backward * (self.factors + self.hidden + self.head)
        flop = 2 * self.rows * self.depth * self.vocab * products
        exponentials = fused * self.rows * self.vocab
        return Cost(sweeps=sweeps, products=products, flop=flop, operands=operands, exponentials=exponentials)


def _linear_token_stats(case: GpuCase) -> Costs:
    """One product forward; the modes differ in what backward makes again. See docs/performance.md."""
    count = _Products(case)
    read, differentiate = count.logits, count.logits + count.factors
    trained = case.outputs != FROZEN
    name = WITH_DX_DW if trained else WITH_DX
    result: Costs = {}
    if not trained:
        # The expectation of the head's rows is summed forward, by the second product; backward scales it.
        result[name, "frozen"] = count.cost(logits=1, backward=1, trained=False, sweeps=read + differentiate)
    else:
        result[FORWARD, ""] = count.cost(logits=1, backward=0, trained=False, sweeps=read)
        result[FORWARD, "fused"] = count.cost(logits=1, backward=0, trained=False, sweeps=0, fused=True)
        result[name, "keep"] = count.cost(logits=1, backward=1, trained=True, sweeps=read + differentiate)
        result[name, "recompute"] = count.cost(logits=2, backward=1, trained=True, sweeps=read + differentiate)
        result[name, "fused"] = count.cost(logits=2, backward=1, trained=True, sweeps=differentiate, fused=True)
    result[name, "one pass"] = count.cost(logits=1, backward=1, trained=trained, sweeps=read + differentiate)
    return result


def _linear_policy_ref_stats(case: GpuCase) -> Costs:
    """Two products forward, one a model; with training both again, dX and dW: six."""
    count = _Products(case)
    read = 2 * count.logits
    return {
        (FORWARD, ""): count.cost(logits=2, backward=0, trained=False, sweeps=read),
        (WITH_DX_DW, ""): count.cost(logits=4, backward=1, trained=True, sweeps=2 * read + count.factors),
    }


def _policy_terms(case: GpuCase) -> Costs:
    """Log-probs, old ones, with a penalty the reference's, the mask twice, the gradient written, read and written."""
    batch, length = case.shape
    arrays = 7 + (case.outputs == WITH_KL)
    return {(BOTH_PASSES, ""): Cost(sweeps=4 * arrays * batch * length)}


def _importance(case: GpuCase) -> Costs:
    """Both log-densities read, weights written; groups that come in order, so that nothing is sorted."""
    groups, samples = case.shape
    return {(FORWARD, ""): Cost(sweeps=12 * groups * samples)}


_OPS: dict[str, Callable[[GpuCase], Costs]] = {
    "token_stats": _token_stats,
    "token_kl": _token_kl,
    "linear_token_stats": _linear_token_stats,
    "linear_policy_ref_stats": _linear_policy_ref_stats,
    "policy_terms": _policy_terms,
    "importance": _importance,
}


def counted_flop(case: GpuCase, pass_name: str) -> int:
    """What rates of linear ops count, whatever a contender does: G forward, 3 G with dX, 4 G with dX and dW.

    G is one product over all rows. A pair of models counts 2 G and 6 G.
    """
    rows, depth, vocab = case.shape
    counts = {FORWARD: 1, WITH_DX: 3, WITH_DX_DW: 4}
    if case.op == "linear_policy_ref_stats":
        counts = {FORWARD: 2, WITH_DX_DW: 6}
    return 2 * rows * depth * vocab * counts[pass_name]
