"""linear_token_stats with mode="fused" on a GPU: two launches forward, and no logits in memory. Nothing here waits.

Backward is that of mode="recompute", from the state that forward leaves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from irlfast.ops._linear_modes import Outputs
from irlfast.ops._triton import interpreted, on_device, target_of

if TYPE_CHECKING:
    from irlfast.kernels._tuning import ProductConfig

# Rows that one program of the second launch finishes, and its warps: a number of the first's SPLITS for each thread.
_FINISH_ROWS, _FINISH_WARPS = 32, 4


def forward_fused(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    *,
    config: ProductConfig | None = None,
) -> Outputs:
    """As `forward_chunked`. config replaces what the tuning table says, for tests."""
    from irlfast.kernels._linear_fused import linear_fused_finish, linear_fused_parts

    hidden, weight = _adjacent(hidden), _adjacent(weight)
    labels = labels.contiguous()
    (rows, depth), vocab = hidden.shape, weight.shape[0]
    logprob, entropy, lse = (hidden.new_empty((rows,), dtype=torch.float32) for _ in range(3))
    state = hidden.new_empty((4, rows), dtype=torch.float32)
    nothing = hidden.new_empty((0,), dtype=torch.float32)
    if rows == 0:
        return logprob, entropy, lse, state, nothing
    if hidden.dtype == torch.bfloat16 and hidden.is_cpu and interpreted():
        hidden, weight = hidden.float(), weight.float()  # the interpreter multiplies the bits of bfloat16 as integers
    config = config or config_for(hidden, weight)
    parts = hidden.new_empty((4, config.splits, rows), dtype=torch.float32)
    operands: tuple[Any, Any] = (hidden, weight)
    if config.descriptors:
        operands = _tiles(hidden, config.rows, config.depth), _tiles(weight, config.vocab, config.depth)
    options = {} if config.matrix is None else {"matrix_instr_nonkdim": config.matrix}
    with on_device(hidden):
        linear_fused_parts[(-(-rows // config.rows) * config.splits,)](
            *operands,
            None if bias is None else bias.contiguous(),
            labels,
            row_temperature,
            parts,
            rows,
            depth,
            vocab,
            hidden.stride(0),
            weight.stride(0),
            config.splits,
            ignore_index,
            float(temperature),  # of an int Triton would make a constant, and a kernel for each
            float(softcap),
            softcap != 0.0,
            config.descriptors,
            config.rows,
            config.vocab,
            config.depth,
            config.strip,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
            **options,
        )
        linear_fused_finish[(-(-rows // _FINISH_ROWS),)](
            parts,
            labels,
            row_temperature,
            logprob,
            entropy,
            lse,
            state,
            rows,
            vocab,
            ignore_index,
            float(temperature),
            config.splits,
            _FINISH_ROWS,
            num_warps=_FINISH_WARPS,
            enable_fp_fusion=True,
        )
    return logprob, entropy, lse, state, nothing


def config_for(hidden: Tensor, weight: Tensor) -> ProductConfig:
    """The tuning table's entry; for the CPU, whose interpreter takes anything, the fallback."""
    from irlfast.kernels._tuning import product_config

    target = "" if hidden.device.index is None else target_of(hidden.device.index)
    aligned = begins_at_16_bytes(hidden) and begins_at_16_bytes(weight)
    return product_config(target, hidden.element_size(), hidden.shape[1], weight.shape[0], aligned)


def begins_at_16_bytes(matrix: Tensor) -> bool:
    """Whether each row of adjacent elements does, in memory of its own: what wide loads and descriptors take."""
    stride = matrix.stride(0)
    return matrix.data_ptr() % 16 == 0 and stride * matrix.element_size() % 16 == 0 and stride >= matrix.shape[1] > 0


def _adjacent(matrix: Tensor) -> Tensor:
    """The matrix with each row's elements adjacent; a copy where they are not, as in the transpose of another."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _tiles(matrix: Tensor, rows: int, columns: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])
