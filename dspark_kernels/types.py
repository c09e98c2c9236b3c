"""The tensors that the draft and verify steps exchange, as frozen dataclasses that check themselves when they are made.

Symbols: R requests in the batch; S request slots of the engine (S = R where no `state_indices` are used); K draft positions;
V vocabulary (Vd the draft head's); C candidates; H hidden size; r Markov rank; N rows of the target's forward pass (N_max
allocated); M nodes of a draft tree; Hq/Hkv query and key-value heads; D head size.

A tensor of another dtype, shape, device or stride raises TypeError or ValueError with the name of the field.
"""

from __future__ import annotations

import dataclasses
import enum

import torch
from torch import Tensor

from .caches import KVLayers as KVLayers, PagedKV as PagedKV
from .checks import INT_DTYPES, LOGIT_DTYPES, Checked, check_choice, check_int, check_tensor, check_type

# Types of this module that have a page of their own.
from .choices import DRAWN, FILTER_ORDERS, Drawn, FilterOrder
from .cost import CostTable as CostTable
from .proposals import (
    DenseProposal as DenseProposal,
    OneHotProposal as OneHotProposal,
    Proposal as Proposal,
    SparseProposal as SparseProposal,
)

_FLOAT = torch.float32
_WEIGHTS = LOGIT_DTYPES
_QUANTISED = (torch.float8_e4m3fn, torch.int8)


class Flag(enum.IntFlag):
    """What an op met on the device, one bit each. Ops return the bits of every request as int32 [R] `flags`."""

    NONFINITE_ROW = 1  # a row without any finite logit: the lowest allowed id (else 0) was emitted, abort the request
    NAN = 2  # a NaN logit was read as -inf
    BAD_TOKEN_ID = 4  # a token id outside the vocabulary, or a draft outside the support of its proposal
    MISSING_DRAFT = 8  # a draft of -1
    EMPTY_RESIDUAL = 16  # the residual summed to 0: the correction was drawn from the target distribution


class Stream(enum.IntEnum):
    """What a random word is used for: the low byte of word 3 of the Philox counter. The tree node is in the bits above it."""

    DRAFT = 1  # per-token noise of a draft position
    ACCEPT = 2  # the acceptance uniform of a draft
    LEAF = 3  # race between vocabulary blocks of 1024 ids, correction and bonus
    CORRECT = 4  # race inside the winning block
    COUPLED = 5  # noise shared by draft and target on purpose (the word of the anchor position is 0)
    DRAFT_LEAF = 6  # race between vocabulary blocks of a draft position


@dataclasses.dataclass(frozen=True, eq=False)
class Penalties(Checked):
    """Repetition, presence and frequency penalties, stored for the tokens that have a count.

        token_ids     int64 or int32 [S, T], each token at most once per slot, -1 = unused entry
        counts        int32 [S, T], how often the request has emitted the token, the anchor included; 0 for prompt tokens
        repetition    fp32 [S] (> 0) or None
        presence      fp32 [S] or None
        frequency     fp32 [S] or None

    A token is penalised if it is in token_ids or was drafted earlier in this round. Its logit x becomes x / repetition where x > 0
    and x * repetition elsewhere. Then frequency * n is subtracted, and presence where n > 0; n is its count plus its occurrences
    among the drafts before this position. Sources: repetition, Keskar et al., arXiv 1909.05858; presence and frequency, the OpenAI
    API reference.
    """

    token_ids: Tensor
    counts: Tensor
    repetition: Tensor | None = None
    presence: Tensor | None = None
    frequency: Tensor | None = None

    def _check(self) -> None:
        ids = self._tensor("token_ids", dtype=INT_DTYPES, shape=("S", "T"), last_contiguous=True)
        self._tensor("counts", dtype=torch.int32, shape=tuple(ids.shape), device=ids.device, last_contiguous=True)
        for field in ("repetition", "presence", "frequency"):
            self._optional(field, dtype=_FLOAT, shape=(ids.shape[0],), device=ids.device, contiguous=True)


@dataclasses.dataclass(frozen=True, eq=False)
class SamplingTensors(Checked):
    """Sampling settings per request slot.

        temperature     fp32 [S], 0 = greedy
        seed            int64 or int32 [S], the Philox key
        top_k           int32 [S] or None; off where <= 0 or >= V; 1 is greedy
        top_p           fp32 [S] or None; off where >= 1
        min_p           fp32 [S] or None; off where <= 0
        filter_order    "top_k_first" or "joint"
        logit_bias      bf16, fp16 or fp32 [S, V] or None
        token_bitmask   int32 [rows, ceil(V / 32)] or None; bit 1 = allowed, lowest bit first. One row per row of target logits in
                        acceptance; [S, K, ceil(V / 32)] in drafting
        penalties       `Penalties` or None

    Order of application: penalties and bias, mask, temperature, top_k (ties keep the lowest ids), renormalise, top_p (the token
    that crosses the threshold stays), renormalise, min_p relative to the maximum. "joint" applies both top_k and top_p to the
    distribution before filters.
    """

    temperature: Tensor
    seed: Tensor
    top_k: Tensor | None = None
    top_p: Tensor | None = None
    min_p: Tensor | None = None
    filter_order: FilterOrder = "top_k_first"
    logit_bias: Tensor | None = None
    token_bitmask: Tensor | None = None
    penalties: Penalties | None = None

    def _check(self) -> None:
        temperature = self._tensor("temperature", dtype=_FLOAT, shape=("S",), contiguous=True)
        rules = dict(shape=(temperature.shape[0],), device=temperature.device, contiguous=True)
        self._tensor("seed", dtype=INT_DTYPES, **rules)
        self._optional("top_k", dtype=torch.int32, **rules)
        self._optional("top_p", dtype=_FLOAT, **rules)
        self._optional("min_p", dtype=_FLOAT, **rules)
        check_choice(self._name("filter_order"), self.filter_order, FILTER_ORDERS)
        self._optional("logit_bias", dtype=LOGIT_DTYPES, shape=(temperature.shape[0], "V"), last_contiguous=True)
        self._optional("token_bitmask", dtype=torch.int32, last_contiguous=True)
        if self.penalties is not None:
            check_type(self._name("penalties"), self.penalties, Penalties)


@dataclasses.dataclass(frozen=True, eq=False)
class MarkovHead(Checked):
    """Vanilla sequential head of DSpark (arXiv 2607.05147): bias [Vd] = W1[previous] W2^T.

    w1         bf16, fp16 or fp32 [V, r], r >= 1
    w2         bf16, fp16 or fp32 [Vd, r], or fp8 e4m3 or int8 with w2_scale
    w2_scale   fp32 [Vd], or None for an unquantised w2
    """

    w1: Tensor
    w2: Tensor
    w2_scale: Tensor | None = None

    def _check(self) -> None:
        w1 = self._tensor("w1", dtype=_WEIGHTS, shape=("V", "r"), last_contiguous=True)
        if w1.shape[1] < 1:
            raise ValueError(f"{self._name('w1')}: expected rank >= 1 (rank 0 is head=None), got 0")
        w2 = self._tensor("w2", dtype=_WEIGHTS + _QUANTISED, shape=("Vd", w1.shape[1]), device=w1.device, last_contiguous=True)
        if w2.dtype in _QUANTISED and self.w2_scale is None:
            raise ValueError(f"{self._name('w2_scale')}: expected fp32 [{w2.shape[0]}] for w2 in {w2.dtype}, got None")
        self._optional("w2_scale", dtype=_FLOAT, shape=(w2.shape[0],), device=w1.device)

    @property
    def rank(self) -> int:
        """r, columns of W1 and W2."""
        return self.w1.shape[1]


@dataclasses.dataclass(frozen=True, eq=False)
class GatedMarkovHead(MarkovHead):
    """Gated head: g = sigmoid(G [h; W1[previous]] + b), bias = (g * W1[previous]) W2^T.

    w1, w2, w2_scale: as in `MarkovHead`. gate_weight G: [r, H + r]; gate_bias b: [r]; both bf16, fp16 or fp32.
    """

    gate_weight: Tensor = dataclasses.field(kw_only=True)
    gate_bias: Tensor = dataclasses.field(kw_only=True)

    def _check(self) -> None:
        super()._check()
        self._tensor("gate_weight", dtype=_WEIGHTS, shape=(self.rank, "H+r"), last_contiguous=True)
        self._tensor("gate_bias", dtype=_WEIGHTS, shape=(self.rank,))


@dataclasses.dataclass(frozen=True, eq=False)
class RnnMarkovHead(MarkovHead):
    """Recurrent head: z = [state; W1[previous]; h], (gate, candidate, output) = the three chunks of J z + b.

    The state becomes sigmoid(gate) * state + (1 - sigmoid(gate)) * tanh(candidate), from 0 before the first draft; the bias is
    tanh(output) W2^T. w1, w2, w2_scale: as in `MarkovHead`. joint_weight J: [3r, 2r + H]; joint_bias b: [3r]; both bf16, fp16 or
    fp32.
    """

    joint_weight: Tensor = dataclasses.field(kw_only=True)
    joint_bias: Tensor = dataclasses.field(kw_only=True)

    def _check(self) -> None:
        super()._check()
        self._tensor("joint_weight", dtype=_WEIGHTS, shape=(3 * self.rank, "2r+H"), last_contiguous=True)
        self._tensor("joint_bias", dtype=_WEIGHTS, shape=(3 * self.rank,))


@dataclasses.dataclass(frozen=True, eq=False)
class ConfidenceHead(Checked):
    """Probability that draft k is accepted, given that the drafts before it are: c_k = sigmoid((w . [h_k; W1[x_{k-1}]] + b) / T_k).

    weight             bf16, fp16 or fp32 [H + r], or [H] where the previous token is not an input
    bias               [1] or None
    sts_temperatures   fp32 [K] or None: T_k of sequential temperature scaling (`calibration.fit_sts`), None = 1
    """

    weight: Tensor
    bias: Tensor | None = None
    sts_temperatures: Tensor | None = None

    def _check(self) -> None:
        weight = self._tensor("weight", dtype=_WEIGHTS, shape=("H+r",), last_contiguous=True)
        self._optional("bias", dtype=_WEIGHTS, shape=(1,), device=weight.device)
        self._optional("sts_temperatures", dtype=_FLOAT, shape=("K",), device=weight.device, contiguous=True)


@dataclasses.dataclass(frozen=True, eq=False)
class DraftBlock(Checked):
    """The drafts of a block.

    tokens              int64 [S, K], -1 = no draft; int32 where an engine's own are written or read
    proposal            the distribution that the drafts were drawn from
    flags               int32 [R], bits of `Flag`
    confidence          fp32 [S, K] or None: calibrated probability that draft k is accepted, given the drafts before it
    confidence_logits   fp32 [S, K] or None: its logit before calibration
    """

    tokens: Tensor
    proposal: Proposal
    flags: Tensor
    confidence: Tensor | None = None
    confidence_logits: Tensor | None = None

    def _check(self) -> None:
        tokens = self._tensor("tokens", dtype=INT_DTYPES, shape=("S", "K"), last_contiguous=True)
        check_type(self._name("proposal"), self.proposal, (OneHotProposal, DenseProposal, SparseProposal))
        self._tensor("flags", dtype=torch.int32, shape=("R",), device=tokens.device, contiguous=True)
        for field in ("confidence", "confidence_logits"):
            self._optional(field, dtype=_FLOAT, shape=tuple(tokens.shape), device=tokens.device, last_contiguous=True)


@dataclasses.dataclass(frozen=True, eq=False)
class VerifyLayout(Checked):
    """Which rows of its forward pass the target computes for which request.

    draft_lens         int32 [R], drafts of each request
    query_start_loc    int32 [R + 1], first forward row of each request, then the end
    cu_num_logits      int32 [R + 1], first row of logits of each request, then the end
    token_ids          int64 or int32 [N_max], by forward row
    positions          int64 or int32 [N_max], by forward row
    batch_indices      int32 [N_max], request of the forward row, -1 = padding
    logits_indices     int32 [L], the forward row that each row of logits comes from
    num_rows           int32 [1], forward rows in use
    flags              int32 [R], bits of `Flag`
    slot_mapping       int64 [N_max], cache slot of the forward row, -1 = padding; or None
    max_drafts         the largest possible entry of draft_lens, or None where it is unknown
    """

    draft_lens: Tensor
    query_start_loc: Tensor
    cu_num_logits: Tensor
    token_ids: Tensor
    positions: Tensor
    batch_indices: Tensor
    logits_indices: Tensor
    num_rows: Tensor
    flags: Tensor
    slot_mapping: Tensor | None = None
    max_drafts: int | None = None

    def _check(self) -> None:
        lens = self._tensor("draft_lens", dtype=torch.int32, shape=("R",), contiguous=True)
        requests, device = lens.shape[0], lens.device
        one = dict(device=device, contiguous=True)
        self._tensor("query_start_loc", dtype=torch.int32, shape=(requests + 1,), **one)
        self._tensor("cu_num_logits", dtype=torch.int32, shape=(requests + 1,), **one)
        rows = self._tensor("token_ids", dtype=INT_DTYPES, shape=("N_max",), **one).shape[0]
        self._tensor("positions", dtype=INT_DTYPES, shape=(rows,), **one)
        self._tensor("batch_indices", dtype=torch.int32, shape=(rows,), **one)
        self._tensor("logits_indices", dtype=torch.int32, shape=("L",), **one)
        self._tensor("num_rows", dtype=torch.int32, shape=(1,), **one)
        self._tensor("flags", dtype=torch.int32, shape=(requests,), **one)
        self._optional("slot_mapping", dtype=torch.int64, shape=(rows,), **one)
        if self.max_drafts is not None:
            check_int(self._name("max_drafts"), self.max_drafts, low=0)

    @classmethod
    def of_rows(cls, cu_num_logits: Tensor, token_ids: Tensor, positions: Tensor, max_drafts: int) -> VerifyLayout:
        """A layout for acceptance over an engine's own rows of logits: forward row j is logit row j.

            cu_num_logits   int32 or int64 [R + 1], first row of each request, then the end; entries never fall. A padding request
                            repeats the entry before it: it has no row and emits nothing
            token_ids       int32 or int64 [L], the input token of each row: the anchor of a request, then its drafts, so that row i
                            of a request verifies the draft in entry i + 1 of the request. -1 = no draft: it is rejected and flagged
                            MISSING_DRAFT. The anchor's entry is not read
            positions       int32 or int64 [L], of each row; acceptance reads that of a request's first row
            max_drafts      the largest possible number of drafts of a request

        Rows from cu_num_logits[-1] on are padding. token_ids and positions are not copied where they are contiguous; the index
        arrays are made by a few small launches of torch, without a host synchronisation, so that a CUDA graph can capture them.
        """
        starts = check_tensor("cu_num_logits", cu_num_logits, dtype=INT_DTYPES, shape=("R+1",))
        if starts.shape[0] < 1:
            raise ValueError("cu_num_logits: expected R + 1 >= 1 entries, got 0")
        device = starts.device
        rows = check_tensor("token_ids", token_ids, dtype=INT_DTYPES, shape=("L",), device=device).shape[0]
        check_tensor("positions", positions, dtype=INT_DTYPES, shape=(rows,), device=device)
        starts = starts.to(torch.int32).contiguous()
        logit_rows = torch.arange(rows, dtype=torch.int32, device=device)
        owners = torch.searchsorted(starts[1:], logit_rows, right=True, out_int32=True)
        lens = (starts[1:] - starts[:-1] - 1).clamp(min=0)
        return cls(
            draft_lens=lens,
            query_start_loc=starts,
            cu_num_logits=starts,
            token_ids=token_ids.contiguous(),
            positions=positions.contiguous(),
            batch_indices=torch.where(owners < lens.shape[0], owners, -1),
            logits_indices=logit_rows,
            num_rows=starts[-1:],
            flags=torch.zeros_like(lens),
            max_drafts=max_drafts,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class DraftTree(Checked):
    """A draft tree per request slot. Node 0 is the anchor; parents come before children, elder siblings before younger ones.

    tokens         int64 [S, M], M <= 64
    parents        int32 [S, M], -1 = none; so for first_child and next_sibling, int32 [S, M]
    depths         int32 [S, M], 0 for the anchor
    ancestors      int64 [S, M], bit s is set where node s is the node itself or an ancestor of it
    num_nodes      int32 [S]
    proposal       row m is the distribution of the children of node m
    drawn          how children were chosen: "one_hot" (deterministically), "iid" or "without_replacement"
    flags          int32 [R], bits of `Flag`
    survival       fp32 [S, M] or None: probability that a node is reached and accepted, 1 for the anchor. Nodes that a budget
                   cut off keep theirs; entries without a node are 0
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    first_child: Tensor
    next_sibling: Tensor
    ancestors: Tensor
    num_nodes: Tensor
    proposal: Proposal
    drawn: Drawn
    flags: Tensor
    survival: Tensor | None = None

    def _check(self) -> None:
        tokens = self._tensor("tokens", dtype=torch.int64, shape=("S", "M"), contiguous=True)
        if tokens.shape[1] > 64:
            raise ValueError(f"{self._name('tokens')}: expected at most 64 nodes, got {tokens.shape[1]}")
        same = dict(shape=tuple(tokens.shape), device=tokens.device, contiguous=True)
        for field in ("parents", "depths", "first_child", "next_sibling"):
            self._tensor(field, dtype=torch.int32, **same)
        self._tensor("ancestors", dtype=torch.int64, **same)
        self._tensor("num_nodes", dtype=torch.int32, shape=(tokens.shape[0],), device=tokens.device, contiguous=True)
        check_type(self._name("proposal"), self.proposal, (OneHotProposal, DenseProposal, SparseProposal))
        check_choice(self._name("drawn"), self.drawn, DRAWN)
        self._tensor("flags", dtype=torch.int32, shape=("R",), device=tokens.device)
        self._optional("survival", dtype=_FLOAT, **same)


@dataclasses.dataclass(frozen=True, eq=False)
class Acceptance(Checked):
    """What a verify step emits.

    tokens         int64 [R, K + 1]: the accepted drafts, then the correction or bonus token, then -1
    num_accepted   int32 [R], accepted drafts
    num_emitted    int32 [R], entries of tokens in use
    num_rejected   int32 [R], verified drafts that were not accepted
    next_token     int64 [R], the last emitted token: the anchor of the next round; tokens and next_token of an `out` may be int32
    last_row       int32 [R], the forward row whose logits gave next_token
    commit_mask    bool [N_max], forward rows whose keys and values stay
    flags          int32 [R], bits of `Flag`
    logprobs       fp32 [R, K + 1] of the emitted tokens, 0 beyond them; or None
    path           int32 [R, M], for trees: the accepted nodes; else None
    kv_source      int32 [R, M], for trees: where `compact_kv` finds the rows to keep; else None
    """

    tokens: Tensor
    num_accepted: Tensor
    num_emitted: Tensor
    num_rejected: Tensor
    next_token: Tensor
    last_row: Tensor
    commit_mask: Tensor
    flags: Tensor
    logprobs: Tensor | None = None
    path: Tensor | None = None
    kv_source: Tensor | None = None

    def _check(self) -> None:
        tokens = self._tensor("tokens", dtype=INT_DTYPES, shape=("R", "K+1"), contiguous=True)
        requests, device = tokens.shape[0], tokens.device
        for field in ("num_accepted", "num_emitted", "num_rejected", "last_row", "flags"):
            self._tensor(field, dtype=torch.int32, shape=(requests,), device=device, contiguous=True)
        self._tensor("next_token", dtype=INT_DTYPES, shape=(requests,), device=device, contiguous=True)
        self._tensor("commit_mask", dtype=torch.bool, shape=("N_max",), device=device, contiguous=True)
        self._optional("logprobs", dtype=_FLOAT, shape=tuple(tokens.shape), device=device, contiguous=True)
        for field in ("path", "kv_source"):
            self._optional(field, dtype=torch.int32, shape=(requests, "M"), device=device, contiguous=True)


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionPlan(Checked):
    """The work table of `tree_attention`, made by `plan_attention` once per step and read by all layers.

        items    int32 [max_items, 10], one row per work item: request slot (-1 = a padding request), context length, first forward
                 row of the request, number of its rows, query tile, part of the keys, number of parts, first context key, end of
                 the context keys, first row of partial results
        counts   int32 [3]: items in use; first forward row in use; end of the forward rows in use

    The other fields are what the table was made for. A launch that reads it must be compiled for the same values.
    """

    items: Tensor
    counts: Tensor
    query_heads: int
    kv_heads: int
    head_dim: int
    element_size: int  # bytes of a query element
    block_m: int  # packed rows (forward row x group head) of a tile
    block_n: int  # keys of a block
    programs: int
    partial_rows: int  # rows of partial results there must be room for
    rows: int  # N_max of the layout
    requests: int
    slots: int  # rows of the block tables
    max_keys: int  # that a block table has pages for
    window: int | None
    batch_invariant: bool

    def _check(self) -> None:
        items = self._tensor("items", dtype=torch.int32, shape=("max_items", 10), contiguous=True)
        self._tensor("counts", dtype=torch.int32, shape=(3,), device=items.device, contiguous=True)
        for field in ("query_heads", "kv_heads", "head_dim", "element_size", "block_m", "block_n", "programs"):
            check_int(self._name(field), getattr(self, field), low=1)
        for field in ("partial_rows", "rows", "requests", "slots", "max_keys"):
            check_int(self._name(field), getattr(self, field), low=0)
