"""Timing, intervals and exact tests."""
