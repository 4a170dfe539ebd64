"""Choose the experts of each token and their weights.

    p = softmax(logits),  i = the k largest of p,  w_i = p_i / sum of the chosen p
    for k = 1:            w = p_i, as a renormalised weight would always be 1, and the router
                          would learn nothing from the loss

Source: Shazeer et al., "Outrageously Large Neural Networks", arXiv 1701.06538, section 2.1 (softmax
over the kept logits, without the noise), which equals the softmax over all, renormalised; for
k = 1 Fedus et al., "Switch Transformers", arXiv 2101.03961, eq. 2.

T = tokens, E = experts, K = top-k
"""

import torch
from torch import Tensor


def route_ref(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose experts by the definition; the truth for `route`."""
    chosen_TK, ids_TK = logits_TE.softmax(-1).topk(top_k, dim=-1)
    if top_k == 1:
        return chosen_TK, ids_TK
    return chosen_TK / chosen_TK.sum(-1, keepdim=True), ids_TK


def route(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose experts; the weights carry the gradient to the logits, and sum to 1 for k > 1.

    The denominator of the full softmax cancels when the chosen are renormalised, so a softmax over
    the K kept logits gives the same weights without the pass over all E.

    Shapes: logits_TE [T, E], fp32; returns weights [T, K] fp32, largest first, and expert ids
    [T, K] int64.
    """
    kept_TK, ids_TK = logits_TE.topk(top_k, dim=-1)
    if top_k == 1:
        return (kept_TK - logits_TE.logsumexp(-1, keepdim=True)).exp(), ids_TK
    return torch.softmax(kept_TK, dim=-1), ids_TK
