"""Post-training quantisation of linear layers: calibration, rounding, packed storage, and bits as they are stored."""
