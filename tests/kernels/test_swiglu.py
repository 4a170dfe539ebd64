"""swiglu against swiglu_ref."""

import pytest
import torch

from gangline.kernels import swiglu as module
from gangline.kernels.swiglu import swiglu, swiglu_ref


def with_grad(function, gate_up, dy):
    gate_up = gate_up.detach().requires_grad_()
    y = function(gate_up)
    y.backward(dy)
    return y.detach(), gate_up.grad


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 14), (0, 6), (61, 122)])
@pytest.mark.parametrize("block_elements", [1, 300, 1 << 18])
def test_equals_the_reference_in_fp64(shape, block_elements, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", block_elements)
    gate_up = torch.randn(shape, dtype=torch.float64) * 4
    dy = torch.randn((*shape[:-1], shape[-1] // 2), dtype=torch.float64)
    for ours, truth in zip(
        with_grad(swiglu, gate_up, dy), with_grad(swiglu_ref, gate_up, dy), strict=True
    ):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def test_takes_gradients_that_are_not_contiguous():
    gate_up = torch.randn(6, 8, dtype=torch.float64)
    dy = torch.randn(4, 6, dtype=torch.float64).t()
    for ours, truth in zip(
        with_grad(swiglu, gate_up, dy), with_grad(swiglu_ref, gate_up, dy), strict=True
    ):
        torch.testing.assert_close(ours, truth)
    expanded = torch.ones((), dtype=torch.float64).expand(6, 4)
    torch.testing.assert_close(
        with_grad(swiglu, gate_up, expanded)[1], with_grad(swiglu_ref, gate_up, expanded)[1]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errs_at_most_twice_as_much_as_plain_torch(dtype):
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(300, 128, generator=generator).to(dtype)
    dy = torch.randn(300, 64, generator=generator).to(dtype)
    truth = with_grad(swiglu_ref, gate_up.double(), dy.double())
    plain = with_grad(swiglu_ref, gate_up, dy)
    for ours, theirs, true in zip(with_grad(swiglu, gate_up, dy), plain, truth, strict=True):
        assert ours.dtype == dtype
        error, allowed = (ours - true).abs().max(), (theirs - true).abs().max()
        assert error <= 2 * allowed, f"{error} against {allowed}"
