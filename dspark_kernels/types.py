"""The tensors that draft and verify steps exchange, as frozen dataclasses that check themselves when made.

Symbols: R requests in the batch; S state slots of the engine (S = R where no `state_indices` is used); K draft positions;
V vocabulary (Vd the draft head's); C candidates; H hidden size; r Markov rank; N rows of the target's forward pass (N_max
allocated); M nodes of a draft tree; Hq/Hkv query and key-value heads; D head size.
"""

from __future__ import annotations

import dataclasses
import enum
import math

import torch
from torch import Tensor

from .checks import INT_DTYPES, LOGIT_DTYPES, Checked, check_choice, check_int, check_tensor, check_type
from .cost import CostTable  # noqa: F401  one of these types, on a page of its own

_FLOAT = torch.float32
_WEIGHTS = LOGIT_DTYPES
_QUANTISED = (torch.float8_e4m3fn, torch.int8)


class Flag(enum.IntFlag):
    """What an op met on the device, one bit each, per request (int32 [R] `flags`)."""

    NONFINITE_ROW = 1  # a row without any finite logit: the lowest allowed id (else 0) was emitted, abort the request
    NAN = 2  # a NaN logit was read as -inf
    BAD_TOKEN_ID = 4  # a token id outside the vocabulary, or a draft outside the support of its proposal
    MISSING_DRAFT = 8  # a draft of -1
    EMPTY_RESIDUAL = 16  # the residual summed to 0: the correction was drawn from the target distribution


class Stream(enum.IntEnum):
    """Purpose of a random word, the low byte of Philox counter word 3 (the tree node is above it)."""

    DRAFT = 1  # per-token noise of a draft position
    ACCEPT = 2  # the acceptance uniform of a draft
    LEAF = 3  # race between vocabulary blocks of 1024 ids, correction and bonus
    CORRECT = 4  # race inside the winning block
    COUPLED = 5  # noise shared by draft and target on purpose (anchor position word 0)
    DRAFT_LEAF = 6  # race between vocabulary blocks of a draft position


@dataclasses.dataclass(frozen=True, eq=False)
class Penalties(Checked):
    """Repetition, presence and frequency penalties over sparse token counts.

    token_ids: int64 or int32 [S, T], each token at most once a slot, -1 = unused. counts: int32 [S, T], how often the request
    has emitted it, the anchor included; 0 for a token that only the prompt holds. repetition (> 0), presence, frequency: fp32 [S]
    or None. For a listed token and one drafted earlier in this round, x becomes x / repetition (x > 0) or x * repetition; then
    frequency * n and, if n > 0, presence are taken off, n = count + occurrences among the drafts before. Sources: repetition,
    Keskar et al. arXiv 1909.05858; presence and frequency, the OpenAI API reference.
    """

    token_ids: Tensor
    counts: Tensor
    repetition: Tensor | None = None
    presence: Tensor | None = None
    frequency: Tensor | None = None

    def _check(self):
        ids = self._tensor("token_ids", dtype=INT_DTYPES, shape=("S", "T"), last_contiguous=True)
        self._tensor("counts", dtype=torch.int32, shape=tuple(ids.shape), device=ids.device, last_contiguous=True)
        for field in ("repetition", "presence", "frequency"):
            self._optional(field, dtype=_FLOAT, shape=(ids.shape[0],), device=ids.device, contiguous=True)


@dataclasses.dataclass(frozen=True, eq=False)
class SamplingTensors(Checked):
    """Per-request sampling settings.

    temperature: fp32 [S], 0 = greedy. seed: int64 [S], the Philox key. Optional: top_k int32 [S] (off: <= 0 or >= V; 1 is
    greedy), top_p fp32 [S] (off: >= 1), min_p fp32 [S] (off: <= 0), filter_order "top_k_first" or "joint", logit_bias
    [S, V], token_bitmask int32 [rows, ceil(V/32)] (bit 1 = allowed, lowest bit first; rows = rows of target logits in
    acceptance, [S, K] in drafting), penalties.
    Order: penalties and bias, mask, temperature, top_k (ties: lowest ids), renormalise, top_p (with the crossing token),
    renormalise, min_p against the maximum; "joint" applies top_k and top_p to the unfiltered distribution.
    """

    temperature: Tensor
    seed: Tensor
    top_k: Tensor | None = None
    top_p: Tensor | None = None
    min_p: Tensor | None = None
    filter_order: str = "top_k_first"
    logit_bias: Tensor | None = None
    token_bitmask: Tensor | None = None
    penalties: Penalties | None = None

    def _check(self):
        temperature = self._tensor("temperature", dtype=_FLOAT, shape=("S",), contiguous=True)
        rules = dict(shape=(temperature.shape[0],), device=temperature.device, contiguous=True)
        self._tensor("seed", dtype=torch.int64, **rules)
        self._optional("top_k", dtype=torch.int32, **rules)
        self._optional("top_p", dtype=_FLOAT, **rules)
        self._optional("min_p", dtype=_FLOAT, **rules)
        check_choice(self._name("filter_order"), self.filter_order, ("top_k_first", "joint"))
        self._optional("logit_bias", dtype=LOGIT_DTYPES, shape=(temperature.shape[0], "V"), last_contiguous=True)
        self._optional("token_bitmask", dtype=torch.int32, last_contiguous=True)
        if self.penalties is not None:
            check_type(self._name("penalties"), self.penalties, Penalties)


@dataclasses.dataclass(frozen=True, eq=False)
class MarkovHead(Checked):
    """Vanilla sequential head, bias = W1[previous] W2^T (DSpark, arXiv 2607.05147).

    w1: [V, r]; w2: [Vd, r], bf16, fp16 or fp32, or fp8 e4m3 / int8 with `w2_scale` fp32 [Vd].
    """

    w1: Tensor
    w2: Tensor
    w2_scale: Tensor | None = None

    def _check(self):
        w1 = self._tensor("w1", dtype=_WEIGHTS, shape=("V", "r"), last_contiguous=True)
        if w1.shape[1] < 1:
            raise ValueError(f"{self._name('w1')}: expected rank >= 1 (rank 0 is head=None), got 0")
        w2 = self._tensor("w2", dtype=_WEIGHTS + _QUANTISED, shape=("Vd", w1.shape[1]), device=w1.device, last_contiguous=True)
        if w2.dtype in _QUANTISED and self.w2_scale is None:
            raise ValueError(f"{self._name('w2_scale')}: expected fp32 [{w2.shape[0]}] for w2 in {w2.dtype}, got None")
        self._optional("w2_scale", dtype=_FLOAT, shape=(w2.shape[0],), device=w1.device)

    @property
    def rank(self) -> int:
        return self.w1.shape[1]


@dataclasses.dataclass(frozen=True, eq=False)
class GatedMarkovHead(MarkovHead):
    """Gated head: g = sigmoid(G [h; W1[previous]] + b), bias = (g * W1[previous]) W2^T. gate_weight [r, H+r], gate_bias [r]."""

    gate_weight: Tensor = None
    gate_bias: Tensor = None

    def _check(self):
        super()._check()
        self._tensor("gate_weight", dtype=_WEIGHTS, shape=(self.rank, "H+r"), last_contiguous=True)
        self._tensor("gate_bias", dtype=_WEIGHTS, shape=(self.rank,))


@dataclasses.dataclass(frozen=True, eq=False)
class RnnMarkovHead(MarkovHead):
    """Recurrent head: z = [state; W1[previous]; h], (gate, candidate, output) = chunks of J z + b.

    state' = sigmoid(gate) * state + (1 - sigmoid(gate)) * tanh(candidate); bias = tanh(output) W2^T; state_0 = 0.
    joint_weight [3r, 2r+H], joint_bias [3r].
    """

    joint_weight: Tensor = None
    joint_bias: Tensor = None

    def _check(self):
        super()._check()
        self._tensor("joint_weight", dtype=_WEIGHTS, shape=(3 * self.rank, "2r+H"), last_contiguous=True)
        self._tensor("joint_bias", dtype=_WEIGHTS, shape=(3 * self.rank,))


@dataclasses.dataclass(frozen=True, eq=False)
class ConfidenceHead(Checked):
    """Survival score c_k = sigmoid((w . [h_k; W1[x_{k-1}]] + b) / T_k).

    weight: [H] or [H+r]; bias: [1] or None; sts_temperatures: fp32 [K] or None (sequential temperature scaling).
    """

    weight: Tensor
    bias: Tensor | None = None
    sts_temperatures: Tensor | None = None

    def _check(self):
        weight = self._tensor("weight", dtype=_WEIGHTS, shape=("H+r",), last_contiguous=True)
        self._optional("bias", dtype=_WEIGHTS, shape=(1,), device=weight.device)
        self._optional("sts_temperatures", dtype=_FLOAT, shape=("K",), device=weight.device, contiguous=True)


@dataclasses.dataclass(frozen=True, eq=False)
class OneHotProposal(Checked):
    """The drafts were chosen deterministically (greedy, n-gram, ...): all probability is on the draft itself."""

    def _check(self):
        pass


@dataclasses.dataclass(frozen=True, eq=False)
class DenseProposal(Checked):
    """The distribution that the drafts were drawn from, as stored logits.

    logits: [S, K, V or Vd], before temperature, -inf outside a filtered support. lse: fp32 [S, K], ln sum exp(logits /
    temperature), or None. temperature: fp32 [S] (None = the sampling temperature; 0 = one-hot). draft_to_target: int64 [Vd], the
    target's id of each column, each id at most once, in any order.
    """

    logits: Tensor
    lse: Tensor | None = None
    temperature: Tensor | None = None
    draft_to_target: Tensor | None = None

    def _check(self):
        logits = self._tensor("logits", dtype=LOGIT_DTYPES, shape=("S", "K", "V"), last_contiguous=True)
        slots, drafts, width = logits.shape
        self._optional("lse", dtype=_FLOAT, shape=(slots, drafts), device=logits.device, last_contiguous=True)
        self._optional("temperature", dtype=_FLOAT, shape=(slots,), device=logits.device, contiguous=True)
        self._optional("draft_to_target", dtype=torch.int64, shape=(width,), device=logits.device, contiguous=True)


@dataclasses.dataclass(frozen=True, eq=False)
class SparseProposal(Checked):
    """The distribution that the drafts were drawn from, on C candidates. ids [S, K, C], logits [S, K, C].

    Ids in any order; entries of one id add up, ids outside the vocabulary (-1 = unused) keep their probability. lse: acceptance
    does not need it.
    """

    ids: Tensor
    logits: Tensor
    lse: Tensor | None = None
    temperature: Tensor | None = None

    def _check(self):
        ids = self._tensor("ids", dtype=INT_DTYPES, shape=("S", "K", "C"), last_contiguous=True)
        self._tensor("logits", dtype=LOGIT_DTYPES, shape=tuple(ids.shape), device=ids.device, last_contiguous=True)
        self._optional("lse", dtype=_FLOAT, shape=tuple(ids.shape[:2]), device=ids.device, last_contiguous=True)
        self._optional("temperature", dtype=_FLOAT, shape=(ids.shape[0],), device=ids.device, contiguous=True)


Proposal = OneHotProposal | DenseProposal | SparseProposal


@dataclasses.dataclass(frozen=True, eq=False)
class DraftBlock(Checked):
    """Drafts of a block.

    tokens: int64 [S, K]; confidence (calibrated) and confidence_logits (raw): fp32 [S, K] or None; proposal: the
    distribution that the drafts were drawn from; flags: int32 [R].
    """

    tokens: Tensor
    proposal: Proposal
    flags: Tensor
    confidence: Tensor | None = None
    confidence_logits: Tensor | None = None

    def _check(self):
        tokens = self._tensor("tokens", dtype=torch.int64, shape=("S", "K"), last_contiguous=True)
        check_type(self._name("proposal"), self.proposal, (OneHotProposal, DenseProposal, SparseProposal))
        self._tensor("flags", dtype=torch.int32, shape=("R",), device=tokens.device, contiguous=True)
        for field in ("confidence", "confidence_logits"):
            self._optional(field, dtype=_FLOAT, shape=tuple(tokens.shape), device=tokens.device, last_contiguous=True)


@dataclasses.dataclass(frozen=True, eq=False)
class VerifyLayout(Checked):
    """Which rows the target computes for which request.

    Per request: draft_lens int32 [R]; query_start_loc int32 [R+1] (forward rows); cu_num_logits int32 [R+1] (logit rows);
    flags int32 [R]. Per forward row [N_max]: token_ids int64, positions int64, batch_indices int32 (padding -1),
    slot_mapping int64 (padding -1) or None. Per logit row: logits_indices int32 (forward row). num_rows int32 [1].
    max_drafts: static bound of draft_lens, or None when unknown.
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

    def _check(self):
        lens = self._tensor("draft_lens", dtype=torch.int32, shape=("R",), contiguous=True)
        requests, device = lens.shape[0], lens.device
        one = dict(device=device, contiguous=True)
        self._tensor("query_start_loc", dtype=torch.int32, shape=(requests + 1,), **one)
        self._tensor("cu_num_logits", dtype=torch.int32, shape=(requests + 1,), **one)
        rows = self._tensor("token_ids", dtype=torch.int64, shape=("N_max",), **one).shape[0]
        self._tensor("positions", dtype=torch.int64, shape=(rows,), **one)
        self._tensor("batch_indices", dtype=torch.int32, shape=(rows,), **one)
        self._tensor("logits_indices", dtype=torch.int32, shape=("L",), **one)
        self._tensor("num_rows", dtype=torch.int32, shape=(1,), **one)
        self._tensor("flags", dtype=torch.int32, shape=(requests,), **one)
        self._optional("slot_mapping", dtype=torch.int64, shape=(rows,), **one)
        if self.max_drafts is not None:
            check_int(self._name("max_drafts"), self.max_drafts, low=0)


@dataclasses.dataclass(frozen=True, eq=False)
class DraftTree(Checked):
    """A draft tree per slot; node 0 is the anchor, parents come before children, elder siblings first, -1 = none.

    tokens int64, parents, depths, first_child, next_sibling int32, ancestors int64 (bit s = node s), all [S, M], M <= 64;
    num_nodes int32 [S]; proposal: row m = the distribution of node m's children; drawn: how ("one_hot", "iid",
    "without_replacement"); flags int32 [R]; survival fp32 [S, M] or None: the probability that a node is reached and accepted, 1
    for the anchor, also of the nodes that a budget cut off, 0 where there is none.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    first_child: Tensor
    next_sibling: Tensor
    ancestors: Tensor
    num_nodes: Tensor
    proposal: Proposal
    drawn: str
    flags: Tensor
    survival: Tensor | None = None

    def _check(self):
        tokens = self._tensor("tokens", dtype=torch.int64, shape=("S", "M"), contiguous=True)
        if tokens.shape[1] > 64:
            raise ValueError(f"{self._name('tokens')}: expected at most 64 nodes, got {tokens.shape[1]}")
        same = dict(shape=tuple(tokens.shape), device=tokens.device, contiguous=True)
        for field in ("parents", "depths", "first_child", "next_sibling"):
            self._tensor(field, dtype=torch.int32, **same)
        self._tensor("ancestors", dtype=torch.int64, **same)
        self._tensor("num_nodes", dtype=torch.int32, shape=(tokens.shape[0],), device=tokens.device, contiguous=True)
        check_type(self._name("proposal"), self.proposal, (OneHotProposal, DenseProposal, SparseProposal))
        check_choice(self._name("drawn"), self.drawn, ("one_hot", "iid", "without_replacement"))
        self._tensor("flags", dtype=torch.int32, shape=("R",), device=tokens.device)
        self._optional("survival", dtype=_FLOAT, **same)


@dataclasses.dataclass(frozen=True, eq=False)
class PagedKV(Checked):
    """A layer's paged key-value cache.

    k_cache, v_cache: [pages, page_size, Hkv, D], any strides but the last; bf16, fp16, fp32 or fp8 e4m3 with k_scale,
    v_scale fp32 [1] or [Hkv]. block_tables: int32 [S, max_pages]; context_lens: int32 or int64 [S] (this step's rows not counted).
    """

    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    context_lens: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    def _check(self):
        cache = LOGIT_DTYPES + (torch.float8_e4m3fn,)
        k = self._tensor("k_cache", dtype=cache, shape=("pages", "page_size", "Hkv", "D"), last_contiguous=True)
        self._tensor("v_cache", dtype=k.dtype, shape=tuple(k.shape), device=k.device, last_contiguous=True)
        tables = self._tensor("block_tables", dtype=torch.int32, shape=("S", "max_pages"), device=k.device, last_contiguous=True)
        self._tensor("context_lens", dtype=INT_DTYPES, shape=(tables.shape[0],), device=k.device, contiguous=True)
        for field in ("k_scale", "v_scale"):
            scale = self._optional(field, dtype=_FLOAT, shape=("1 or Hkv",), device=k.device)
            if scale is not None and scale.shape[0] not in (1, k.shape[2]):
                raise ValueError(f"{self._name(field)}: expected shape [1] or [{k.shape[2]}], got {list(scale.shape)}")
        if k.dtype == torch.float8_e4m3fn and (self.k_scale is None or self.v_scale is None):
            raise ValueError(f"{self._name('k_scale')}: expected scales for an fp8 cache, got None")


@dataclasses.dataclass(frozen=True, eq=False)
class KVLayers(Checked):
    """The caches of all layers, and where they are, for `compact_kv`; made once by `KVLayers.of`.

    caches: tensors [pages, page_size, ...], keys and values of every layer, any strides but the last. table: int64 [P, 6] on their
    device, a row per cache: address, then in units of `unit` bytes the strides of a page, of a slot and of the dimension that may
    lie apart (heads), how many of those there are, and the units of one. pointers: the addresses, for the host.
    """

    caches: tuple[Tensor, ...]
    table: Tensor
    pointers: tuple[int, ...]
    unit: int

    @classmethod
    def of(cls, layers) -> KVLayers:
        """layers: per layer its (k_cache, v_cache), a `PagedKV`, or a tuple of any number of caches (MLA: one).

        Copies the addresses to the device: do it once, not in every step. The caches must stay where they are.
        """
        caches = []
        for layer in layers:
            caches += (layer.k_cache, layer.v_cache) if isinstance(layer, PagedKV) else layer
        if not caches:
            raise ValueError("layers: expected at least one layer, got none")
        rows, unit = slot_rows(caches, "layers")
        return cls(tuple(caches), torch.tensor(rows, device=caches[0].device), tuple(row[0] for row in rows), unit)

    def _check(self):
        check_int(self._name("unit"), self.unit, low=1, high=8)
        check_slotted(self.caches, self._name("caches"))
        shape = (len(self.caches), 6)
        self._tensor("table", dtype=torch.int64, shape=shape, device=self.caches[0].device, contiguous=True)


def check_slotted(caches, name: str, like: Tensor | None = None) -> None:
    """Tensors [pages, page_size, ...] of the device and page size of `like` (None: the first). Raises TypeError or ValueError."""
    for number, cache in enumerate(caches):
        like = check_tensor(f"{name}[{number}]", cache) if like is None else like
        check_tensor(f"{name}[{number}]", cache, device=like.device)
        size = like.shape[1] if like.dim() > 1 else "page_size"
        if cache.dim() < 2 or cache.shape[1] != size:
            raise ValueError(f"{name}[{number}]: expected shape [pages, {size}, ...], got {list(cache.shape)}")


def slot_rows(caches, name: str) -> tuple[list[tuple[int, ...]], int]:
    """(rows of a table as in `KVLayers`, bytes of its unit: the largest power of two up to 8 that divides everything)."""
    check_slotted(caches, name)
    rows, together = [], 8
    for number, cache in enumerate(caches):
        sizes, strides = [1], [1]  # of the dimensions behind the slot, those that lie side by side joined
        for size, stride in zip(reversed(cache.shape[2:]), reversed(cache.stride()[2:]), strict=True):
            if size == 1:
                continue
            if stride == sizes[-1] * strides[-1]:
                sizes[-1] *= size
            else:
                sizes.append(size)
                strides.append(stride)
        if len(sizes) > 2 or strides[0] != 1:
            raise ValueError(
                f"{name}[{number}]: expected a slot of contiguous parts with one stride between them, got shape "
                f"{list(cache.shape)}, strides {list(cache.stride())}"
            )
        parts, apart = (sizes[1], strides[1]) if len(sizes) > 1 else (1, 0)
        row = (cache.data_ptr(), *(n * cache.element_size() for n in (cache.stride(0), cache.stride(1), apart)), parts,
               sizes[0] * cache.element_size())  # fmt: skip
        rows.append(row)
        together = math.gcd(together, *(n for n in (*row[:4], row[5])))
    return [(row[0], *(n // together for n in row[1:4]), row[4], row[5] // together) for row in rows], together


@dataclasses.dataclass(frozen=True, eq=False)
class Acceptance(Checked):
    """What a step emits.

    tokens: int64 [R, K+1], accepted drafts, correction or bonus, then -1. num_accepted, num_emitted, num_rejected: int32
    [R]. next_token: int64 [R]. last_row: int32 [R], the forward row whose logits gave next_token. commit_mask: bool
    [N_max], rows whose keys and values stay. flags: int32 [R]. logprobs: fp32 [R, K+1] or None, of the emitted tokens, 0 beyond
    them. For trees: path, kv_source
    int32 [R, M].
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

    def _check(self):
        tokens = self._tensor("tokens", dtype=torch.int64, shape=("R", "K+1"), contiguous=True)
        requests, device = tokens.shape[0], tokens.device
        for field in ("num_accepted", "num_emitted", "num_rejected", "last_row", "flags"):
            self._tensor(field, dtype=torch.int32, shape=(requests,), device=device, contiguous=True)
        self._tensor("next_token", dtype=torch.int64, shape=(requests,), device=device, contiguous=True)
        self._tensor("commit_mask", dtype=torch.bool, shape=("N_max",), device=device, contiguous=True)
        self._optional("logprobs", dtype=_FLOAT, shape=tuple(tokens.shape), device=device, contiguous=True)
        for field in ("path", "kv_source"):
            self._optional(field, dtype=torch.int32, shape=(requests, "M"), device=device, contiguous=True)


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionPlan(Checked):
    """The work table of `tree_attention`, made by `plan_attention` once per step and read by all layers.

    items: int32 [max_items, 10], one row per part of work: state slot (-1 = a padding request), context length, first
    forward row of the request, its rows, query tile, part of the keys, number of parts, first context key, end of the context
    keys, first row of partial results. counts: int32 [3], items in use, first forward row in use, end of those in use. The rest is
    what the table was made for, and what a launch that reads it must be compiled with.
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

    def _check(self):
        items = self._tensor("items", dtype=torch.int32, shape=("max_items", 10), contiguous=True)
        self._tensor("counts", dtype=torch.int32, shape=(3,), device=items.device, contiguous=True)
        for field in ("query_heads", "kv_heads", "head_dim", "element_size", "block_m", "block_n", "programs"):
            check_int(self._name(field), getattr(self, field), low=1)
        for field in ("partial_rows", "rows", "requests", "slots", "max_keys"):
            check_int(self._name(field), getattr(self, field), low=0)
