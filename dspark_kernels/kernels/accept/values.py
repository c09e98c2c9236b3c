"""What functions inside the kernels of acceptance hand each other: records that are no arguments of a kernel."""

from typing import Any, NamedTuple

from ..args import Adjustments, Pointer
from .args import Limits, Number


class Lineage(NamedTuple):
    """Ancestors of a tree's nodes as bits, int64 [S, M]."""

    ancestors_ptr: Pointer
    num_nodes: Number


class View(NamedTuple):
    """A request's target logits as acceptance reads them (target.py)."""

    logits_ptr: Pointer
    stride: Number
    vocab: Number
    adjustments: Adjustments | None
    token_ids_ptr: Pointer
    lineage: Lineage | None  # None: a chain
    logits_indices_ptr: Pointer
    row0: Number  # first logit row of the request
    slot: Number
    length: Number  # its drafts; -1 for a request without rows
    limits: Limits | None


class Distribution(NamedTuple):
    """prob(id) = exp2((logit - reference) * scale) * factor, or a point mass; see rows.soft_prob."""

    point: Number  # the id that has all probability, or SOFTMAX, or NOBODY
    reference: Number
    factor: Number


class Weights(NamedTuple):
    """A draft distribution that is not normalised: exp2((logit - reference) * scale), or a point mass."""

    point: Number
    reference: Number


class RowDrafts(NamedTuple):
    """Of rows of a request: the drafts that they verify."""

    ids: Any  # int64, 0 where there is none
    inside: Any  # whether they are ids of the vocabulary
    missing: Any  # whether they were never made


class ForwardRows(NamedTuple):
    """Of a request in the forward pass: the row of its anchor, and those of its drafts."""

    anchor: Number
    drafts: Any


class QueryRows(NamedTuple):
    """All rows of a request in the forward pass: its first one, and the one after its last."""

    begin: Number
    end: Number


class Known(NamedTuple):
    """What a decision needs to know of a request besides its rows."""

    anchor: Number  # position of its anchor
    sampled: Number  # whether its temperature is above 0
    seed: Number
    drafts: RowDrafts
    rows: ForwardRows
    query: QueryRows


class Verdict(NamedTuple):
    """What a rule says of a request's drafts."""

    accepted: Number  # how many stay
    wants_residual: Number  # whether a residual has to be summed before a token can be drawn
    prefix_prob: Any  # P_i of the block rule [WIDTH], 1 under the others


class RowPair(NamedTuple):
    """A row as the residual sees it: both distributions, and P_i of the block rule (1 under the token rule)."""

    target: Distribution
    draft: Distribution
    prefix_prob: Number
    target_prob: Number  # of the draft
    removed: Number  # what a one-hot draft adds to its block's sum of exponentials, in units of 2^-40


class Scales(NamedTuple):
    """log2(e) / temperature."""

    target: Number
    draft: Number


class Columns(NamedTuple):
    """A rank's columns: first id, how many, first vocabulary block, blocks that it can touch."""

    start: Number
    held: Number
    first_block: Number
    blocks: Number


class Sizes(NamedTuple):
    num_requests: Number
    num_forward: Number
    num_drafts: Number  # of a tree: its nodes
    num_blocks: Number


class RequestRows(NamedTuple):
    """Where a request is: its slot (-1: a padding row), its first logit row, how many logit rows it has."""

    slot: Number
    row0: Number
    count: Number


class Temperatures(NamedTuple):
    """What a request's temperatures say."""

    scales: Scales
    sampled: Number  # whether the target's is above 0
    draft: Number  # the draft's
