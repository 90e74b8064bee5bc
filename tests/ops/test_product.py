from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from irlfast import _native
from irlfast.ops import _product
from irlfast.ops._product import operand_dtype, product

NATIVE = _native.bf16_product_available()
BF16 = torch.bfloat16
needs_native = pytest.mark.skipif(not NATIVE, reason="this processor or compiler has no AVX512_BF16")

# Half a unit in the last place of float32; what one sum of K products may be off by, in units of sum |a||b|.
U = 2.0**-24
SUM = 4 * U
LAYOUTS = [(False, False), (False, True), (True, False), (True, True)]

# (M, N, K), on both sides of: tiles of 6 rows and 64 columns in vectors of 16, pairs and lines of 32 along K; packing
# by 192 rows and 128 columns, tasks of 192 x 256; panels of 1024 x 2048; blocks of 1024 along K, of which the last two
# have two and three.
SIZES = [
    *[(1, 1, 1), (6, 64, 2), (7, 65, 31), (5, 15, 33), (13, 17, 64)],
    *[(200, 260, 65), (1030, 70, 40), (20, 2050, 40), (9, 70, 1024), (12, 33, 1025), (25, 130, 2100)],
]


@pytest.fixture(params=[pytest.param("native", marks=needs_native), "fallback"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to multiply bfloat16 matrices."""
    if request.param == "fallback":
        monkeypatch.setattr(_product, "_NATIVE", False)
        monkeypatch.setattr(_product, "_BLOCK", 3000)  # so that there are several blocks
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def matrix(rows: int, columns: int, transposed: bool = False, dtype: torch.dtype = BF16) -> Tensor:
    if transposed:
        return torch.randn(columns, rows).to(dtype).t()
    return torch.randn(rows, columns).to(dtype)


def assert_right(out: Tensor, a: Tensor, b: Tensor, before: Tensor | None = None) -> None:
    """Within a few roundings of the sum of magnitudes, and one rounding to out's type."""
    exact, magnitude = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    if before is not None:
        exact, magnitude = exact + before.double(), magnitude + before.double().abs()
    rounding = {BF16: 2.0**-8, torch.float16: 2.0**-11}.get(out.dtype, 0.0)
    excess = (out.double() - exact).abs() - SUM * magnitude - rounding * exact.abs()
    assert not out.isnan().any()
    assert excess.numel() == 0 or float(excess.max()) <= 0.0


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize(("a_transposed", "b_transposed"), LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.usefixtures("way")
def test_matches_float64(
    size: tuple[int, int, int], a_transposed: bool, b_transposed: bool, dtype: torch.dtype, accumulate: bool
) -> None:
    torch.manual_seed(0)
    m, n, k = size
    a, b = matrix(m, k, a_transposed), matrix(k, n, b_transposed)
    out = torch.randn(m, n).to(dtype)
    before = out.clone()
    if not accumulate:
        out.fill_(math.nan)  # what it holds must not matter
    assert product(a, b, out, accumulate=accumulate) is out
    assert_right(out, a, b, before if accumulate else None)


@pytest.mark.usefixtures("way")
def test_logits_are_not_rounded_to_bfloat16() -> None:
    """Hidden states times a head: errors of float32, where torch.mm has those of bfloat16."""
    torch.manual_seed(1)
    hidden, weight = matrix(96, 768), matrix(1000, 768)
    exact = hidden.double() @ weight.double().t()
    magnitude = hidden.double().abs() @ weight.double().abs().t()
    ours = product(hidden, weight.t(), torch.empty(96, 1000))
    assert float(((ours - exact).abs() / magnitude).max()) <= 3e-7
    assert float((ours - exact).square().mean().sqrt()) < 1e-3 * float(
        (torch.mm(hidden, weight.t()) - exact).square().mean().sqrt()
    )


@needs_native
def test_sums_of_one_sign_keep_their_digits() -> None:
    """The worst case, as no rounding error meets another: 151936 terms, in blocks."""
    torch.manual_seed(2)
    a, b = torch.rand(3, 151_936).to(BF16), torch.rand(151_936, 5).to(BF16)
    exact = a.double() @ b.double()
    assert float(((product(a, b, torch.empty(3, 5)) - exact) / exact).abs().max()) <= 8 * U


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.usefixtures("way")
def test_slices_of_larger_tensors(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    a, b = matrix(40, 100)[3:33, 7:80], matrix(200, 90, True)[5:78, 1:71]
    whole = torch.full((32, 80), 7.0, dtype=dtype)
    product(a, b, whole[1:31, 4:74])
    assert_right(whole[1:31, 4:74], a, b)
    whole[1:31, 4:74] = 7.0
    assert bool((whole == 7.0).all())


@pytest.mark.usefixtures("way")
def test_operands_and_results_that_are_adjacent_in_no_dimension() -> None:
    torch.manual_seed(4)
    a, b = matrix(30, 80)[::2, ::2], matrix(1, 70).expand(40, 70)
    out = torch.randn(70, 30).t()[::2]
    before = out.clone()
    product(a, b, out, accumulate=True)
    assert_right(out, a, b, before)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("size", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)], ids=str)
@pytest.mark.usefixtures("way")
def test_empty(size: tuple[int, int, int], accumulate: bool) -> None:
    m, n, k = size
    for dtype in (torch.float32, BF16):
        out = torch.full((m, n + 1), 5.0, dtype=dtype)
        product(matrix(m, k), matrix(k, n), out[:, :n], accumulate=accumulate)
        assert bool((out[:, :n] == (5.0 if accumulate else 0.0)).all())
        assert bool((out[:, n:] == 5.0).all())


@pytest.mark.usefixtures("way")
def test_infinity_and_nan_spread_as_in_any_sum() -> None:
    """Into their row or column alone: an odd K and ragged edges are padded with zeros, which must not meet them."""
    torch.manual_seed(5)
    a, b = matrix(8, 33), matrix(33, 70)
    a[1, 32], a[2, 3], a[3, 4], a[3, 5], b[7, 69] = math.inf, math.nan, math.inf, -math.inf, -math.inf
    b[4:6] = b[4:6].abs() + 1
    out = product(a, b, torch.empty(8, 70))
    exact = a.double() @ b.double()
    assert torch.equal(out.isnan(), exact.isnan())
    assert torch.equal(out.isinf(), exact.isinf())
    assert torch.equal(out[exact.isinf()].double(), exact[exact.isinf()])
    assert not out[[0, 4, 5, 6, 7], :69].isinf().any()


@needs_native
def test_subnormal_numbers_are_zero() -> None:
    """Operands and products; documented, as the processor has no other mode."""
    tiny = torch.tensor([[2.0**-130]], dtype=BF16)
    small = torch.tensor([[2.0**-70]], dtype=BF16)
    assert float(tiny) > 0
    assert float(product(tiny, torch.ones(1, 1, dtype=BF16), torch.empty(1, 1))) == 0.0
    assert float(product(small, small, torch.empty(1, 1))) == 0.0


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("depth", [300, 1100])  # one block along K, and two
def test_an_element_has_the_same_bits_whatever_is_around_it(
    depth: int, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    torch.manual_seed(6)
    m, n = 1030, 2060
    a, b = matrix(m, depth), matrix(depth, n, True)
    before = torch.randn(m, n).to(dtype)
    threads(1)
    whole = product(a, b, before.clone(), accumulate=True)
    # Other threads, layouts, batches and chunks; each crosses tiles elsewhere.
    for count in (2, 3):
        threads(count)
        assert torch.equal(product(a, b, before.clone(), accumulate=True), whole), count
    threads(1)
    assert torch.equal(product(a.t().contiguous().t(), b.contiguous(), before.clone(), accumulate=True), whole)
    for rows in (slice(0, 1), slice(5, 12), slice(1023, 1030)):
        assert torch.equal(product(a[rows], b, before[rows].clone(), accumulate=True), whole[rows]), rows
    for columns in (slice(0, 1), slice(3, 70), slice(1000, 2060)):
        part = before[:, columns].clone()
        assert torch.equal(product(a, b[:, columns], part, accumulate=True), whole[:, columns]), columns


@needs_native
def test_another_order_of_additions_would_show() -> None:
    """What the test above relies on: sums cut elsewhere along K have other bits."""
    torch.manual_seed(6)
    a, b = matrix(40, 300), matrix(300, 50)
    whole = product(a, b, torch.empty(40, 50))
    halves = product(a[:, :150], b[:150], torch.empty(40, 50))
    product(a[:, 150:], b[150:], halves, accumulate=True)
    assert not torch.equal(whole, halves)
    torch.testing.assert_close(whole, halves)


@needs_native
def test_scratch_stays_below_8_mib(tmp_path: Path) -> None:
    """In a fresh process: the largest panels, those beside sums in float32, and then nothing more."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc/self/status")
    script = tmp_path / "scratch.py"
    script.write_text(
        "import torch\n"
        "from pathlib import Path\n"
        "from irlfast.ops._product import product\n"
        "def resident():\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return int(next(x for x in lines if x.startswith('VmRSS')).split()[1]) / 1024\n"
        "torch.set_num_threads(1)\n"
        "x, w = torch.ones(1100, 3000).bfloat16(), torch.ones(3000, 2100).bfloat16()\n"
        "outs = [torch.ones(1100, 2100), torch.ones(1100, 2100).bfloat16()]\n"
        "product(x[:1, :1], w[:1, :1], outs[0][:1, :1])\n"
        "before = resident()\n"
        "for out in outs:\n"
        "    product(x, w, out)\n"
        "    print(resident() - before)\n"
    )
    done = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, check=True)
    grown = [float(line) for line in done.stdout.split()]
    assert len(grown) == 2
    # The first call has 2 MiB already.
    assert max(grown) + 2 <= 8


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(
    ("a_dtype", "b_dtype", "out_dtype"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float64, torch.float64, torch.float64),
        (torch.float16, torch.float16, torch.float32),
        (torch.float16, torch.float16, torch.float16),
        (torch.float32, BF16, torch.float32),
        (BF16, torch.float32, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float32, BF16),
        (BF16, BF16, torch.float16),
    ],
)
def test_other_types(a_dtype: torch.dtype, b_dtype: torch.dtype, out_dtype: torch.dtype, accumulate: bool) -> None:
    torch.manual_seed(7)
    a, b = matrix(70, 50, dtype=a_dtype), matrix(50, 90, True, dtype=b_dtype)
    before = torch.randn(70, 90).to(out_dtype)
    out = product(a, b, before.clone(), accumulate=accumulate)
    assert out.dtype == out_dtype
    assert_right(out, a, b, before if accumulate else None)
    if out_dtype == torch.float64:
        exact = a @ b + before if accumulate else a @ b
        torch.testing.assert_close(out, exact, rtol=1e-12, atol=1e-12)


def test_factors_are_made_in_the_type_that_multiplies_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    types = (torch.float64, torch.float32, torch.float16, BF16)
    for native, expected in ((True, BF16), (False, torch.float32)):
        monkeypatch.setattr(_product, "_NATIVE", native)
        found = [operand_dtype(torch.empty(0, dtype=dtype)) for dtype in types]
        assert found == [torch.float64, torch.float32, torch.float32, expected]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("out_dtype", [torch.float32, BF16], ids=str)
def test_cuda(out_dtype: torch.dtype, accumulate: bool) -> None:
    torch.manual_seed(8)
    a, b = matrix(70, 512).cuda(), matrix(512, 96, True).cuda()
    before = torch.randn(70, 96, device="cuda").to(out_dtype)
    out = product(a, b, before.clone(), accumulate=accumulate)
    assert_right(out, a, b, before if accumulate else None)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"shapes \(2, 3\) @ \(4, 5\) -> \(2, 5\), expected \[M, K\] @ \[K, N\]"):
        product(matrix(2, 3), matrix(4, 5), torch.empty(2, 5))
    with pytest.raises(ValueError, match=r"-> \(5, 2\)"):
        product(matrix(2, 3), matrix(3, 5), torch.empty(5, 2))


@needs_native
def test_rows_of_the_result_must_not_overlap() -> None:
    with pytest.raises(ValueError, match="out_stride = 0 is below the 5 columns: rows of out overlap"):
        product(matrix(2, 3), matrix(3, 5), torch.empty(5).expand(2, 5))


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a_strides": (2, 3)}, r"a has strides \(2, 3\), expected one of them to be 1"),
        ({"b": 0}, "b is a null pointer"),
        ({"out_dtype": _native.DTYPES["float64"]}, "neither float32 nor bfloat16"),
        ({"shape": (1, -1, 1)}, "negative extent"),
    ],
)
def test_the_binding_checks_its_arguments(change: dict[str, object], message: str) -> None:
    a, out = matrix(4, 4), torch.empty(4, 4)
    arguments: dict[str, object] = {
        "a": a.data_ptr(),
        "a_strides": (4, 1),
        "b": a.data_ptr(),
        "b_strides": (4, 1),
        "out": out.data_ptr(),
        "out_stride": 4,
        "out_dtype": _native.DTYPES["float32"],
        "shape": (4, 4, 4),
        "accumulate": False,
        "threads": 1,
    }
    with pytest.raises(ValueError, match=message):
        _native.bf16_product(**{**arguments, **change})  # type: ignore[arg-type]
