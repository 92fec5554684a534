"""Self-aligned reward: reward how much the question explains the answer."""

from papers.self_aligned_reward.method import (
    from_information,
    information,
    neg_log_perplexity,
    score,
    self_aligned,
)

__all__ = ["from_information", "information", "neg_log_perplexity", "score", "self_aligned"]
