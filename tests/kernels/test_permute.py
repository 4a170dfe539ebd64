"""permute and unpermute against their references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gangline.kernels.permute import (
    permute,
    permute_ref,
    plan_permutation,
    unpermute,
    unpermute_ref,
)

routings = st.tuples(
    st.integers(0, 12), st.integers(1, 3), st.integers(1, 6), st.integers(0, 2**31)
)


def draw(routing):
    """Return (expert ids [T, K], num_experts, generator); some experts get nothing."""
    num_tokens, num_choices, num_experts, seed = routing
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, num_experts, (num_tokens, num_choices), generator=generator)
    return ids, num_experts + 1, generator


@settings(max_examples=60, deadline=None)
@given(routing=routings, capacity=st.none() | st.integers(1, 6))
def test_the_plan_keeps_the_order_of_expert_then_token(routing, capacity):
    ids, num_experts, _ = draw(routing)
    plan = plan_permutation(ids, num_experts, capacity=capacity)
    num_choices = ids.shape[1]
    wanted = []
    for expert in range(num_experts):
        choices = [c for c, chosen in enumerate(ids.flatten().tolist()) if chosen == expert]
        wanted.append(choices[:capacity])
    flat = [choice for choices in wanted for choice in choices]
    assert plan.choice_of_row_R.tolist() == flat
    assert plan.token_of_row_R.tolist() == [choice // num_choices for choice in flat]
    assert plan.rows_per_expert_E.tolist() == [len(choices) for choices in wanted]
    row_of_choice = plan.row_of_choice_TK.flatten().tolist()
    for choice in range(ids.numel()):
        kept = plan.kept_TK is None or bool(plan.kept_TK.flatten()[choice])
        assert kept == (choice in flat)
        assert row_of_choice[choice] == (flat.index(choice) if kept else 0)


@settings(max_examples=60, deadline=None)
@given(routing=routings, capacity=st.none() | st.integers(1, 6), dim=st.sampled_from([1, 5, 16]))
def test_there_and_back_equal_the_references_in_fp64(routing, capacity, dim):
    ids, num_experts, generator = draw(routing)
    plan = plan_permutation(ids, num_experts, capacity=capacity)
    num_rows = len(plan.choice_of_row_R)

    def noise(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    x, drows = noise(len(ids), dim), noise(num_rows, dim)
    rows, weights, dy = noise(num_rows, dim), noise(*ids.shape), noise(len(ids), dim)
    results = []
    for there, back in ((permute, unpermute), (permute_ref, unpermute_ref)):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, rows, weights)]
        sent = there(leaves[0], plan)
        sent.backward(drows)
        summed = back(leaves[1], leaves[2], plan)
        summed.backward(dy)
        results.append([sent.detach(), summed.detach(), *(leaf.grad for leaf in leaves)])
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpermute_errs_at_most_twice_as_much_as_plain_torch(dtype):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 4, (200, 2), generator=generator)
    plan = plan_permutation(ids, 4)
    rows = torch.randn(400, 32, generator=generator).to(dtype)
    weights = torch.rand(200, 2, generator=generator)
    truth = unpermute_ref(rows.double(), weights.double(), plan)
    error = (unpermute(rows, weights, plan) - truth).abs().max()
    allowed = (unpermute_ref(rows, weights, plan) - truth).abs().max()
    assert error <= 2 * allowed, f"{error} against {allowed}"
