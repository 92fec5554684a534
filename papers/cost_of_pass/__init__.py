"""Cost-of-pass: what a correct answer costs, who offers it cheapest, and who would be missed."""

from papers.cost_of_pass.method import (
    break_even,
    load_public,
    resampled,
    retries,
    single,
    unsolved_at_most,
    vote,
    winner_shares,
)

__all__ = [
    "break_even",
    "load_public",
    "resampled",
    "retries",
    "single",
    "unsolved_at_most",
    "vote",
    "winner_shares",
]
