"""Lossless acceptance of chains and trees of drafts: the rules, what proposals say of a draft, and what is written."""
