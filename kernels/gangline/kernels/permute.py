"""Sort token rows by expert, and bring the experts' rows back to their tokens.

A token has K choices of experts; each choice becomes one row. Rows are ordered by expert and,
within an expert, by token, so that the order depends on nothing but the routing.

T = tokens, K = choices of a token, R = rows = T*K less the dropped, E = experts, D = model dim
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Permutation:
    """Say which row belongs to which choice; index tensors only, on the device of the ids."""

    choice_of_row_R: Tensor  # int64, t * K + k
    token_of_row_R: Tensor  # int64, t
    row_of_choice_TK: Tensor  # int64; 0 where the choice was dropped
    kept_TK: Tensor | None  # bool; None when nothing can be dropped
    rows_per_expert_E: Tensor  # int64, sums to R


def plan_permutation(
    ids_TK: Tensor, num_experts: int, *, capacity: int | None = None
) -> Permutation:
    """Order the choices by (expert, token); keep at most `capacity` of each expert.

    What does not fit is dropped from the end: the last tokens of an expert that overflows.

    Shapes: ids_TK [T, K] int64 in [0, E).
    """
    num_choices = ids_TK.numel()
    flat = ids_TK.flatten()
    order = flat.argsort(stable=True)
    rows_per_expert_E = torch.bincount(flat, minlength=num_experts)
    kept_TK = None
    if capacity is not None:
        starts_E = rows_per_expert_E.cumsum(0) - rows_per_expert_E
        place = torch.arange(num_choices, device=flat.device) - starts_E[flat[order]]
        fits = place < capacity
        kept_TK = torch.empty_like(flat, dtype=torch.bool).scatter_(0, order, fits)
        kept_TK = kept_TK.view_as(ids_TK)
        order = order[fits]
        rows_per_expert_E = rows_per_expert_E.clamp(max=capacity)
    row_of_choice = torch.zeros_like(flat)
    row_of_choice[order] = torch.arange(order.numel(), device=flat.device)
    return Permutation(
        choice_of_row_R=order,
        token_of_row_R=order.div(max(ids_TK.shape[1], 1), rounding_mode="floor"),
        row_of_choice_TK=row_of_choice.view_as(ids_TK),
        kept_TK=kept_TK,
        rows_per_expert_E=rows_per_expert_E,
    )


def permute_ref(x_TD: Tensor, plan: Permutation) -> Tensor:
    """Copy each token to its rows, in plain torch; the truth for `permute`."""
    return x_TD[plan.token_of_row_R]


def permute(x_TD: Tensor, plan: Permutation) -> Tensor:
    """Copy each token to its rows.

    Shapes: x_TD [T, D]; returns [R, D].
    """
    apply: Callable[..., Tensor] = _Permute.apply
    return apply(x_TD, plan)


def unpermute_ref(rows_RD: Tensor, weights_TK: Tensor, plan: Permutation) -> Tensor:
    """Sum the weighted rows of each token, in plain torch; the truth for `unpermute`."""
    weighted = rows_RD * weights_TK.flatten()[plan.choice_of_row_R].to(rows_RD.dtype)[:, None]
    out = rows_RD.new_zeros(weights_TK.shape[0], rows_RD.shape[1])
    return out.index_add(0, plan.token_of_row_R, weighted)


def unpermute(rows_RD: Tensor, weights_TK: Tensor, plan: Permutation) -> Tensor:
    """Sum the weighted rows of each token; a dropped choice adds nothing.

    Shapes: rows_RD [R, D]; weights_TK [T, K]; returns [T, D] in the dtype of the rows.
    """
    apply: Callable[..., Tensor] = _Unpermute.apply
    return apply(rows_RD, weights_TK, plan)


def sum_rows(rows_RD: Tensor, plan: Permutation, weights_TK: Tensor | None = None) -> Tensor:
    """Sum the rows of each token, weighted or as they are. Not differentiable.

    Shapes: rows_RD [R, D], contiguous; returns [T, D].
    Guarantees: a token's rows are added in the order of its choices, whatever the plan.
    """
    # embedding_bag gathers, weighs and sums in one pass and in a fixed order: 0.04 ms for
    # [4096, 128] on one core, where gather, multiply and sum take 0.21 and index_add 0.08.
    num_tokens, num_choices = plan.row_of_choice_TK.shape
    if rows_RD.shape[0] == 0 or num_choices == 0:
        return rows_RD.new_zeros(num_tokens, rows_RD.shape[1])
    if plan.kept_TK is not None:
        ones = torch.ones_like(plan.kept_TK, dtype=rows_RD.dtype)
        weights_TK = (ones if weights_TK is None else weights_TK) * plan.kept_TK
    if weights_TK is not None:
        weights_TK = weights_TK.to(rows_RD.dtype)
    return functional.embedding_bag(
        plan.row_of_choice_TK, rows_RD, mode="sum", per_sample_weights=weights_TK
    )


def weights_of_rows(weights_TK: Tensor, plan: Permutation, dtype: torch.dtype) -> Tensor:
    """Return the weight of each row, in the dtype of the rows. Not differentiable.

    Shapes: returns [R].
    """
    return weights_TK.reshape(-1)[plan.choice_of_row_R].to(dtype)


def weight_gradients(
    rows_RD: Tensor, dy_TD: Tensor, weights_TK: Tensor, plan: Permutation
) -> Tensor:
    """Return the gradient of the weights of `unpermute`.

    Shapes: rows_RD [R, D], dy_TD [T, D]; returns [T, K].
    """
    # Each row has one choice, so the gradients of the weights are dot products, scattered.
    dy_of_row = dy_TD.index_select(0, plan.token_of_row_R)
    dots_R = dy_of_row.mul_(rows_RD).sum(-1, dtype=weights_TK.dtype)
    dweights = torch.zeros_like(weights_TK).view(-1)
    dweights[plan.choice_of_row_R] = dots_R
    return dweights.view_as(weights_TK)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Permutation) -> Tensor:
        ctx.plan = plan
        return x.index_select(0, plan.token_of_row_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (drows,) = grads
        return sum_rows(drows.contiguous(), ctx.plan), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights_TK: Tensor, plan: Permutation) -> Tensor:
        ctx.save_for_backward(rows, weights_TK)
        ctx.plan = plan
        return sum_rows(rows.contiguous(), plan, weights_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights_TK = ctx.saved_tensors
        plan, (dy,) = ctx.plan, grads
        dweights = weight_gradients(rows, dy, weights_TK, plan)
        weights_R = weights_of_rows(weights_TK, plan, rows.dtype)
        drows = dy.index_select(0, plan.token_of_row_R).mul_(weights_R.unsqueeze(-1))
        return drows, dweights, None
