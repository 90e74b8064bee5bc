import pytest
import torch

from irlfast.rewards import pool

MASK = torch.tensor(
    [
        [False, True, True, False, False],  # right-padded
        [False, False, False, True, True],  # left-padded
        [True, False, True, False, True],  # holes
        [False, False, False, False, False],  # empty
    ]
)


def hidden_states() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(4, 5, 3, dtype=torch.float64)


def test_last_mean_and_max_by_hand():
    hidden = hidden_states()
    rows = [[hidden[b, t] for t in range(5) if MASK[b, t]] for b in range(3)]
    last = torch.stack([row[-1] for row in rows])
    mean = torch.stack([torch.stack(row).sum(0) / len(row) for row in rows])
    largest = torch.stack([torch.stack(row).amax(0) for row in rows])
    torch.testing.assert_close(pool(hidden, MASK, "last")[:3], last, rtol=0, atol=0)
    torch.testing.assert_close(pool(hidden, MASK, "mean")[:3], mean, rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(pool(hidden, MASK, "max")[:3], largest, rtol=0, atol=0)
    both = pool(hidden, MASK, ("max", "last"))
    assert torch.equal(both[:3], torch.cat([largest, last], -1))


@pytest.mark.parametrize("kind", ["last", "mean", "max", ("last", "mean", "max")])
def test_an_empty_row_pools_to_zero_with_zero_gradient(kind):
    hidden = hidden_states()
    hidden[3] = float("nan")
    hidden.requires_grad_()
    pooled = pool(hidden, MASK, kind)
    assert pooled[3].abs().max() == 0.0
    pooled.sum().backward()
    assert hidden.grad[3].abs().max() == 0.0


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 1e38])
@pytest.mark.parametrize("kind", ["last", "mean", "max"])
def test_what_stands_outside_the_mask_is_never_read(kind, garbage):
    clean = hidden_states()
    dirty = clean.masked_fill(~MASK[..., None], garbage).requires_grad_()
    pooled = pool(dirty, MASK, kind)
    assert torch.equal(pooled, pool(clean, MASK, kind))
    pooled.square().sum().backward()
    assert dirty.grad.isfinite().all()
    assert dirty.grad[~MASK].abs().max() == 0.0
    assert (dirty.grad[MASK].abs().sum() > 0).all()


@pytest.mark.parametrize("kind", ["last", "mean", "max", ("last", "mean", "max")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_padding_on_either_side_gives_the_same_bits(kind, dtype):
    # 3 to 300 more columns cross the block sizes at which a plain float32 sum changes its order.
    torch.manual_seed(0)
    hidden = torch.randn(6, 37, 65).mul(10).to(dtype)
    mask = torch.rand(6, 37) < 0.7
    expected = pool(hidden, mask, kind)
    assert expected.dtype == torch.float32
    for left, right in [(0, 3), (5, 0), (17, 300), (129, 64)]:
        pad = (0, 0, left, right)
        wider = torch.nn.functional.pad(hidden, pad, value=7.0)
        assert torch.equal(pool(wider, torch.nn.functional.pad(mask, pad[2:]), kind), expected)


@pytest.mark.parametrize("kind", ["last", "mean", "max"])
def test_gradient(kind):
    hidden = hidden_states().requires_grad_()
    assert torch.autograd.gradcheck(lambda h: pool(h, MASK, kind), hidden)


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3)])
def test_no_rows_and_no_positions(shape):
    pooled = pool(torch.zeros(shape), torch.zeros(shape[:2], dtype=torch.bool), ("last", "mean"))
    assert pooled.shape == (shape[0], 6)
    assert pooled.count_nonzero() == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)), ValueError, r"shape \[B, S, H\], got \[2, 3\]"),
        ((torch.zeros(2, 3, 4), torch.ones(2, 4, dtype=torch.bool)), ValueError, r"shape \[2, 3\], got \[2, 4\]"),
        ((torch.zeros(2, 3, 4), torch.ones(2, 3)), TypeError, "mask must be bool, got torch.float32"),
        ((torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool), "sum"), ValueError, "pooling 'sum' is unknown"),
        ((torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool), ()), ValueError, "pooling is empty"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        pool(*arguments)
