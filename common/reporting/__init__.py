"""Reported values, claims, verdicts, tables, figures, pages."""
