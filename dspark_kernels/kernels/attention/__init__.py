"""Attention of a step's rows: the work table, and the attention over it."""
