"""Models that several papers use: root-level DVC stages run them as `python -m common.run shared <stage>`."""
