"""dspark_kernels: Triton kernels for the draft and verify steps of speculative decoding, one launch per op.

Importing needs neither Triton nor a GPU; calling an op needs Triton, and a GPU or Triton's interpreter (TRITON_INTERPRET=1).
"""

__version__ = "0.1.0"

try:
    import torch as _torch  # noqa: F401  whether it can be imported
except (ImportError, OSError):  # missing, or a library that it loads is
    import sys as _sys

    if f"{__name__}.env" not in _sys.orig_argv:
        raise
    from .env import main as _main  # `python -m dspark_kernels.env`, which imports this module first, says what is wrong

    _sys.exit(_main(_sys.argv[1:]))

from . import calibration, cost, scheduling
from .ops.accept.chain import accept_chain
from .ops.accept.shards import accept_finish, accept_partial, accept_phases
from .ops.accept.tree import accept_tree
from .ops.attention.plan import plan_attention
from .ops.attention.tree import tree_attention
from .ops.compact import compact_kv
from .ops.draft.dense import draft_block
from .ops.draft.shards import draft_block_finish, draft_block_partial
from .ops.draft_tree.static import draft_tree, expand_tree
from .ops.layout.fixed import draft_layout, fixed_layout, tree_layout
from .ops.layout.schedule import schedule_prefixes
from .prepare import prepare
from .quantise import quantise_head
from .synthetic import synthetic_rates
from .types import (
    Acceptance,
    AttentionPlan,
    ConfidenceHead,
    CostTable,
    DenseProposal,
    DraftBlock,
    DraftTree,
    Flag,
    GatedMarkovHead,
    KVLayers,
    MarkovHead,
    OneHotProposal,
    PagedKV,
    Penalties,
    RnnMarkovHead,
    SamplingTensors,
    SparseProposal,
    Stream,
    VerifyLayout,
)
from .vocabulary import ids_from_offsets
from .warmup import warmup
from .workspace import Workspace

__all__ = [
    "Acceptance",
    "AttentionPlan",
    "ConfidenceHead",
    "CostTable",
    "DenseProposal",
    "DraftBlock",
    "DraftTree",
    "Flag",
    "GatedMarkovHead",
    "KVLayers",
    "MarkovHead",
    "OneHotProposal",
    "PagedKV",
    "Penalties",
    "RnnMarkovHead",
    "SamplingTensors",
    "SparseProposal",
    "Stream",
    "VerifyLayout",
    "Workspace",
    "__version__",
    "accept_chain",
    "accept_finish",
    "accept_partial",
    "accept_phases",
    "accept_tree",
    "calibration",
    "compact_kv",
    "cost",
    "draft_block",
    "draft_block_finish",
    "draft_block_partial",
    "draft_layout",
    "draft_tree",
    "expand_tree",
    "fixed_layout",
    "ids_from_offsets",
    "plan_attention",
    "prepare",
    "quantise_head",
    "schedule_prefixes",
    "scheduling",
    "synthetic_rates",
    "tree_attention",
    "tree_layout",
    "warmup",
]
