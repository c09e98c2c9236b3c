"""The ops of a decoding round in their order, and the rows that a report has beside theirs."""

from __future__ import annotations

OPS = ("draft_block", "schedule_prefixes", "plan_attention", "tree_attention", "accept_chain")
DECISIONS = ("draft_block", "schedule_prefixes", "accept_chain")  # steps beside the models
SUM, GRAPH = "sum of the ops", "one graph"
