"""rms_norm against rms_norm_ref."""

import pytest
import torch

from gangline.kernels.rms_norm import rms_norm, rms_norm_ref


def with_grads(function, x, weight, dy):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = function(x, weight, 1e-5)
    y.backward(dy)
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize("shape", [(5, 8), (3, 7, 63), (1, 1), (0, 16), (60, 123)])
def test_equals_the_reference_in_fp64(shape):
    x = torch.randn(shape, dtype=torch.float64) * 3
    weight = torch.randn(shape[-1], dtype=torch.float64)
    dy = torch.randn(shape, dtype=torch.float64)
    for ours, truth in zip(
        with_grads(rms_norm, x, weight, dy), with_grads(rms_norm_ref, x, weight, dy), strict=True
    ):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errs_at_most_twice_as_much_as_plain_torch(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(257, 96, generator=generator).to(dtype)
    weight = torch.randn(96, generator=generator)
    dy = torch.randn(257, 96, generator=generator).to(dtype)
    truth = with_grads(rms_norm_ref, x.double(), weight.double(), dy.double())
    plain = with_grads(rms_norm_ref, x, weight, dy)
    for ours, theirs, true in zip(with_grads(rms_norm, x, weight, dy), plain, truth, strict=True):
        assert ours.dtype == theirs.dtype
        error, allowed = (ours - true).abs().max(), (theirs - true).abs().max()
        assert error <= 2 * allowed, f"{error} against {allowed}"
