"""grouped_mm against grouped_mm_ref."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gangline.kernels.grouped_mm import grouped_mm, grouped_mm_ref


def with_grads(function, x, w, rows, dy):
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = function(x, w, rows)
    y.backward(dy)
    return y.detach(), x.grad, w.grad


shapes = st.tuples(
    st.lists(st.integers(0, 9), min_size=1, max_size=5),
    st.sampled_from([1, 5, 16]),
    st.sampled_from([1, 7, 12]),
    st.integers(0, 2**31),
)


def draw(shape, dtype):
    rows, dim_in, dim_out, seed = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(rows), dim_in, generator=generator).to(dtype)
    w = torch.randn(len(rows), dim_in, dim_out, generator=generator).to(dtype)
    dy = torch.randn(sum(rows), dim_out, generator=generator).to(dtype)
    return x, w, torch.tensor(rows), dy


@settings(max_examples=40, deadline=None)
@given(shape=shapes)
def test_equals_the_reference_in_fp64(shape):
    inputs = draw(shape, torch.float64)
    truth = with_grads(grouped_mm_ref, *inputs)
    for name, ours, true in zip(
        ("y", "dx", "dw"), with_grads(grouped_mm, *inputs), truth, strict=True
    ):
        torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-12, msg=name)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(0, 70), min_size=1, max_size=5),
    dims=st.tuples(st.sampled_from([32, 64, 96]), st.sampled_from([32, 160])),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_a_block_is_bit_for_bit_what_it_is_alone(rows, dims, dtype, seed):
    x, w, rows, dy = draw((rows, *dims, seed), dtype)
    y, dx, dw = with_grads(grouped_mm, x, w, rows, dy)
    start = 0
    for expert, count in enumerate(rows.tolist()):
        block = slice(start, start + count)
        alone = with_grads(
            grouped_mm, x[block], w[expert : expert + 1], rows[expert : expert + 1], dy[block]
        )
        assert torch.equal(y[block], alone[0])
        assert torch.equal(dx[block], alone[1])
        assert torch.equal(dw[expert : expert + 1], alone[2])
        start += count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errs_at_most_twice_as_much_as_plain_torch(dtype):
    x, w, rows, dy = draw(([100, 0, 37, 63], 96, 80, 0), dtype)
    truth = with_grads(grouped_mm_ref, x.double(), w.double(), rows, dy.double())
    plain = with_grads(grouped_mm_ref, x, w, rows, dy)
    ours = with_grads(grouped_mm, x, w, rows, dy)
    for our, their, true in zip(ours, plain, truth, strict=True):
        error, allowed = (our - true).abs().max(), (their - true).abs().max()
        assert error <= 2 * allowed, f"{error} against {allowed}"


def test_takes_an_expanded_gradient():
    x = torch.randn(6, 4, requires_grad=True)
    w = torch.randn(2, 4, 3, requires_grad=True)
    grouped_mm(x, w, torch.tensor([2, 4])).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad[0], w.detach()[0].sum(1))


def test_leaves_out_gradients_that_nobody_wants():
    x = torch.randn(6, 4)
    w = torch.randn(2, 4, 3, requires_grad=True)
    grouped_mm(x, w, torch.tensor([6, 0])).sum().backward()
    assert x.grad is None
    assert w.grad is not None
    assert torch.equal(w.grad[1], torch.zeros(4, 3))


def test_refuses_counts_that_do_not_add_up():
    with pytest.raises(RuntimeError, match="split"):
        grouped_mm(torch.randn(6, 4), torch.randn(2, 4, 3), torch.tensor([2, 3]))
