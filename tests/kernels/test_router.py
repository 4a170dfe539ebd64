"""route against route_ref."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gangline.kernels.router import route, route_ref


@settings(max_examples=40, deadline=None)
@given(
    num_tokens=st.integers(0, 20),
    num_experts=st.integers(1, 9),
    data=st.data(),
    seed=st.integers(0, 2**31),
)
def test_equals_the_reference_in_fp64(num_tokens, num_experts, data, seed):
    top_k = data.draw(st.integers(1, num_experts))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(num_tokens, num_experts, dtype=torch.float64, generator=generator) * 5
    dy = torch.randn(num_tokens, top_k, dtype=torch.float64, generator=generator)
    results = []
    for function in (route, route_ref):
        logits = scores.clone().requires_grad_()
        weights, ids = function(logits, top_k)
        weights.backward(dy)
        results.append((weights.detach(), ids, logits.grad))
    (weights, ids, grad), (weights_ref, ids_ref, grad_ref) = results
    assert torch.equal(ids, ids_ref)
    torch.testing.assert_close(weights, weights_ref, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad, grad_ref, rtol=1e-8, atol=1e-12)
    if top_k > 1:
        torch.testing.assert_close(weights.sum(-1), torch.ones(num_tokens, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_stays_finite_where_the_probabilities_underflow(scale):
    logits = (torch.tensor([[3.0, 1.0, 2.0, 0.0]]) * scale).requires_grad_()
    weights, ids = route(logits, 2)
    weights.sum().backward()
    assert ids.tolist() == [[0, 2]]
    assert weights.tolist() == [[1.0, 0.0]]
    assert torch.isfinite(logits.grad).all()


def test_one_choice_still_teaches_the_router():
    logits = torch.randn(4, 3, requires_grad=True)
    weights, _ = route(logits, 1)
    weights.sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().min() > 0
