"""The models that reason step by step, and the reward models that judge their steps: shared stages."""
