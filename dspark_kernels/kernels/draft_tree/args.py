"""Records that the kernels of draft trees take. Needs no Triton: ops build them, or a kernel builds them from its arguments.

Heads, hidden states and base logits are the records of kernels/draft/args.py. Symbols: R requests, S request slots, K positions, M
nodes, V vocabulary, F nodes of a depth at most, B children of each at most, C candidates, r rank, H hidden size, O outputs of a
gated (r) or rnn (3 r) head, L vocabulary blocks of 1024 ids, NODES nodes padded. None where a call has no such thing.
"""

from typing import Any, NamedTuple

from ..args import Adjustments, Pointer, functions_key

# --- trees of a static shape ------------------------------------------------------------------------------------------


class TreeState(NamedTuple):
    """What a request of a static tree brings, by request slot; budgets by request."""

    anchors_ptr: Pointer | None  # int [S]
    stride_anchors: int
    positions_ptr: Pointer  # int [S], of the anchors
    stride_positions: int
    slots_ptr: Pointer | None  # int32 or int64 [R]; None: a request's slot is its row
    temperature_ptr: Pointer | None  # fp32 [S]
    seed_ptr: Pointer | None  # int64 or int32 [S]
    budgets_ptr: Pointer | None  # int32 [R], nodes of each request


class NodeSettings(NamedTuple):
    """What is done to a node's logits before temperature, and which ids they stand for."""

    map_ptr: Pointer | None  # int64 [V], ids in the target's vocabulary
    num_targets: int  # ids of the target
    adjust: Adjustments | None


class StaticTree(NamedTuple):
    """A tree of static shape, contiguous."""

    tokens_ptr: Pointer  # int64 [S, M]
    parents_ptr: Pointer  # int32 [S, M]
    depths_ptr: Pointer  # int32 [S, M]
    first_child_ptr: Pointer  # int32 [S, M]
    next_sibling_ptr: Pointer  # int32 [S, M]
    ancestors_ptr: Pointer  # int64 [S, M]
    num_nodes_ptr: Pointer  # int32 [S]
    flags_ptr: Pointer  # int32 [R]


class NodeLogits(NamedTuple):
    """Logits whose distribution a node's children are drawn from, [S, M, V]."""

    ptr: Pointer
    stride_slot: int
    stride_node: int


class StaticScratch(NamedTuple):
    """Scratch of a tree of static shape."""

    lists_ptr: Pointer  # int64 [R F, L, B], the best packed keys of each block
    best_ptr: Pointer  # int64 [R F, B]
    found_ptr: Pointer  # int32 [R, M]
    record_ptr: Pointer  # int32 [R, 3]: first node of the last depth, how many, flags
    block_max_ptr: Pointer | None  # fp32 [R F, L], of i.i.d. children
    block_sumexp_ptr: Pointer | None  # int64 [R F, L]


class StaticCounters(NamedTuple):
    """Counters of a tree of static shape, zero before and after."""

    ticket_ptr: Pointer  # int32 [1]
    finished_ptr: Pointer  # int32 [1]
    row_status_ptr: Pointer  # int32 [R M]


class TreeSizes(NamedTuple):
    """Sizes of a tree of static shape."""

    num_requests: int  # R
    num_slots: int  # S
    num_nodes: int  # M
    vocab: int  # V
    chunks: int  # L


class TreeWidths(NamedTuple):
    """Sizes of a tree of static shape that stay from step to step."""

    vocab: int  # V
    first: int  # nodes of the first depth that get children


class DepthStep(NamedTuple):
    """The depth whose nodes get children."""

    depth: int  # number of the step, which is the depth where `level` is None
    width: int  # nodes of the depth at most
    wanted: int  # children of each
    level: int | None  # the depth of nodes whose logits a caller gives; None: all depths from the anchor on


class TreeTile(NamedTuple):
    """How a tree of static shape is drawn, and in tiles of which sizes; one constexpr."""

    METHOD: int  # of append.py
    BLOCKS: int  # padded number of vocabulary blocks
    KEEP: int  # padded number of children
    PAIRS: int  # rows that are weighed or drawn at a time
    ROWS: int  # rows whose lists are merged at a time
    WIDTH: int  # padded number of nodes
    BLOCK_V: int  # ids
    BLOCK_R: int  # ranks of W2 per dot
    BLOCK_J: int  # latents
    BLOCK_N: int  # products with hidden states
    BLOCK_S: int  # columns of a weight per dot


# --- trees of the most probable paths ---------------------------------------------------------------------------------


class PathState(NamedTuple):
    """What a request of a tree of paths brings, by request slot; budgets by request."""

    anchors_ptr: Pointer  # int [S]
    stride_anchors: int
    slots_ptr: Pointer | None  # int32 or int64 [R]; None: a request's slot is its row
    temperature_ptr: Pointer | None  # fp32 [S]; None: paths are compared at temperature 1
    budgets_ptr: Pointer | None  # int32 [R], nodes of each request


class NodeConfidence(NamedTuple):
    """Confidence head at nodes: the probability that a child survives."""

    weight_ptr: Pointer  # [H] or [H+r]
    bias_ptr: Pointer | None  # [1]
    sts_ptr: Pointer | None  # fp32 [K], temperatures of positions
    w1_ptr: Pointer | None  # [V1, r]; None: it does not read W1[x]
    stride_w1: int
    vocab: int  # V1
    rank: int  # r


class PathTree(NamedTuple):
    """A tree of paths, contiguous."""

    tokens_ptr: Pointer  # int64 [S, M]
    parents_ptr: Pointer  # int32 [S, M]
    depths_ptr: Pointer  # int32 [S, M]
    first_child_ptr: Pointer  # int32 [S, M]
    next_sibling_ptr: Pointer  # int32 [S, M]
    ancestors_ptr: Pointer  # int64 [S, M]
    num_nodes_ptr: Pointer  # int32 [S]
    survival_ptr: Pointer | None  # fp32 [S, M]
    flags_ptr: Pointer  # int32 [R]


class BlockSums(NamedTuple):
    """Maximum and sum of exponentials of each vocabulary block of a row."""

    max_ptr: Pointer  # fp32 [R, K, L]
    sumexp_ptr: Pointer  # int64 [R, K, L]


class LatentScratch(NamedTuple):
    """Of a gated or rnn head, of all requests or from one on; where there is none, anything."""

    products_ptr: Pointer  # fp32 [R, K, O]
    latent_ptr: Pointer  # fp32 [R, NODES, r]
    states_ptr: Pointer  # fp32 [R, 2, NODES, r]


class PathScratch(NamedTuple):
    """Scratch of a tree of paths, or from one request on."""

    score_ptr: Pointer  # fp32 [R, K], the confidence head's products with hidden states
    kept_ptr: Pointer  # int32 [R, FIELDS, NODES], the best nodes (nodes.py)
    logits_ptr: Pointer  # fp32 [R, NODES, C]
    latents: LatentScratch


class PathCounters(NamedTuple):
    """Counters of a tree of paths, zero before and after."""

    request_ptr: Pointer  # int32 [R]
    status_ptr: Pointer  # int32 [R, K]


class PathSizes(NamedTuple):
    """Sizes of a tree of paths."""

    num_rows: int  # R K
    num_drafts: int  # K
    num_nodes: int  # M
    vocab: int  # V
    num_candidates: int  # C


class PathWidths(NamedTuple):
    """Sizes of a tree of paths that stay from step to step."""

    vocab: int  # V
    num_candidates: int  # C


class PathTile(NamedTuple):
    """How a tree of paths grows, and in tiles of which sizes; one constexpr."""

    ADVANCE: Any  # latents of the nodes of a depth: a function of heads.py, None without latents
    BLOCKS: int  # padded number of vocabulary blocks
    NODES: int
    WIDTH: int  # padded number of candidates
    PIECE: int  # candidates at a time
    BLOCK_R: int  # ranks of W2 at a time
    BLOCK_O: int  # outputs of a latent at a time
    BLOCK_J: int  # columns of its weight at a time

    cache_key = functions_key


# --- the same over the whole vocabulary -------------------------------------------------------------------------------


class PhaseCounters(NamedTuple):
    """Counters of the phases, int32 [R], zero before and after."""

    products_ptr: Pointer
    chunks_ptr: Pointer
    rows_ptr: Pointer
    items_ptr: Pointer
    published_ptr: Pointer


class DepthScratch(NamedTuple):
    """What is known of the depth at hand, of all requests or from one on."""

    kept_ptr: Pointer  # int32 [R, FIELDS, NODES], the best nodes (nodes.py)
    frontier_ptr: Pointer  # int32 [R, NODES], nodes that get children
    sizes_ptr: Pointer  # int32 [R, K+1], how many of each depth; last the nodes so far
    entries_ptr: Pointer  # fp32 [R, NODES], log2 survival with the confidence
    tokens_ptr: Pointer  # int32 [R, NODES]
    score_ptr: Pointer  # fp32 [R, K], the confidence head's products with hidden states
    latents: LatentScratch


class RowScratch(NamedTuple):
    """Rows of the depth at hand, of all requests or from one row on; ROWS = C = max(1, M - 1), U sub-blocks of 256 ids."""

    sub_block_max_ptr: Pointer  # fp32 [R, ROWS, U]
    sub_block_sumexp_ptr: Pointer  # int64 [R, ROWS, U]
    groups_ptr: Pointer  # fp32 [R, ROWS, G], maxima of groups, then logits of the chosen
    chosen_ptr: Pointer  # int32 [R, ROWS, C], groups
    keys_ptr: Pointer  # fp32 [R, ROWS, C], survivals of children
    ids_ptr: Pointer  # int32 [R, ROWS, C]


class PhaseTile(NamedTuple):
    """How a tree of paths grows over the whole vocabulary, and in tiles of which sizes; one constexpr."""

    ADVANCE: Any  # as in PathTile
    SUB_BLOCKS: int  # padded number of sub-blocks
    GROUPS: int  # padded number of groups
    NODES: int
    CHILDREN: int  # padded number of children of a row
    PIECE: int  # logits at a time
    BLOCK_R: int  # ranks of W2 at a time
    BLOCK_O: int  # outputs of a latent at a time
    BLOCK_J: int  # columns of its weight at a time

    cache_key = functions_key
