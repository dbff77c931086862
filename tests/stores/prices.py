"""Prices that are easy to add up."""

from gateway.kit.upstream import MODEL

# 1 micro-USD per output token, nothing for input.
PRICES = {MODEL: {"input": 0, "cache_write": 0, "output": 1, "context_length": 8000, "max_output": 500}}
