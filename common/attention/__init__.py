"""Attention that a paper plugs into real models: functions in place of a layer's own, its keys and queries, costs."""
