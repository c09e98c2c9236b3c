"""Acceptance of chains of drafts: rules in plain torch, what each must emit, and rules that are known to be wrong."""

from . import distributions, edges, models, rules

__all__ = ["distributions", "edges", "models", "rules"]
