"""One call of a public op on CPU tensors of full size, to be captured: the launches of bench.compile and bench.tune.

Sizes are those of Qwen3-4B with its published drafter.
"""

from .accept import accept_call, accept_tree_call
from .attention import attention_call, compact_call
from .draft import candidates_call, draft_call
from .layout import draft_layout_call, layout_call, schedule_call, tree_layout_call
from .shards import accept_shard_call, draft_shard_call
from .trees import draft_paths_call, draft_tree_call, expand_tree_call

__all__ = [
    "accept_call",
    "accept_shard_call",
    "accept_tree_call",
    "attention_call",
    "candidates_call",
    "compact_call",
    "draft_call",
    "draft_layout_call",
    "draft_paths_call",
    "draft_shard_call",
    "draft_tree_call",
    "expand_tree_call",
    "layout_call",
    "schedule_call",
    "tree_layout_call",
]
