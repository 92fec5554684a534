"""Verifiable tasks: generate, verify."""
