"""How token terms become one number: an argument of its own, for it changes what a long response weighs.

With m the mask, v the terms, n_i = sum_t m_it and N the number of rows with n_i > 0:

    token_mean            sum_it m v / sum_it m          every token weighs the same (DAPO, Yu et al. 2025)
    seq_mean_token_mean   1/N sum_i 1/n_i sum_t m v      every response weighs the same (GRPO, Shao et al. 2024)
    seq_mean_token_sum    1/N sum_i sum_t m v            the policy gradient of a response's likelihood
    token_sum             sum_it m v                     over the constant `denominator` (Dr. GRPO, Liu et al. 2025)

A batch split over micro-batches and ranks sums to the whole batch's loss where each part is given the whole batch's
`denominator`: its number of tokens for token_mean, of non-empty responses for the two seq_means.
"""

from irlfast.ops._aggregation import AGGREGATIONS, Aggregation, aggregate, masked, masked_mean

__all__ = ["AGGREGATIONS", "Aggregation", "aggregate", "masked", "masked_mean"]
