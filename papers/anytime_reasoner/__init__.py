"""AnytimeReasoner (Qi et al. 2025): reinforcement learning for good answers at any thinking budget."""

from papers.anytime_reasoner.method import brpo, decoupled, last_answer, parts, prior, v2_only

__all__ = ["brpo", "decoupled", "last_answer", "parts", "prior", "v2_only"]
