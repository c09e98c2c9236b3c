"""The words that arguments of the public functions may be: a type for checkers of types, and its words for the checks of a call."""

from __future__ import annotations

from typing import Literal, get_args

Noise = Literal["draft", "coupled"]
ChainRule = Literal["token", "block", "coupled"]
TreeRule = Literal["walk", "recursive", "traversal"]
LogProbs = Literal["raw", "processed"]
Phase = Literal["normalise", "residual", "draw"]
Drawn = Literal["one_hot", "iid", "without_replacement"]
Method = Literal["conditioned", "best_first", "top_k", "iid", "without_replacement"]
StaticMethod = Literal["top_k", "iid", "without_replacement"]  # whose shape is known beforehand
Policy = Literal["causal", "budget"]
Mask = Literal["chain", "full", "tree"]
FilterOrder = Literal["top_k_first", "joint"]

NOISES: tuple[Noise, ...] = get_args(Noise)
CHAIN_RULES: tuple[ChainRule, ...] = get_args(ChainRule)
TREE_RULES: tuple[TreeRule, ...] = get_args(TreeRule)  # in the order of the kernel's constants
LOG_PROBS: tuple[LogProbs, ...] = get_args(LogProbs)
PHASES: tuple[Phase, ...] = get_args(Phase)
DRAWN: tuple[Drawn, ...] = get_args(Drawn)
METHODS: tuple[Method, ...] = get_args(Method)
STATIC_METHODS: tuple[StaticMethod, ...] = get_args(StaticMethod)
POLICIES: tuple[Policy, ...] = get_args(Policy)
MASKS: tuple[Mask, ...] = get_args(Mask)
FILTER_ORDERS: tuple[FilterOrder, ...] = get_args(FilterOrder)
