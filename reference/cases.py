"""Inputs of each op, made from a seed: one specification of shapes, dtypes and edge values for tests and benchmarks.

Symbols: R requests, S state slots, K drafts, V vocabulary, r rank, H hidden size. A case with state slots has S = R + 3 slots in
shuffled order; everything that lives by slot is made [S, ...] and slots outside the batch hold values that would be noticed.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dspark_kernels.types import (
    ConfidenceHead,
    DenseProposal,
    DraftBlock,
    GatedMarkovHead,
    MarkovHead,
    OneHotProposal,
    PagedKV,
    Penalties,
    RnnMarkovHead,
    SamplingTensors,
    SparseProposal,
    VerifyLayout,
)

from . import layout as layouts
from .sources import PhiloxSource

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TEMPERATURES = (0.0, 0.3, 1.0, 1.7)


@dataclasses.dataclass
class DraftCase:
    """Arguments of `draft_block`: call it with **case.arguments()."""

    base_logits: Tensor
    anchors: Tensor
    anchor_positions: Tensor
    head: MarkovHead | None
    hidden: Tensor | None
    confidence: ConfidenceHead | None
    sampling: SamplingTensors | None
    state_indices: Tensor | None
    first_draft: int = 0
    noise: str = "draft"
    draft_to_target: Tensor | None = None
    vocab_size: int | None = None
    head_state: Tensor | None = None

    def arguments(self) -> dict:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclasses.dataclass
class AcceptCase:
    """Arguments of `accept_chain`: call it with **case.arguments()."""

    target_logits: Tensor
    layout: VerifyLayout
    proposal: OneHotProposal | DenseProposal | SparseProposal | None
    sampling: SamplingTensors | None
    state_indices: Tensor | None
    rule: str = "token"
    logprobs: str | None = None
    synthetic_rates: Tensor | None = None

    def arguments(self) -> dict:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclasses.dataclass
class AttentionCase:
    """Arguments of `tree_attention`: call it with **case.arguments()."""

    q: Tensor
    kv: PagedKV
    layout: VerifyLayout
    mask: str
    ancestors: Tensor | None
    k_new: Tensor | None
    v_new: Tensor | None
    scale: float | None
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    state_indices: Tensor | None

    def arguments(self) -> dict:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(g, *shape, scale=1.0, dtype=torch.float32, grid=None) -> Tensor:
    """Normal values in `dtype`; with `grid`, multiples of it (a dyadic grid makes sums exact and ties frequent)."""
    x = torch.randn(*shape, generator=g) * scale
    if grid is not None:
        x = (x / grid).round() * grid
    return x.to(dtype)


ADJUSTMENTS = ("bias", "mask", "repetition", "presence", "frequency")
FILTERS = ("top_k", "top_p", "min_p")


def sampling_tensors(
    seed: int,
    slots: int,
    temperatures=TEMPERATURES,
    *,
    vocab: int = 0,
    mask_rows: int | tuple = 0,
    adjust=(),
    filters=(),
    listed: int = 6,
    filter_order: str = "top_k_first",
    bias_dtype: torch.dtype = torch.float32,
    grid: float | None = None,
) -> SamplingTensors:
    """Mixed temperatures (greedy rows among sampled ones) and 63-bit seeds; `adjust` of ADJUSTMENTS, `filters` of FILTERS.

    mask_rows: leading shape of the bit mask. listed: entries of the penalties' lists, some unused. Every filter is off in some
    slots, and what is beyond a mask's last id is garbage.
    """
    g = _generator(seed)
    choice = torch.randint(0, len(temperatures), (slots,), generator=g)
    tensors = dict(
        temperature=torch.tensor(temperatures, dtype=torch.float32)[choice],
        seed=torch.randint(-(2**63), 2**63 - 1, (slots,), generator=g),
    )
    pick = lambda values, dtype: torch.tensor(values, dtype=dtype)[torch.randint(0, len(values), (slots,), generator=g)]  # noqa: E731
    if "top_k" in filters:
        tensors["top_k"] = pick([0, 1, 2, 5, max(1, vocab // 3), vocab], torch.int32)
    if "top_p" in filters:
        tensors["top_p"] = pick([1.0, 0.1, 0.5, 0.9, 0.95], torch.float32)
    if "min_p" in filters:
        tensors["min_p"] = pick([0.0, 0.01, 0.2], torch.float32)
    if "bias" in adjust:
        tensors["logit_bias"] = _normal(g, slots, vocab, dtype=bias_dtype, grid=grid)
    if "mask" in adjust:
        rows = mask_rows if isinstance(mask_rows, tuple) else (mask_rows,)
        words = torch.randint(-(2**31), 2**31, (*rows, -(-vocab // 32)), generator=g)
        tensors["token_bitmask"] = (words | torch.randint(-(2**31), 2**31, words.shape, generator=g)).to(torch.int32)
    if set(adjust) & {"repetition", "presence", "frequency"}:
        order = torch.rand(slots, max(vocab, listed), generator=g).argsort(1)[:, :listed]
        unused = (torch.rand(order.shape, generator=g) < 0.2) | (order >= vocab)
        strengths = {"repetition": [1.0, 1.25, 0.8], "presence": [0.0, 0.5, -0.25], "frequency": [0.0, 0.25, -0.5]}
        tensors["penalties"] = Penalties(
            token_ids=torch.where(unused, -1, order),
            counts=torch.randint(0, 4, order.shape, generator=g).to(torch.int32),
            **{name: pick(values, torch.float32) for name, values in strengths.items() if name in adjust},
        )
    return SamplingTensors(**tensors, filter_order=filter_order)


def slot_map(seed: int, requests: int, padding: int = 0) -> Tensor:
    """int32 [R]: distinct slots of R + 3 in shuffled order, the last `padding` rows -1."""
    slots = torch.randperm(requests + 3, generator=_generator(seed))[:requests].to(torch.int32)
    if padding:
        slots[requests - padding :] = -1
    return slots


def draft_case(
    seed: int = 0,
    requests: int = 3,
    drafts: int = 4,
    vocab: int = 300,
    rank: int = 16,
    hidden_size: int = 24,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    sampled: bool = True,
    confidence: str | None = "markov",
    scattered: bool = False,
    padding: int = 0,
    grid: float | None = None,
    extra_columns: int = 0,
    position_dtype: torch.dtype = torch.int64,
    first_draft: int = 0,
    noise: str = "draft",
    temperatures: tuple[float, ...] = TEMPERATURES,
    kind: str = "vanilla",
    w2_dtype: torch.dtype | None = None,
    target_vocab: int | None = None,
    padded: bool = False,
    adjust=(),
    filters=(),
    filter_order: str = "top_k_first",
) -> DraftCase:
    """rank 0 = no head. confidence None, "plain" (hidden only) or "markov". extra_columns: rows of logits wider than V.

    kind "vanilla", "gated" or "rnn". w2_dtype: W2's alone, also int8 and e4m3 (with scales). target_vocab: V ids are a part of so
    many, in no order, one in nine of them stands for no token. padded: extra_columns, and rows of W2, are part of the tensors and
    hold what would win (`vocab_size` leaves them out). adjust, filters, filter_order: as in sampling_tensors.
    """
    g = _generator(seed)
    weight_dtype = weight_dtype or dtype
    slots = requests + 3 if scattered else requests
    logits = _normal(g, requests, drafts, vocab + extra_columns, scale=2.0, dtype=dtype, grid=grid)
    logits[..., vocab:] = 100.0
    head = None
    targets = vocab if target_vocab is None else target_vocab
    if rank:
        w1 = _normal(g, targets, rank, dtype=weight_dtype, grid=grid)
        w2 = _normal(g, vocab, rank, scale=rank**-0.5 if grid is None else 1.0, grid=grid)
        if padded:
            w2 = torch.cat([w2, torch.full((3, rank), float("nan"))])
        head = _head(g, kind, w1, w2, w2_dtype or weight_dtype, hidden_size, weight_dtype)
    hidden = confidence_head = None
    if confidence is not None or kind != "vanilla":
        hidden = _normal(g, requests, drafts, hidden_size, dtype=dtype)
    if confidence is not None:
        width = hidden_size + (rank if confidence == "markov" and rank else 0)
        confidence_head = ConfidenceHead(
            weight=_normal(g, width, scale=width**-0.5, dtype=weight_dtype),
            bias=_normal(g, 1, dtype=weight_dtype) if seed % 2 == 0 else None,
            sts_temperatures=torch.rand(first_draft + drafts, generator=g) + 0.5 if seed % 3 == 0 else None,
        )
    anchors = torch.randint(0, targets, (slots,), generator=g)
    ids = head_state = None
    if target_vocab is not None:
        ids = torch.randperm(target_vocab, generator=g)[:vocab]
        ids[torch.rand(vocab, generator=g) < 1 / 9] = -1
    if kind == "rnn":
        head_state = _normal(g, slots, rank, scale=0.5)
    return DraftCase(
        base_logits=logits if padded else logits[..., :vocab],
        anchors=anchors,
        anchor_positions=torch.randint(0, 100000, (slots,), generator=g).to(position_dtype),
        head=head,
        hidden=hidden,
        confidence=confidence_head,
        sampling=sampling_tensors(
            seed + 1,
            slots,
            temperatures,
            vocab=targets,
            mask_rows=(slots, drafts),
            adjust=adjust,
            filters=filters,
            filter_order=filter_order,
            grid=grid,
        )
        if sampled
        else None,
        state_indices=slot_map(seed + 2, requests, padding) if scattered else None,
        first_draft=first_draft,
        noise=noise,
        draft_to_target=ids,
        vocab_size=vocab if padded else None,
        head_state=head_state,
    )


def _head(g, kind, w1, w2, w2_dtype, hidden_size, dtype) -> MarkovHead:
    """w2: fp32; stored as w2_dtype, by rows with a scale where that is int8 or e4m3."""
    rank, scale = w1.shape[1], None
    if w2_dtype in (torch.int8, torch.float8_e4m3fn):
        scale = w2.abs().amax(1).clamp(min=1e-6) / (127.0 if w2_dtype == torch.int8 else 448.0)
        w2 = w2 / scale[:, None]
        w2 = w2.nan_to_num(127.0).round() if w2_dtype == torch.int8 else w2
    w2 = w2.to(w2_dtype)
    inputs = rank + hidden_size
    if kind == "gated":
        weight = _normal(g, rank, inputs, scale=inputs**-0.5, dtype=dtype)
        return GatedMarkovHead(w1, w2, scale, gate_weight=weight, gate_bias=_normal(g, rank, dtype=dtype))
    if kind == "rnn":
        weight = _normal(g, 3 * rank, inputs + rank, scale=inputs**-0.5, dtype=dtype)
        return RnnMarkovHead(w1, w2, scale, joint_weight=weight, joint_bias=_normal(g, 3 * rank, dtype=dtype))
    return MarkovHead(w1, w2, scale)


def accept_case(
    seed: int = 0,
    requests: int = 5,
    drafts: int = 4,
    vocab: int = 1500,
    dtype: torch.dtype = torch.bfloat16,
    proposal: str = "dense",
    sampled: bool = True,
    scattered: bool = False,
    padding: int = 0,
    closeness: float = 0.7,
    sharpness: float = 3.0,
    grid: float | None = None,
    draft_vocab: int | None = None,
    draft_temperature: bool = False,
    lengths: Tensor | None = None,
    exact_rows: bool = False,
    temperatures: tuple[float, ...] = TEMPERATURES,
    rule: str = "token",
    candidates: int = 5,
    odd_lists: bool = False,
    logprobs: str | None = None,
    forced: bool = False,
    mapped: bool = False,
    adjust=(),
    filters=(),
    filter_order: str = "top_k_first",
) -> AcceptCase:
    """proposal "dense", "sparse", "one_hot" or "none". closeness: how much of a draft row is the target's.

    mapped: columns of a dense proposal are ids in shuffled order, some of them outside the vocabulary. candidates of a sparse one;
    odd_lists: in any order, with entries of one id and of none. adjust, filters: see `sampling_tensors`. forced: random rates of
    acceptance. exact_rows: as many rows of target logits as the layout uses, instead of one per allocated row (garbage there).
    """
    g = _generator(seed)
    slots = requests + 3 if scattered else requests
    width = draft_vocab or vocab
    state_indices = slot_map(seed + 2, requests, padding) if scattered else None
    slot_of = torch.arange(requests) if state_indices is None else state_indices.long()
    rows = requests * (drafts + 1)
    sampling = sampling_tensors(
        seed + 1, slots, temperatures, vocab=vocab, mask_rows=rows, adjust=adjust, filters=filters, filter_order=filter_order
    )
    target = _normal(g, requests, drafts + 1, vocab, scale=sharpness, grid=grid)
    common = torch.full((requests, drafts, width), -sharpness)
    common[..., : min(vocab, width)] = target[:, :drafts, : min(vocab, width)]
    ids = torch.arange(width)
    if mapped:
        ids = torch.randperm(max(vocab, width), generator=g)[:width]
        common = torch.where(ids < vocab, target[:, :drafts, ids.clamp(max=vocab - 1)], -sharpness)
    noise = _normal(g, requests, drafts, width, scale=sharpness)
    near = closeness * common + (1 - closeness) * noise
    if grid is not None:
        near = (near / grid).round() * grid
    draft_logits = torch.full((slots, drafts, width), float("nan"), dtype=dtype)
    tokens = torch.full((slots, drafts), -1, dtype=torch.int64)
    listed_ids = torch.full((slots, drafts, candidates), 2**40)
    listed_logits = torch.full((slots, drafts, candidates), float("nan"), dtype=dtype)
    draft_temperatures = sampling.temperature.clone()
    if draft_temperature:
        draft_temperatures = torch.tensor(TEMPERATURES)[torch.randint(0, len(TEMPERATURES), (slots,), generator=g)]
    for r in range(requests):
        slot = int(slot_of[r])
        if slot < 0:
            continue
        draft_logits[slot] = near[r].to(dtype)
        law = draft_logits[slot].double()
        if proposal == "sparse":
            listed_ids[slot], listed_logits[slot] = _lists(g, draft_logits[slot], candidates, odd_lists)
            law = listed_logits[slot].double()
        if float(draft_temperatures[slot]) > 0 and proposal in ("dense", "sparse"):
            law = torch.softmax(law / float(draft_temperatures[slot]), -1)
            tokens[slot] = torch.multinomial(law, 1, generator=g)[:, 0]
        else:
            tokens[slot] = law.argmax(-1)
        if mapped:
            tokens[slot] = ids[tokens[slot]]
        if proposal == "sparse":
            tokens[slot] = listed_ids[slot].gather(1, tokens[slot][:, None])[:, 0]
    if lengths is None:
        lengths = torch.randint(0, drafts + 1, (requests,), generator=g)
        lengths[0] = drafts
    block = DraftBlock(tokens, OneHotProposal(), torch.zeros(requests, dtype=torch.int32))
    layout = layouts.fixed_layout(
        block,
        lengths.to(torch.int32),
        anchors=torch.randint(0, vocab, (slots,), generator=g),
        anchor_positions=torch.randint(0, 100000, (slots,), generator=g),
        state_indices=state_indices,
    )
    rows = int(layout.cu_num_logits[-1]) if exact_rows else layout.logits_indices.shape[0]
    if sampling.token_bitmask is not None:
        sampling = dataclasses.replace(sampling, token_bitmask=sampling.token_bitmask[:rows])
    logits = torch.full((rows, vocab), float("nan"), dtype=dtype)
    for r in range(requests):
        first, last = layout.cu_num_logits[r : r + 2].tolist()
        logits[first:last] = target[r, : last - first].to(dtype)
    if rule == "coupled":
        _couple(g, closeness, layout, target.to(dtype), sampling, slot_of)
    laws = {
        "none": None,
        "one_hot": OneHotProposal(),
        "dense": DenseProposal(
            draft_logits,
            temperature=draft_temperatures if draft_temperature else None,
            draft_to_target=torch.where(ids < vocab, ids, -1) if mapped else None,
        ),
        "sparse": SparseProposal(listed_ids, listed_logits, temperature=draft_temperatures if draft_temperature else None),
    }
    return AcceptCase(
        logits,
        layout,
        laws[proposal],
        sampling if sampled else None,
        state_indices,
        rule,
        logprobs,
        torch.rand(drafts, generator=g) if forced else None,
    )


def _couple(g, closeness: float, layout: VerifyLayout, target: Tensor, sampling: SamplingTensors, slot_of: Tensor) -> None:
    """Give most drafts the token that the target will choose with the noise they share."""
    for r, slot in enumerate(slot_of.tolist()):
        first, length = int(layout.query_start_loc[r]), int(layout.draft_lens[r])
        for i in range(length):
            if slot >= 0 and torch.rand((), generator=g) < closeness:
                temperature, position = float(sampling.temperature[slot]), int(layout.positions[first])
                row = target[r, i].double()
                scale = 1 / temperature if temperature > 0 else 1e30
                source = PhiloxSource(int(sampling.seed[slot]), position)
                layout.token_ids[first + i + 1] = source.coupled(position + i + 1, row * scale)


def _lists(g, logits: Tensor, candidates: int, odd: bool) -> tuple[Tensor, Tensor]:
    """(ids, logits) [K, C] of a sparse proposal: the best of dense logits [K, V]; odd: see `accept_case`."""
    drafts, vocab = logits.shape
    count = min(candidates, vocab)
    best, ids = logits.float().topk(count, -1)
    # A list longer than the vocabulary is filled up with entries that hold no mass.
    ids = torch.cat([ids, torch.full((drafts, candidates - count), -1)], 1)
    best = torch.cat([best, torch.full((drafts, candidates - count), -torch.inf)], 1)
    if odd:
        order = torch.rand(drafts, candidates, generator=g).argsort(-1)
        ids, best = ids.gather(1, order), best.gather(1, order)
        repeated = torch.rand(drafts, candidates, generator=g) < 0.3
        ids = torch.where(repeated, ids.roll(1, 1), ids)
        nowhere = torch.rand(drafts, candidates, generator=g) < 0.1
        ids = torch.where(nowhere, torch.tensor([-3, vocab, 2**40])[torch.randint(0, 3, ids.shape, generator=g)], ids)
    return ids, best.to(logits.dtype)


def random_tree(g: torch.Generator, nodes: int) -> list[int]:
    """Parents of a random tree in slot order; the root's is -1."""
    return [-1] + [int(torch.randint(max(0, node - 5), node, (), generator=g)) for node in range(1, nodes)]


def ancestor_words(parents: list[int]) -> Tensor:
    """int64 word per node: bit s = slot s is an ancestor or the node itself."""
    words = []
    for node, parent in enumerate(parents):
        words.append((words[parent] if parent >= 0 else 0) | 1 << node)
    return torch.tensor([word - (1 << 64) if word >> 63 else word for word in words], dtype=torch.int64)


def attention_layout(rows: list[int], contexts: list[int], depths: Tensor, slot_mapping: Tensor | None, max_drafts=None):
    """A VerifyLayout of these rows per request; depths [N_max] gives positions, and its length how many rows there are."""
    count = depths.shape[0]
    ints = lambda values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
    starts = [0]
    for n in rows:
        starts.append(starts[-1] + n)
    owners = [r for r, n in enumerate(rows) for _ in range(n)]
    bases = torch.tensor([contexts[r] for r in owners] + [0] * (count - len(owners)), dtype=torch.int64)
    return VerifyLayout(
        draft_lens=ints([max(n - 1, 0) for n in rows]),
        query_start_loc=ints(starts),
        cu_num_logits=ints(starts),
        token_ids=torch.zeros(count, dtype=torch.int64),
        positions=bases + depths,
        batch_indices=ints(owners + [-1] * (count - len(owners))),
        logits_indices=ints(list(range(count))),
        num_rows=ints([len(owners)]),
        flags=ints([0] * len(rows)),
        slot_mapping=slot_mapping,
        max_drafts=max_drafts,
    )


def attention_case(
    seed: int = 0,
    rows: tuple[int, ...] = (3, 0, 5),
    contexts: tuple[int, ...] = (37, 9, 70),
    query_heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 32,
    page_size: int = 4,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    mask: str = "chain",
    cached: bool = False,
    by_slot: bool = False,
    scattered: bool = False,
    padding_rows: int = 2,
    padding_requests: int = 0,
    swapped: bool = False,
    sinks: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    max_drafts: int | None = None,
    position_dtype: torch.dtype = torch.int32,
) -> AttentionCase:
    """rows, contexts per request. cached: own keys and values lie in the cache, at slot_mapping. by_slot: ancestors [S, M].

    swapped: a cache stored head before slot. padding_requests: the last requests have no slot. Whatever no row may see is
    NaN: pages of nobody, the end of a last page, padding rows; unused entries of block tables point nowhere.
    """
    g = _generator(seed)
    requests, total = len(rows), sum(rows)
    slots = requests + 3 if scattered or padding_requests else requests
    state_indices = slot_map(seed + 2, requests, padding_requests) if slots > requests else None
    slot_of = list(range(requests)) if state_indices is None else state_indices.tolist()
    count = total + padding_rows
    needed = [-(-(c + n) // page_size) for c, n in zip(contexts, rows, strict=True)]
    pages = sum(needed) + 2
    order = torch.randperm(pages, generator=g).tolist()
    tables = torch.full((slots, max(needed, default=0) + 2), 2**31 - 1, dtype=torch.int32)
    cache = [torch.full((pages, page_size, kv_heads, head_dim), float("nan")) for _ in range(2)]
    own = [torch.full((count, kv_heads, head_dim), float("nan")) for _ in range(2)]
    own_scale = [0.7, 1.5] if cache_dtype == torch.float8_e4m3fn else [1.0, 1.0]
    slot_mapping = torch.full((count,), -1, dtype=torch.int64)
    depths = torch.zeros(count, dtype=torch.int64)
    most = max(rows, default=0)
    words = torch.full((slots, min(most, 64)) if by_slot else (count,), -1, dtype=torch.int64)
    lens = torch.full((slots,), 10**6, dtype=position_dtype)
    begin = 0
    for slot, n, context, some in zip(slot_of, rows, contexts, needed, strict=True):
        table = [order.pop() for _ in range(some)]
        places = torch.tensor([table[j // page_size] * page_size + j % page_size for j in range(context + n)], dtype=torch.int64)
        for side in range(2):
            values = _normal(g, context + n, kv_heads, head_dim)
            cache[side].view(-1, kv_heads, head_dim)[places[: context + n if cached else context]] = (
                values if cached else values[:context]
            )
            own[side][begin : begin + n] = values[context:]
        slot_mapping[begin : begin + n] = places[context:]
        depths[begin : begin + n] = torch.arange(n)
        if mask == "tree" and n:
            tree = ancestor_words(random_tree(g, n)) if n <= 64 else torch.zeros(n, dtype=torch.int64)
            if n <= 64:
                depths[begin : begin + n] = torch.tensor([bin(word & (1 << 64) - 1).count("1") - 1 for word in tree.tolist()])
            if not by_slot:
                words[begin : begin + n] = tree
            elif slot >= 0:
                words[slot, : min(n, 64)] = tree[:64]
        if slot >= 0:
            tables[slot, :some] = torch.tensor(table, dtype=torch.int32)
            lens[slot] = context
        begin += n
    stored = [(c / s).to(cache_dtype or dtype) for c, s in zip(cache, own_scale, strict=True)]
    if swapped:
        stored = [c.transpose(1, 2).contiguous().transpose(1, 2) for c in stored]
    scales = {}
    if cache_dtype == torch.float8_e4m3fn:
        scales = dict(k_scale=torch.tensor([own_scale[0]]), v_scale=torch.full((kv_heads,), own_scale[1]))
    q = torch.full((count, query_heads, head_dim), float("nan"), dtype=dtype)
    q[:total] = _normal(g, total, query_heads, head_dim, scale=1.5, dtype=dtype)
    return AttentionCase(
        q=q,
        kv=PagedKV(*stored, tables, lens, **scales),
        layout=attention_layout(list(rows), list(contexts), depths, slot_mapping if cached else None, max_drafts),
        mask=mask,
        ancestors=words if mask == "tree" else None,
        k_new=None if cached else own[0].to(dtype),
        v_new=None if cached else own[1].to(dtype),
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=_normal(g, query_heads) if sinks else None,
        state_indices=state_indices,
    )
