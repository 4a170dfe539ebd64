"""Choose the experts of each token and their weights.

    p = softmax(logits),  i = the k largest of p,  w_i = p_i / sum of the chosen p

Source: Shazeer et al., "Outrageously Large Neural Networks", arXiv 1701.06538, section 2.1 (softmax
over the kept logits, without the noise), which equals the softmax over all, renormalised.

T = tokens, E = experts, K = top-k
"""

import torch
from torch import Tensor


def route_ref(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose experts by the definition; the truth for `route`."""
    chosen_TK, ids_TK = logits_TE.softmax(-1).topk(top_k, dim=-1)
    return chosen_TK / chosen_TK.sum(-1, keepdim=True), ids_TK


def route(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose experts; the weights of each token sum to 1 and carry the gradient to the logits.

    The denominator of the full softmax cancels when the chosen are renormalised, so a softmax over
    the K kept logits gives the same weights without the pass over all E.

    Shapes: logits_TE [T, E], fp32; returns weights [T, K] fp32, largest first, and expert ids
    [T, K] int64.
    """
    kept_TK, ids_TK = logits_TE.topk(top_k, dim=-1)
    return torch.softmax(kept_TK, dim=-1), ids_TK
