"""Decoding on an explicit KV cache, with a ledger of what it cost."""
