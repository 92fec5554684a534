"""Reinforcement learning of reasoners: rollouts, rewards, advantages, objectives, one training loop."""
