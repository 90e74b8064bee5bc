"""The online softmaxes of two rows at once with both divergences between them, and the entropy of the first: what
linear_policy_ref_stats keeps of the columns seen so far. Built on _online_softmax and _online_divergence.

A summary is (p_max, p_others, p_weighted, q_max, q_others, p_over_q, q_over_p), in those modules' units.
"""

import triton
import triton.language as tl

from irlfast.kernels._online_divergence import online_divergence_rebase, online_divergence_sum
from irlfast.kernels._online_softmax import online_softmax_merge, online_softmax_of


@triton.jit
def online_pair_of(p_logits, q_logits, scale, axis: tl.constexpr):
    """Summary of two rows' logits along an axis."""
    p_max, p_others, p_weighted = online_softmax_of(p_logits, scale, axis, True)
    q_max, q_others, _ = online_softmax_of(q_logits, scale, axis, False)
    p_over_q = online_divergence_sum(p_logits, q_logits, p_max, q_max, scale, axis)
    q_over_p = online_divergence_sum(q_logits, p_logits, q_max, p_max, scale, axis)
    return p_max, p_others, p_weighted, q_max, q_others, p_over_q, q_over_p


@triton.jit
def online_pair_add(p_logits, q_logits, p_max, p_others, p_weighted, q_max, q_others, p_over_q, q_over_p, scale):
    """The summary with two rows' logits [BLOCK] added."""
    a_max, a_others, a_weighted, b_max, b_others, a_over_b, b_over_a = online_pair_of(p_logits, q_logits, scale, 0)
    p_top, p_sum, weighted = online_softmax_merge(p_max, p_others, p_weighted, a_max, a_others, a_weighted, scale)
    q_top, q_sum, _ = online_softmax_merge(q_max, q_others, 0.0, b_max, b_others, 0.0, scale)
    p_over_q = online_divergence_rebase(p_over_q, p_max, p_others, q_max, p_top, q_top, scale)
    q_over_p = online_divergence_rebase(q_over_p, q_max, q_others, p_max, q_top, p_top, scale)
    p_over_q += online_divergence_rebase(a_over_b, a_max, a_others, b_max, p_top, q_top, scale)
    q_over_p += online_divergence_rebase(b_over_a, b_max, b_others, a_max, q_top, p_top, scale)
    return p_top, p_sum, weighted, q_top, q_sum, p_over_q, q_over_p
