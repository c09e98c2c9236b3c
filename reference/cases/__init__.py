"""Inputs of each op, made from a seed: one specification per op of axes, dtypes and edge values, for tests and benchmarks.

    case = draft_case(seed, requests=3, dtype=torch.bfloat16);  draft_block(**case.arguments())

A specification (`DraftSpec`, `AcceptSpec`, `AcceptTreeSpec`, `AttentionSpec`) lists the axes of an op with their defaults; its
function (`draft_case`, ...) takes the same names and returns the arguments of one call. A case with request slots has S = R + 3
slots in shuffled order; everything that lives by slot is made [S, ...], and slots outside the batch hold values that a wrong read
would show.

Symbols: R requests, S request slots, K drafts, M tree nodes, V vocabulary, r rank, H hidden size.
"""

from .accept import AcceptCase, AcceptSpec, accept_case
from .attention import AttentionCase, AttentionSpec, ancestor_words, attention_case, attention_layout
from .draft import DraftCase, DraftSpec, draft_case
from .sampling import ADJUSTMENTS, FILTERS, TEMPERATURES, sampling_tensors
from .tensors import slot_map
from .tree import AcceptTreeCase, AcceptTreeSpec, accept_tree_case

__all__ = [
    "ADJUSTMENTS", "AcceptCase", "AcceptSpec", "AcceptTreeCase", "AcceptTreeSpec", "AttentionCase", "AttentionSpec", "DraftCase",
    "DraftSpec", "FILTERS", "TEMPERATURES", "accept_case", "accept_tree_case", "ancestor_words", "attention_case",
    "attention_layout", "draft_case", "sampling_tensors", "slot_map",
]  # fmt: skip
