"""Records that the kernels of a draft block take. Needs no Triton: ops build them, or a kernel builds them from its arguments.

Symbols: R requests, K positions, V vocabulary of the head, V1 rows of W1, r rank, H hidden size, S request slots, C candidates, N
ranks, O outputs of a gated (r) or rnn (3 r) head, U vocabulary blocks of a row. None where a call has no such thing.
"""

from collections.abc import Callable
from typing import NamedTuple

from ..args import Adjustments, Pointer, functions_key

# --- what every draft block takes -------------------------------------------------------------------------------------


class BaseLogits(NamedTuple):
    """Logits of the drafter [R, K, V], last dimension contiguous."""

    ptr: Pointer
    stride_request: int
    stride_position: int


class RequestState(NamedTuple):
    """What a request brings, by request slot."""

    anchors_ptr: Pointer  # int [S]
    stride_anchors: int
    positions_ptr: Pointer  # int [S], of the anchors
    stride_positions: int
    slots_ptr: Pointer | None  # int32 or int64 [R]; None: a request's slot is its row
    temperature_ptr: Pointer | None  # fp32 [S]; None: every row is greedy
    seed_ptr: Pointer | None  # int64 or int32 [S]


class Hidden(NamedTuple):
    """Hidden states [R, K, H], last dimension contiguous."""

    ptr: Pointer
    stride_request: int
    stride_position: int
    size: int  # H


class Head(NamedTuple):
    """Low-rank head: bias(v) = scale_v * W2[v] . latent. On shards W2 and its scales are the rank's, or those of gathered candidates."""

    w1_ptr: Pointer  # [V1, r]
    w2_ptr: Pointer | None  # [V, r], e4m3 as bytes; [N, R, K, C, r] where rows are gathered
    scale_ptr: Pointer | None  # fp32 [V]; [N, R, K, C]
    stride_w1: int
    stride_w2: int
    vocab: int  # V1
    rank: int  # r


class Confidence(NamedTuple):
    """Confidence head of a block and what it writes."""

    weight_ptr: Pointer  # [H] or [H+r]
    bias_ptr: Pointer | None  # [1]
    sts_ptr: Pointer | None  # fp32 [K], temperatures of positions
    scores_ptr: Pointer  # fp32 [S, K], calibrated
    raw_ptr: Pointer  # fp32 [S, K], logits
    stride_scores: int
    stride_raw: int


# --- dense: the whole vocabulary, in tiles of ids for the whole batch -------------------------------------------------


class Projection(NamedTuple):
    """What a gated or rnn head adds: its weights, and the scratch of its latents. In a draft tree positions are nodes."""

    weight_ptr: Pointer  # [O, columns]
    bias_ptr: Pointer  # [O]
    stride_weight: int
    hidden_column: int  # first column of the hidden state
    w1_column: int  # first column of W1[x]
    precomputed_ptr: Pointer  # fp32 [R, K, O], the products with hidden states
    latent_ptr: Pointer  # [R, r], in the type of the product with W2
    state_ptr: Pointer | None  # fp32 [2, R, r] of an rnn: two tables that take turns
    carried_ptr: Pointer | None  # fp32 [S, r]: the state of earlier and for later drafts
    stride_carried: int


class Support(NamedTuple):
    """Filters of a dense block and the support that they leave of a row; G max-groups (128 ids)."""

    top_k_ptr: Pointer | None  # int32 [S]
    top_p_ptr: Pointer | None  # fp32 [S]
    min_p_ptr: Pointer | None  # fp32 [S]
    threshold_ptr: Pointer  # int64 [R]; in support: key > threshold, or key = threshold and id <= cut
    cut_ptr: Pointer  # int32 [R]
    maxima_ptr: Pointer  # fp32 [R, G], scratch
    groups_ptr: Pointer  # int32 [R, G], scratch
    keys_ptr: Pointer  # int32 [R, BLOCK], scratch
    ids_ptr: Pointer  # int32 [R, BLOCK], scratch


class BlockInputs(NamedTuple):
    """Pointers that a dense block reads; their strides are in `BlockStrides`."""

    base_ptr: Pointer  # [R, K, V]
    anchors_ptr: Pointer  # int [S]
    positions_ptr: Pointer  # int [S]
    slots_ptr: Pointer | None  # int32 [R]
    map_ptr: Pointer | None  # int64 [V], ids in the target's vocabulary
    hidden_ptr: Pointer | None  # [R, K, H]
    temperature_ptr: Pointer | None  # fp32 [S]; None: every row is greedy
    seed_ptr: Pointer | None  # int64 or int32 [S]


class BlockResults(NamedTuple):
    """Pointers that a dense block writes; their strides are in `BlockStrides`."""

    tokens_ptr: Pointer  # int64 [S, K]
    logits_ptr: Pointer | None  # [S, K, V]
    lse_ptr: Pointer | None  # fp32 [S, K]
    flags_ptr: Pointer  # int32 [R]


class BlockStrides(NamedTuple):
    """Strides of the tensors of a dense block."""

    base_request: int
    base_position: int
    anchors: int
    positions: int
    hidden_request: int
    hidden_position: int
    tokens: int
    logits: int
    logits_position: int
    lse: int


class BlockScratch(NamedTuple):
    """Scratch of a dense block. U vocabulary sub-blocks of 64 ids."""

    best_ptr: Pointer  # int64 [K, R], the winners' packed keys, zero before and after
    status_ptr: Pointer  # int32 [R], zero before and after
    barrier_ptr: Pointer  # int32 [1]
    sub_block_max_ptr: Pointer  # fp32 [R, K, U]
    sub_block_sumexp_ptr: Pointer  # int64 [R, K, U]


class BlockWidths(NamedTuple):
    """Sizes of a dense block's rows."""

    vocab: int  # V
    num_targets: int  # ids of the target
    hidden: int  # H


class DraftOutputs(NamedTuple):
    """What a dense block writes, each pointer with its strides."""

    tokens_ptr: Pointer  # int64 [S, K]
    stride_tokens: int
    logits_ptr: Pointer | None  # [S, K, V]
    stride_logits: int
    stride_logits_position: int
    lse_ptr: Pointer | None  # fp32 [S, K]
    stride_lse: int
    flags_ptr: Pointer  # int32 [R]


class BlockSizes(NamedTuple):
    """Sizes of a dense block, and where its drafts stand in a round."""

    num_requests: int  # R
    num_slots: int  # S
    num_drafts: int  # K
    vocab: int  # V
    num_targets: int  # ids of the target
    first_draft: int  # number of the first draft in its round
    column: int  # of the first draft in the outputs


# --- dense on vocabulary shards ---------------------------------------------------------------------------------------


class ShardInputs(NamedTuple):
    """Pointers that a part reads; their strides are in `ShardStrides`. W columns of a shard."""

    base_ptr: Pointer  # [R, K, W]
    anchors_ptr: Pointer  # int [S]
    positions_ptr: Pointer  # int [S]
    map_ptr: Pointer | None  # int64 [W], ids in the target's vocabulary
    hidden_ptr: Pointer | None  # [R, K, H]
    temperature_ptr: Pointer | None  # fp32 [S]; None: every row is greedy
    seed_ptr: Pointer | None  # int64 or int32 [S]
    slots_ptr: Pointer | None  # int32 [R]
    tokens_ptr: Pointer  # int64 [S, K], drafts before position k


class ShardPart(NamedTuple):
    """What a rank writes of one position: its own logits, what it sends, and counters, which are zero before and after. U vocabulary
    sub-blocks of 64 ids that a shard can touch."""

    logits_ptr: Pointer | None  # [S, K, W]
    words_ptr: Pointer  # int64 [R], the best packed key
    status_ptr: Pointer  # int64 [R]
    sub_block_max_ptr: Pointer | None  # fp32 [R, U]
    sub_block_sumexp_ptr: Pointer | None  # int64 [R, U]
    best_ptr: Pointer  # int64 [R]
    seen_ptr: Pointer  # int32 [R]
    arrivals_ptr: Pointer  # int32 [1]
    barrier_ptr: Pointer  # int32 [1], which keeps its count


class ShardWidths(NamedTuple):
    """Sizes of a part that a binary may be compiled for."""

    num_targets: int  # ids of the target
    width: int  # W
    num_sub_blocks: int  # U
    hidden: int  # H, 0 where nothing reads hidden states


class ShardStrides(NamedTuple):
    """Strides of the tensors of a part."""

    base_request: int
    base_position: int
    anchors: int
    positions: int
    hidden_request: int
    hidden_position: int
    tokens: int
    logits: int
    logits_position: int


class GatheredParts(NamedTuple):
    """The parts of all ranks."""

    words_ptr: Pointer  # int64 [N, R]
    status_ptr: Pointer  # int64 [N, R]
    sub_block_max_ptr: Pointer | None  # fp32 [N, R, U]
    sub_block_sumexp_ptr: Pointer | None  # int64 [N, R, U]


class FinishTensors(NamedTuple):
    """Pointers of the finish of a position; their strides are in `FinishStrides`."""

    temperature_ptr: Pointer | None  # fp32 [S]
    slots_ptr: Pointer | None  # int32 [R]
    tokens_ptr: Pointer  # int64 [S, K], written
    lse_ptr: Pointer | None  # fp32 [S, K], written
    flags_ptr: Pointer  # int32 [R], those of earlier positions included; written


class FinishWidths(NamedTuple):
    """Sizes of a finish."""

    shards: int  # N
    num_sub_blocks: int  # U
    hidden: int  # H


class FinishStrides(NamedTuple):
    """Strides of the tensors of a finish."""

    anchors: int
    hidden_request: int
    hidden_position: int
    tokens: int
    lse: int


# --- candidates: the C best of every position -------------------------------------------------------------------------


class Latent(NamedTuple):
    """Weights of a gated or rnn head on candidates, or at nodes of a best-first tree."""

    weight_ptr: Pointer  # [O, columns]
    stride_weight: int
    bias_ptr: Pointer  # [O]
    outputs: int  # O
    hidden_column: int  # first column of the hidden state
    carried_ptr: Pointer | None  # fp32 [S, r]: the state of earlier and for later drafts
    stride_carried: int


class Turn(NamedTuple):
    """The position that a latent is advanced to."""

    k: int
    num_drafts: int  # K
    first_draft: int  # number of the block's first draft in its round
    slot: int


class Successors(NamedTuple):
    """Ids that are candidates after a token: int [V, B]."""

    ptr: Pointer
    stride: int
    vocab: int  # rows
    count: int  # B


class RowSettings(NamedTuple):
    """What is done to the logits of one row before temperature, and which ids they stand for."""

    map_ptr: Pointer | None  # int64 [V], ids in the target's vocabulary
    num_targets: int  # ids of the target
    adjust: Adjustments | None
    slot: int
    mask_row: int  # row of the bit mask


class SparseOutputs(NamedTuple):
    """What a block on candidates writes; C includes successors."""

    tokens_ptr: Pointer  # int64 [S, K]
    stride_tokens: int
    ids_ptr: Pointer | None  # int64 [S, K, C]
    stride_ids: int
    stride_ids_position: int
    logits_ptr: Pointer | None  # [S, K, C]
    stride_logits: int
    stride_logits_position: int
    lse_ptr: Pointer | None  # fp32 [S, K]
    stride_lse: int
    flags_ptr: Pointer  # int32 [R]


class Selection(NamedTuple):
    """Scratch in which the C best of every row are found; U vocabulary sub-blocks, padded."""

    keys_ptr: Pointer | None  # int32 [R, K, U], keys of the sub-blocks' maxima
    sub_blocks_ptr: Pointer | None  # int32 [R, K, C], the best sub-blocks
    ids_ptr: Pointer  # int32 [R, K, C], the best ids, ascending
    bounds_ptr: Pointer | None  # int32 [R, K, 2]: least key among them, and the last id with it
    arrivals_ptr: Pointer  # int32 [R, K], parts of a row that are done; zero before and after


class WalkScratch(NamedTuple):
    """Scratch of the walk over a request's positions."""

    score_ptr: Pointer  # fp32 [R, K], the confidence head's products with hidden states
    noise_ptr: Pointer | None  # fp32 [R, K, padded C], of sampled blocks without successors
    products_ptr: Pointer | None  # fp32 [R, K, O], the gated or rnn head's
    latent_ptr: Pointer | None  # [R, r]
    states_ptr: Pointer | None  # fp32 [R, 2, r]
    arrivals_ptr: Pointer  # int32 [R], programs of a request that are done; zero before and after
    status_ptr: Pointer | None  # int32 [R], flags of a request's rows; zero before and after; None on shards


class CandidateWidths(NamedTuple):
    """Sizes of the rows of a block on candidates, and which ids their columns stand for."""

    vocab: int  # V, or how many ids a row's list holds at most
    map_ptr: Pointer | None  # int64 [V], ids in the target's vocabulary
    num_targets: int  # ids of the target
    num_candidates: int  # C


class WalkSizes(NamedTuple):
    """How many drafts a request's walk makes, and where they stand in a round."""

    num_drafts: int  # K
    first_draft: int  # number of the first draft in its round
    column: int  # of the first draft in the outputs


class SelectionTile(NamedTuple):
    """Sizes of the search for the C best, one constexpr."""

    BLOCK: int  # ids of a chunk
    GROUP: int  # ids of a sub-block
    SUB_BLOCKS: int  # padded number of sub-blocks of a row
    CHOSEN: int  # padded number of sub-blocks that are read again
    WIDTH: int  # padded number of candidates
    SHIFT: int  # low bits that no key sets


class WalkOptions(NamedTuple):
    """Choices and sizes of the walk over a request's positions, one constexpr."""

    ADVANCE: Callable  # of kernels/draft/candidate_heads.py: the latent of the next position
    STREAM: int  # of the noise
    WITH_MARKOV: bool  # the confidence head reads W1[x], too
    JOINT: bool  # filters apply jointly, not one after another
    LOG_WIDTH: int
    WIDTH: int  # padded number of candidates and successors
    SHIFT: int  # low bits that no key sets
    ROWS: int  # positions at a time, where none waits for another
    BLOCK_R: int  # ranks of W2 at a time
    MORE_RANKS: bool  # there are more
    BLOCK_O: int  # outputs of a latent at a time
    BLOCK_J: int  # columns of its weight at a time
    DRAFTS: int  # padded number of positions

    cache_key = functions_key


# --- candidates on vocabulary shards ----------------------------------------------------------------------------------


class ShardWeights(NamedTuple):
    """W2 of a shard, where the rows of its candidates are to be gathered."""

    ptr: Pointer  # [W, r]
    stride: int
    scale_ptr: Pointer | None  # fp32 [W]
    rank: int  # r


class CandidateList(NamedTuple):
    """What a rank sends: its C best of every position."""

    ids_ptr: Pointer  # int32 [R, K, C], ascending, -1 = none
    keys_ptr: Pointer  # int32 [R, K, C], after penalties, bias and mask
    logits_ptr: Pointer  # [R, K, C]
    targets_ptr: Pointer | None  # int32 [R, K, C], ids in the target's vocabulary
    rows_ptr: Pointer | None  # [R, K, C, r], of W2
    scales_ptr: Pointer | None  # fp32 [R, K, C]
    status_ptr: Pointer  # int32 [R, K]


class GatheredLists(NamedTuple):
    """The lists of all ranks."""

    ids_ptr: Pointer  # int32 [N, R, K, C]
    keys_ptr: Pointer  # int32 [N, R, K, C]
    logits_ptr: Pointer  # [N, R, K, C]
    targets_ptr: Pointer | None  # int32 [N, R, K, C]
    rows_ptr: Pointer | None  # [N, R, K, C, r]: W2 of the head where rows are gathered
    status_ptr: Pointer  # int32 [N, R, K]
    shards: int  # N


class MergedIds(NamedTuple):
    """Scratch in which the C best of all ranks' lists are found."""

    ids_ptr: Pointer  # int32 [R, K, C], ascending
    places_ptr: Pointer  # int32 [R, K, C], as in `Merged`


class Merged(NamedTuple):
    """Where the candidates of a walk lie among the parts of all ranks."""

    places_ptr: Pointer  # int32 [R, K, C]: rank * C + entry in that rank's list of a position
    stride_part: int  # int64 words of a rank's part
    targets_ptr: Pointer | None  # int32 [N, R, K, C]; None: an id is its own target id
    rows_ptr: Pointer | None  # [N, R, K, C, r]; None: W2 is whole
    shards: int  # N
