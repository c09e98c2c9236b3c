"""What acceptance passes around, by name. Needs no Triton: ops build the records that are kernel arguments.

Symbols: R requests, K drafts of a chain, M nodes of a tree, L logit rows, N_max forward rows, S request slots, V vocabulary, NB
vocabulary blocks of 1024 ids, C candidates of a sparse proposal. Functions that have two-dimensional tiles say so.
"""

from typing import Any, NamedTuple

from ..args import Adjustments, FilterSettings, Pointer, functions_key

Number = Any  # a scalar in a kernel


# --- inputs -----------------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """Target logits [L, V]."""

    logits_ptr: Pointer
    stride: int
    adjustments: Adjustments | None


class Layout(NamedTuple):
    """Which rows the target computed: the arrays of VerifyLayout."""

    query_start_ptr: Pointer | None  # int32 [R + 1], forward rows; None in the phases of a shard that write no output
    cu_logits_ptr: Pointer  # int32 [R + 1]
    logits_indices_ptr: Pointer  # int32 [L], forward row of a logit row
    token_ids_ptr: Pointer  # int64 or int32 [N_max]
    positions_ptr: Pointer  # int64 or int32 [N_max]


class NodeLinks(NamedTuple):
    """How the nodes of trees hang together, [S, M]."""

    parents_ptr: Pointer  # int32
    ancestors_ptr: Pointer | None  # int64, as bits; None: no setting asks for a node's path


class Sampling(NamedTuple):
    """Settings per slot, and the slots of requests; temperature None = every row is greedy."""

    draft_temperature_ptr: Pointer | None  # fp32 [S]; None = the temperature
    temperature_ptr: Pointer | None  # fp32 [S]
    seed_ptr: Pointer | None  # int64 or int32 [S]
    filters: FilterSettings | None = None
    rates_ptr: Pointer | None = None  # fp32 [K], of forced acceptance
    slots_ptr: Pointer | None = None  # int32 or int64 [R]; None: a request's slot is its row


class IdMap(NamedTuple):
    """A draft vocabulary's ids in the target's vocabulary, each at most once, and the inverse that the launch makes."""

    to_target_ptr: Pointer  # int64 [Vd]
    to_draft_ptr: Pointer  # int32 [V]: an entry counts where to_target leads back


class DenseDraft(NamedTuple):
    """Draft logits or probabilities [S, rows, width]; rows are drafts of a chain or nodes of a tree. Packed [num_tokens, width]:
    with starts, and stride_slot is that of all rows."""

    logits_ptr: Pointer
    lse_ptr: Pointer | None  # fp32 [S, K]: ln of the sum of exponentials, where it is stored
    stride_slot: int
    stride_row: int
    stride_lse: int
    width: int
    id_map: IdMap | None
    starts_ptr: Pointer | None = None  # int32 or int64 [S]: the first row of each slot


class DraftShard(NamedTuple):
    """The rank's columns of draft logits [S, K, W]."""

    logits_ptr: Pointer
    lse_ptr: Pointer | None  # fp32 [S, K] of whole rows
    stride_slot: int
    stride_row: int
    stride_lse: int


class SparseDraft(NamedTuple):
    """Candidates [S, rows, count] with their logits; entries of one id add up."""

    ids_ptr: Pointer
    logits_ptr: Pointer
    stride_ids_slot: int
    stride_ids_row: int
    stride_slot: int
    stride_row: int
    count: int


class ShardedDraft(NamedTuple):
    """How a shard's drafts were drawn: one of both, or neither for drafts that stand for themselves."""

    dense: DraftShard | None
    sparse: SparseDraft | None


# --- sizes -------------------------------------------------------------------------------------------------------------


class Extent(NamedTuple):
    """Sizes that stay from step to step, so that what is compiled may know which of them are multiples of 16."""

    num_drafts: int  # K; of a tree its nodes, M
    vocab: int  # V
    num_blocks: int  # NB


class AcceptTile(NamedTuple):
    """Sizes of the tiles of acceptance, one constexpr."""

    GROUP: int  # rows at a time
    CHUNK: int  # blocks of them at a time
    CANDIDATES: int  # padded number of candidates of a sparse proposal
    BLOCKS: int  # padded number of blocks
    GROUPS: int  # padded number of max-groups
    WIDTH: int  # padded number of rows of a request
    JOINT: bool  # whether top-k and top-p are both tested on the whole distribution
    RESIDUAL: int = 1  # blocks of a residual at a time


class SweepTile(NamedTuple):
    """Sizes of an item that sums a tree's residual, one constexpr."""

    PAIRS: int  # blocks at a time
    SPAN: int  # how often


class VerifyTile(NamedTuple):
    """Sizes of the tiles in which every rank verifies, one constexpr."""

    WIDTH: int  # padded number of rows of a request
    SHARDS: int  # padded number of ranks
    BLOCK: int  # vocabulary blocks at a time


# --- outputs ----------------------------------------------------------------------------------------------------------


class Outputs(NamedTuple):
    """The fields of Acceptance: tokens int64 [R, K + 1] (of a tree [R, M]), the others [R], commit_mask [N_max].

    One record for chains and trees: Triton 3.6 does not take a record with None inside another one.
    """

    tokens_ptr: Pointer
    accepted_ptr: Pointer
    emitted_ptr: Pointer
    rejected_ptr: Pointer
    next_token_ptr: Pointer
    last_row_ptr: Pointer
    commit_ptr: Pointer
    flags_ptr: Pointer
    log_probs_ptr: Pointer | None  # fp32, as tokens
    anchors_ptr: Pointer | None  # the next round's anchors, int64 or int32 [S], advanced in place
    stride_anchors: int
    anchor_positions_ptr: Pointer | None  # and their positions
    stride_anchor_positions: int
    path_ptr: Pointer | None = None  # of a tree, the accepted nodes, int32 [R, M]
    source_ptr: Pointer | None = None  # and the forward rows whose keys stay


# --- scratch ----------------------------------------------------------------------------------------------------------


class ChainCounters(NamedTuple):
    """int32, zero before and after a launch."""

    ticket_ptr: Pointer  # [1]
    groups_ptr: Pointer  # arrivals of row groups [R, groups]
    requests_ptr: Pointer  # arrivals of a request's groups [R]
    residuals_ptr: Pointer  # arrivals of second-phase items [R]


class TreeCounters(NamedTuple):
    """int32, zero before and after a launch."""

    ticket_ptr: Pointer  # [1]
    groups_ptr: Pointer  # arrivals of node groups [R, groups]
    requests_ptr: Pointer  # arrivals of a request's groups [R]
    sweeps_ptr: Pointer  # arrivals of a sweep's items [R]
    items_ptr: Pointer  # arrivals of all sweeps' items [R]
    published_ptr: Pointer  # sweeps asked for [R]


class MapProgress(NamedTuple):
    """Of inverting an id map; counters int32 [1], zero before and after a launch."""

    ready_ptr: Pointer  # parts that are inverted
    finished_ptr: Pointer  # requests that need it no more
    parts: int  # items that invert the map


class BlockPartials(NamedTuple):
    """Of each vocabulary block of a row, [L, NB]."""

    max_ptr: Pointer  # fp32
    sumexp_ptr: Pointer  # int64: sum of exponentials relative to the maximum, in units of 2^-40, and bits of what was seen
    best_ptr: Pointer | None = None  # int64: packed best key, where keys decide


class FilterScratch(NamedTuple):
    """What a filter keeps of a row while it looks for its support."""

    maxima_ptr: Pointer  # fp32 [L, G], of max-groups (128 ids)
    groups_ptr: Pointer  # int32 [L, G]
    lists_ptr: Pointer  # int32 [L, 2 * 1024]


class Limits(NamedTuple):
    """The support of a filtered row: logits above the threshold, and of those at it the ids up to a cut, [L]."""

    threshold_ptr: Pointer  # int64
    cut_ptr: Pointer  # int32


class RowStats(NamedTuple):
    """What decisions need of a row: fields of rows.py, fp32 [L, VALUES] and int32 [L, IDS]."""

    values_ptr: Pointer
    ids_ptr: Pointer


class TreeRowStats(NamedTuple):
    """Besides: sum of the draft weights of a node's children, int64 [L]; the token that the walk draws at a node, int32 [L]."""

    row: RowStats
    draft_sum_ptr: Pointer
    token_ptr: Pointer


class SparseScratch(NamedTuple):
    """Where a sparse proposal's candidates find their vocabulary blocks."""

    removed_ptr: Pointer  # int64 [L, NB]: what a block loses without its candidates; of one-hot drafts [L]
    patch_ptr: Pointer  # fp32 [R, 1024]: residual of one block


class ChainScratch(NamedTuple):
    target: BlockPartials
    raw: BlockPartials | None  # of the logits as they came, where raw log-probabilities are wanted
    draft: BlockPartials | None  # of draft rows whose lse is not stored
    residual_ptr: Pointer  # int64 [L, NB]: residual sums in units of 2^-60
    sparse: SparseScratch
    filters: FilterScratch | None
    limits: Limits | None
    stats: RowStats


class NodeState(NamedTuple):
    """A request's nodes between sweeps: fields of tree_state.py."""

    values_ptr: Pointer  # fp32 [R, NODE_VALUES, WIDTH]
    ids_ptr: Pointer  # int32 [R, NODE_IDS, WIDTH]
    rest_ptr: Pointer  # int64 [R, WIDTH]: draft weight that the younger siblings of a rejected child share
    current_ptr: Pointer  # int32 [R, 2]: the node whose residual is summed, and its rejected child


class TreeResidual(NamedTuple):
    """Sums of the sweep at hand, int64 [R, NB]."""

    target_ptr: Pointer  # of the residual, in units of 2^-60
    draft_ptr: Pointer  # of the draft weights that are left, in units of 2^-40


class TreeScratch(NamedTuple):
    target: BlockPartials
    raw: BlockPartials | None
    draft: BlockPartials | None
    residual: TreeResidual
    filters: FilterScratch | None
    limits: Limits | None
    stats: TreeRowStats
    state: NodeState


class ShardSums(NamedTuple):
    """Regions of a part with sums of a rank's vocabulary blocks [L, NB]; (None, None) where words decide."""

    max_ptr: Pointer | None
    sumexp_ptr: Pointer | None


class ShardLists(NamedTuple):
    """Regions of a part for candidates of a sparse proposal; None each without one."""

    rest_ptr: Pointer | None  # sums of blocks without the candidates, int64 [L, NB]
    logits_ptr: Pointer | None  # target logits of the candidates that the rank has, fp32 [L, C]
    distributions_ptr: Pointer | None  # reference, factor, the draft's probability, fp32 [L, 3]
    points_ptr: Pointer | None  # who has the draft's probability, int32 [L]


class Part(NamedTuple):
    """What a rank writes of each row in the first phase."""

    words_ptr: Pointer  # int64 [L, 4]: best word, the draft row's best word, sum of the draft's octet, what the row showed
    logits_ptr: Pointer  # fp32 [L, 2]: logit of the draft in the target's and in the draft's row, -inf on other ranks
    target: ShardSums
    draft: ShardSums
    lists: ShardLists


class Gathered(NamedTuple):
    """The parts of all ranks, one behind the other."""

    part: Part
    stride: int  # int64 words from one to the next
    shards: int  # ranks


class GatheredSums(NamedTuple):
    """Residual sums of all ranks: int64 [N, R, NB], where every row may be needed [N, L, NB]."""

    ptr: Pointer
    stride: int


class ArrivingRows(NamedTuple):
    """What the items of a row group make together; zero before and after a launch."""

    best_ptr: Pointer  # int64 [L]: best word of a row
    draft_best_ptr: Pointer  # int64 [L]
    seen_ptr: Pointer  # int32 [L]: what the row showed
    counts_ptr: Pointer  # int32 [R, groups]: arrivals


class Drawn(NamedTuple):
    """What a rank writes in the draw, gathered for the finish; None where the rows' own words decide."""

    word_ptr: Pointer | None  # int64 [R]: the best word of the race inside the winning block
    verdict_ptr: Pointer | None  # int64 [R, 2]: accepted drafts, whether the residual was empty


class DrawScratch(NamedTuple):
    """Of each program of the draw, a request."""

    total_ptr: Pointer  # int64 [R, WIDTH]: residual sums of rows
    added_ptr: Pointer | None  # int64 [R, BLOCKS]: what candidates add to their blocks; None: no sparse proposal
    patch_ptr: Pointer | None  # fp32 [R, 1024]


class Cut(NamedTuple):
    """How the vocabulary is cut."""

    width: int  # ids of a shard
    blocks: int  # vocabulary blocks of a shard
    pieces: int  # ranks that can share a block
    vocab: int


# --- what depends on the kind of proposal -----------------------------------------------------------------------------


class ChainProposal(NamedTuple):
    """Functions of proposals.py, dense.py or sparse.py; one constexpr."""

    draft_logits: Any  # what the statistics need of logits
    draft_stats: Any  # the draft's part of a row's statistics
    residual_sums: Any  # sums of [P_i * target - draft]+ of a part of a row's vocabulary blocks, stored
    residual_of_blocks: Any  # the same of all blocks of a row; None: dense
    residual_in_block: Any  # that residual inside one block, fp32 [1024]
    column_of: Any  # column of an id in the draft's logits; None: sparse
    PROBS: bool = False  # whether draft rows are probabilities

    cache_key = functions_key


class ChainRule(NamedTuple):
    """Functions of rules.py, and what a call asks of the launch; one constexpr."""

    VERIFY: Any  # drafts that stay, as far as their own probabilities say
    SELECT: Any  # from residual sums, how many of these stay; None: all
    DRAWS: bool  # whether the token after the drafts is drawn
    TWO_PHASES: bool  # whether residuals of whole rows are summed by further work items

    cache_key = functions_key


class TreeProposal(NamedTuple):
    """Functions of tree_proposals.py; one constexpr."""

    draft_stats: Any  # of rows of nodes: point, reference, sum of weights
    block_weights: Any  # weights of every id of a tile, under one node's distribution
    weight_at: Any  # the weight of one id per node, under its parent's distribution
    weights_left: Any  # without replacement: weights of columns but for those of siblings, where ids are mapped
    sum_left: Any  # the same of candidates, summed
    column_of: Any

    cache_key = functions_key
