"""What bench.compile compiles: one call of a public op for each constant and optional argument that makes another binary.

Sizes are those of Qwen3-4B with its published drafter. Where two arguments meet only in ways that their own cases show, one case
stands for both: compiling takes seconds to a minute for each of eight architectures.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch

import dspark_kernels as dk
from dspark_kernels.ops import attention
from dspark_kernels.ops.accept import shards as accept_shards
from dspark_kernels.ops.draft import candidate_shards, shards as draft_shards

VOCAB, DRAFTS, RANK, HIDDEN = 151936, 7, 256, 2560  # Qwen3-4B with its published drafter


def _empty(*shape, dtype=torch.bfloat16):
    # Never touched, so the memory of full-size tensors is never really taken.
    return torch.empty(*shape, dtype=dtype)


def _ints(*shape, dtype=torch.int64):
    return torch.zeros(*shape, dtype=dtype)


def _sampling(slots):
    return dk.SamplingTensors(torch.ones(slots), _ints(slots))


def _head(kind, vocab, targets, rank, dtype, w2_dtype):
    tables = _empty(targets, rank, dtype=dtype), _empty(vocab, rank, dtype=w2_dtype or dtype)
    scale = _empty(vocab, dtype=torch.float32) if w2_dtype in (torch.int8, torch.float8_e4m3fn) else None
    if kind == "gated":
        mixing = dict(gate_weight=_empty(rank, HIDDEN + rank, dtype=dtype), gate_bias=_empty(rank, dtype=dtype))
        return dk.GatedMarkovHead(*tables, scale, **mixing)
    if kind == "rnn":
        mixing = dict(joint_weight=_empty(3 * rank, 2 * rank + HIDDEN, dtype=dtype), joint_bias=_empty(3 * rank, dtype=dtype))
        return dk.RnnMarkovHead(*tables, scale, **mixing)
    return dk.MarkovHead(*tables, scale)


def _settings(slots, mask_rows, vocab, adjusted, filtered):
    """Temperatures and seeds; bias, bit mask [*mask_rows, words] and all penalties; all filters."""
    number = functools.partial(torch.ones, slots)
    found = {}
    if adjusted:
        lists = _ints(slots, 256), _ints(slots, 256, dtype=torch.int32)
        found |= dict(
            logit_bias=_empty(slots, vocab, dtype=torch.float32),
            token_bitmask=_ints(*mask_rows, -(-vocab // 32), dtype=torch.int32),
            penalties=dk.Penalties(*lists, number(), number(), number()),
        )
    if filtered:
        found |= dict(top_k=_ints(slots, dtype=torch.int32), top_p=number(), min_p=number())
    return dataclasses.replace(_sampling(slots), **found)


def draft_call(requests, *, drafts=DRAFTS, vocab=VOCAB, rank=RANK, dtype=torch.bfloat16, sampled=True, confidence=True,
           slots=None, kind="vanilla", w2_dtype=None, targets=None, adjusted=False, filtered=False, **options):  # fmt: skip
    size = requests if slots is None else slots
    head = _head(kind, vocab, targets or vocab, rank, dtype, w2_dtype) if rank else None
    ids = None if targets is None else _ints(vocab)
    confidence_head = None
    if confidence:
        sts = torch.ones(drafts)
        confidence_head = dk.ConfidenceHead(_empty(HIDDEN + rank, dtype=dtype), _empty(1, dtype=dtype), sts)
    lse = _empty(size, drafts, dtype=torch.float32)
    proposal = dk.DenseProposal(_empty(size, drafts, vocab, dtype=dtype), lse=lse, draft_to_target=ids)
    scores = [_empty(size, drafts, dtype=torch.float32) if confidence else None for _ in range(2)]
    dk.draft_block(
        _empty(requests, drafts, vocab, dtype=dtype),
        _ints(size),
        head,
        anchor_positions=_ints(size),
        sampling=_settings(size, (size, drafts), targets or vocab, adjusted, filtered) if sampled else None,
        hidden=_empty(requests, drafts, HIDDEN, dtype=dtype) if confidence or kind != "vanilla" else None,
        confidence=confidence_head,
        draft_to_target=ids,
        head_state=_empty(size, rank, dtype=torch.float32) if kind == "rnn" else None,
        state_indices=None if slots is None else torch.arange(requests, dtype=torch.int32),
        out=dk.DraftBlock(
            _ints(size, drafts),
            proposal if sampled else dk.OneHotProposal(),
            _ints(requests, dtype=torch.int32),
            *scores,
        ),
        workspace=dk.Workspace(requests, drafts, vocab, "cpu", markov_rank=rank),
        **options,
    )


def _candidates(requests, candidates=64, *, kind="vanilla", drafts=DRAFTS, vocab=VOCAB, rank=RANK, dtype=torch.bfloat16,
                w2_dtype=None, sampled=True, confidence=True, slots=None, listed=0, mapped=False, adjusted=False, filtered=False,
                **options):  # fmt: skip
    size, width = requests if slots is None else slots, candidates + listed
    head = _head(kind, vocab, vocab, rank, dtype, w2_dtype) if rank else None
    confidence_head = None
    if confidence:
        confidence_head = dk.ConfidenceHead(_empty(HIDDEN + rank, dtype=dtype), _empty(1, dtype=dtype), torch.ones(drafts))
    logits = _empty(size, drafts, width, dtype=dtype)
    proposal = dk.SparseProposal(_ints(size, drafts, width), logits, lse=_empty(size, drafts, dtype=torch.float32))
    scores = [_empty(size, drafts, dtype=torch.float32) if confidence else None for _ in range(2)]
    dk.draft_block(
        _empty(requests, drafts, vocab, dtype=dtype),
        _ints(size),
        head,
        anchor_positions=_ints(size),
        sampling=_settings(size, (size, drafts), vocab, adjusted, filtered) if sampled else None,
        hidden=_empty(requests, drafts, HIDDEN, dtype=dtype) if confidence or kind != "vanilla" else None,
        confidence=confidence_head,
        candidates=candidates,
        bigrams=_ints(vocab, listed, dtype=torch.int32) if listed else None,
        draft_to_target=_ints(vocab) if mapped else None,
        head_state=_empty(size, rank, dtype=torch.float32) if kind == "rnn" else None,
        state_indices=None if slots is None else torch.arange(requests, dtype=torch.int32),
        out=dk.DraftBlock(
            _ints(size, drafts),
            proposal if sampled else dk.OneHotProposal(),
            _ints(requests, dtype=torch.int32),
            *scores,
        ),
        workspace=dk.Workspace(requests, drafts, vocab, "cpu", markov_rank=rank),
        **options,
    )


def layout_call(requests, *, drafts=DRAFTS, prefill=False, paged=False, slots=None):
    size = requests if slots is None else slots
    block = dk.DraftBlock(_ints(size, drafts), dk.OneHotProposal(), _ints(requests, dtype=torch.int32))
    return dk.fixed_layout(
        block,
        _ints(requests, dtype=torch.int32),
        anchors=_ints(size),
        anchor_positions=_ints(size),
        max_rows=requests * (drafts + 1) if prefill else None,
        num_prefill_tokens=_ints(requests, dtype=torch.int32) if prefill else None,
        emits=torch.ones(requests, dtype=torch.bool) if prefill else None,
        block_tables=_ints(size, 2048, dtype=torch.int32) if paged else None,
        page_size=16 if paged else None,
        state_indices=None if slots is None else torch.arange(requests, dtype=torch.int32),
    )


def _tree_layout(requests, *, nodes=32, paged=False):
    int32 = functools.partial(_ints, dtype=torch.int32)
    links = [int32(requests, nodes) for _ in range(4)]
    tree = dk.DraftTree(
        _ints(requests, nodes), *links, _ints(requests, nodes), int32(requests), dk.OneHotProposal(), "one_hot", int32(requests)
    )
    pages = dict(block_tables=int32(requests, 2048), page_size=16) if paged else {}
    return dk.tree_layout(tree, anchor_positions=_ints(requests), **pages)


def _draft_layout(requests, *, anchor_first=True, paged=False):
    pages = dict(block_tables=_ints(requests, 2048, dtype=torch.int32), page_size=16) if paged else {}
    return dk.draft_layout(
        _ints(requests), _ints(requests), block_size=DRAFTS, mask_token_id=151643, anchor_first=anchor_first, **pages
    )


def schedule_call(requests, *, drafts=DRAFTS, policy="causal", stale=False, paged=True, drafting=True, slots=None, **options):
    size = requests if slots is None else slots
    int32 = functools.partial(_ints, dtype=torch.int32)
    block = dk.DraftBlock(_ints(size, drafts), dk.OneHotProposal(), int32(requests), torch.ones(size, drafts))
    cost = dk.CostTable(torch.ones(4097), torch.ones(1025) if drafting else None)
    pages = dict(block_tables=int32(size, 2048), page_size=16) if paged else {}
    return dk.schedule_prefixes(
        block,
        None if policy == "budget" and not stale else cost,
        anchors=_ints(size),
        anchor_positions=_ints(size),
        policy=policy,
        budget=int32(1) if policy == "budget" and not stale else None,
        stale_confidence=torch.ones(size, drafts) if stale else None,
        state_indices=None if slots is None else torch.arange(requests, dtype=torch.int32),
        workspace=dk.Workspace(requests, drafts, VOCAB, "cpu"),
        **pages,
        **options,
    )


def _rows(requests, drafts):
    """The layout of a full batch, made without a launch."""
    rows = requests * (drafts + 1)
    int32 = functools.partial(_ints, dtype=torch.int32)
    return dk.VerifyLayout(
        draft_lens=int32(requests),
        query_start_loc=int32(requests + 1),
        cu_num_logits=int32(requests + 1),
        token_ids=_ints(rows),
        positions=_ints(rows),
        batch_indices=int32(rows),
        logits_indices=int32(rows),
        num_rows=int32(1),
        flags=int32(requests),
        max_drafts=drafts,
    )


def accept_call(requests, *, drafts=DRAFTS, vocab=VOCAB, dtype=torch.bfloat16, proposal="lse", sampled=True, slots=None,
                candidates=64, forced=False, filters=False, adjust=False, **options):  # fmt: skip
    """proposal "lse" or "no lse" (dense), "mapped", "sparse" or "one_hot"."""
    size = requests if slots is None else slots
    law = None
    if proposal == "sparse":
        law = dk.SparseProposal(_ints(size, drafts, candidates), _empty(size, drafts, candidates, dtype=dtype))
    elif proposal != "one_hot":
        width = 32000 if proposal == "mapped" else vocab
        lse = None if proposal == "no lse" else _empty(size, drafts, dtype=torch.float32)
        law = dk.DenseProposal(
            _empty(size, drafts, width, dtype=dtype), lse, draft_to_target=_ints(width) if proposal == "mapped" else None
        )
    sampling = _settings(size, (requests * (drafts + 1),), vocab, adjust, filters) if sampled else None
    dk.accept_chain(
        _empty(requests * (drafts + 1), vocab, dtype=dtype),
        _rows(requests, drafts),
        law,
        sampling=sampling,
        anchors=_ints(size),
        anchor_positions=_ints(size),
        synthetic_rates=torch.ones(drafts) if forced else None,
        state_indices=None if slots is None else torch.arange(requests, dtype=torch.int32),
        workspace=dk.Workspace(requests, drafts, vocab, "cpu"),
        **options,
    )


def _cut(shards):
    """The first of `shards` equal shards of the vocabulary."""
    return dict(vocab_start=0, vocab_shards=shards, vocab_size=VOCAB)


def _draft_shard(requests, candidates=None, *, shards=8, dtype=torch.bfloat16, rank=RANK, sampled=True, lse=True, confidence=True,
                 finish=False, w2_dtype=None, kind="vanilla", whole=True, mapped=False, adjusted=False, filtered=False,
                 **options):  # fmt: skip
    """A rank's part of the second position of a block, or with `candidates` of a whole block; or the finish from all parts.

    whole: of candidates, every rank has all of W2."""
    width = -(-VOCAB // shards)
    head = _head(kind, VOCAB if candidates and whole else width, VOCAB, rank, dtype, w2_dtype) if rank else None
    ids = _ints(width) if mapped else None
    proposal = dk.OneHotProposal()
    if sampled:
        scores = _empty(requests, DRAFTS, dtype=torch.float32) if lse else None
        logits = _empty(requests, DRAFTS, candidates or width, dtype=dtype)
        if candidates:
            proposal = dk.SparseProposal(_ints(requests, DRAFTS, candidates), logits, lse=scores)
        else:
            proposal = dk.DenseProposal(logits, lse=scores, draft_to_target=ids)
    scores = [_empty(requests, DRAFTS, dtype=torch.float32) if confidence else None for _ in range(2)]
    block = dk.DraftBlock(_ints(requests, DRAFTS), proposal, _ints(requests, dtype=torch.int32), *scores)
    scorer = dk.ConfidenceHead(_empty(HIDDEN + rank, dtype=dtype), _empty(1, dtype=dtype), torch.ones(DRAFTS))
    base = _empty(requests, DRAFTS, width, dtype=dtype)
    common = dict(
        sampling=_settings(requests, (requests, DRAFTS), VOCAB, adjusted, filtered) if sampled else None,
        hidden=_empty(requests, DRAFTS, HIDDEN, dtype=dtype) if confidence or kind != "vanilla" else None,
        confidence=scorer if confidence else None,
        **(dict(candidates=candidates, draft_to_target=ids) if candidates else dict(position=1)),
        **_cut(shards),
    )
    of_all = dict(anchor_positions=_ints(requests), workspace=dk.Workspace(requests, DRAFTS, VOCAB, "cpu", markov_rank=rank))
    if kind == "rnn":
        of_all["head_state"] = _empty(requests, rank, dtype=torch.float32)
    if not finish:
        of_all |= dict(draft_to_target=ids)
        return dk.draft_block_partial(base, _ints(requests), head, block=block, **(common | of_all), **options)
    if not candidates:
        gathered = _ints(shards, draft_shards.part_words(requests, width, sampled and lse))
        return dk.draft_block_finish(gathered, block, _ints(requests), head, **common)
    gathered = _ints(shards, candidate_shards.part_words(base, head, candidates=candidates, draft_to_target=ids))
    return dk.draft_block_finish(gathered, block, _ints(requests), head, base_logits=base, **common, **of_all, **options)


def _accept_shard(requests, phase, *, shards=8, dtype=torch.bfloat16, proposal="lse", sampled=True, rule="token", adjust=False):
    """A phase of acceptance on a rank, or its finish."""
    width = -(-VOCAB // shards)
    law = None
    if proposal == "sparse":
        law = dk.SparseProposal(_ints(requests, DRAFTS, 64), _empty(requests, DRAFTS, 64, dtype=dtype))
    elif proposal != "one_hot":
        lse = _empty(requests, DRAFTS, dtype=torch.float32) if proposal == "lse" else None
        law = dk.DenseProposal(_empty(requests, DRAFTS, width, dtype=dtype), lse=lse)
    sampling = _settings(requests, (requests * (DRAFTS + 1),), VOCAB, adjust, False) if sampled else None
    common = dict(sampling=sampling, rule=rule) | _cut(shards)
    logits, layout = _empty(requests * (DRAFTS + 1), width, dtype=dtype), _rows(requests, DRAFTS)
    phases = dk.accept_phases(law, sampling=common["sampling"], rule=rule)
    before = phases if phase == "finish" else phases[: phases.index(phase)]
    gathered = tuple(_ints(shards, accept_shards.part_words(logits, layout, law, phase=name, **common)) for name in before)
    if phase == "finish":
        anchors = dict(anchors=_ints(requests), anchor_positions=_ints(requests))
        return dk.accept_finish(logits, layout, law, gathered=gathered, **anchors, **common)
    workspace = dk.Workspace(requests, DRAFTS, VOCAB, "cpu")
    return dk.accept_partial(logits, layout, law, phase=phase, gathered=gathered, workspace=workspace, **common)


def attention_call(requests, *, drafts=DRAFTS, group=4, kv_heads=8, head_dim=128, page_size=16, dtype=torch.bfloat16, cache=None,
               mask="chain", cached=False, invariant=False, slots=None, sinks=False, **options):  # fmt: skip
    """The attention of a step whose plan is there already, or with `head_dim` None the plan itself."""
    size, heads = requests if slots is None else slots, kv_heads * group
    rows = requests * (drafts + 1)
    plan_only = head_dim is None
    head_dim = head_dim or 128
    fp8 = cache == torch.float8_e4m3fn
    scales = dict(k_scale=torch.ones(kv_heads), v_scale=torch.ones(kv_heads)) if fp8 else {}
    pages = [_empty(2**18 // page_size, page_size, kv_heads, head_dim, dtype=cache or dtype) for _ in range(2)]
    kv = dk.PagedKV(*pages, _ints(size, 131072 // page_size, dtype=torch.int32), _ints(size, dtype=torch.int32), **scales)
    layout = dataclasses.replace(_rows(requests, drafts), slot_mapping=_ints(rows))
    state_indices = None if slots is None else torch.arange(requests, dtype=torch.int32)
    shared = dict(window=options.get("window"), batch_invariant=invariant)
    planning = dict(shared, query_heads=heads, dtype=dtype)
    if plan_only:
        return dk.plan_attention(layout, kv, state_indices=state_indices, **planning)
    q = _empty(rows, heads, head_dim, dtype=dtype)
    own = [None if cached else _empty(rows, kv_heads, head_dim, dtype=dtype) for _ in range(2)]
    return dk.tree_attention(
        q, kv, layout, mask=mask, ancestors=_ints(rows) if mask == "tree" else None, k_new=own[0], v_new=own[1],
        sinks=_empty(heads) if sinks else None, batch_invariant=invariant, state_indices=state_indices,
        plan=attention.empty_plan(layout, kv, state_indices=state_indices, **planning), **options,
    )  # fmt: skip


def _tree(slots, nodes, proposal, drawn):
    links = [_ints(slots, nodes, dtype=torch.int32) for _ in range(4)]
    int32 = functools.partial(_ints, dtype=torch.int32)
    return dk.DraftTree(_ints(slots, nodes), *links, _ints(slots, nodes), int32(slots), proposal, drawn, int32(slots))


def _accept_tree(requests, *, nodes=32, vocab=VOCAB, dtype=torch.bfloat16, rule="walk", drawn="one_hot", proposal="dense",
                 sampled=True, slots=None, filters=False, adjust=False, logprobs=None):  # fmt: skip
    """proposal, where drawn by chance: "dense", "mapped" or "sparse" (64 candidates)."""
    size = requests if slots is None else slots
    width = 32000 if proposal == "mapped" else vocab
    law = dk.OneHotProposal()
    if drawn != "one_hot" and proposal == "sparse":
        law = dk.SparseProposal(_ints(size, nodes, 64), _empty(size, nodes, 64, dtype=dtype))
    elif drawn != "one_hot":
        law = dk.DenseProposal(_empty(size, nodes, width, dtype=dtype), draft_to_target=_ints(width) if width < vocab else None)
    dk.accept_tree(
        _empty(requests * nodes, vocab, dtype=dtype),
        _rows(requests, nodes - 1),
        _tree(size, nodes, law, drawn),
        sampling=_settings(size, (requests * nodes,), vocab, adjust, filters) if sampled else None,
        rule=rule,
        logprobs=logprobs,
        anchors=_ints(size),
        anchor_positions=_ints(size),
        state_indices=None if slots is None else torch.arange(requests, dtype=torch.int32),
        workspace=dk.Workspace(requests, nodes - 1, vocab, "cpu"),
    )


def _draft_tree(requests, method, branching, *, nodes=32, drafts=DRAFTS, vocab=VOCAB, rank=RANK, dtype=torch.bfloat16,
                kind="vanilla", w2_dtype=None, slots=None, biased=False):  # fmt: skip
    size = requests if slots is None else slots
    sampled = method in ("iid", "without_replacement")
    sampling = _sampling(size) if sampled or biased else None
    if biased:
        sampling = dataclasses.replace(sampling, logit_bias=_empty(size, vocab, dtype=torch.float32))
    law = dk.DenseProposal(_empty(size, nodes, vocab, dtype=dtype)) if sampled else dk.OneHotProposal()
    out = _tree(size, nodes, law, method if sampled else "one_hot")
    dk.draft_tree(
        _empty(requests, drafts, vocab, dtype=dtype),
        _ints(size),
        _head(kind, vocab, vocab, rank, dtype, w2_dtype) if rank else None,
        anchor_positions=_ints(size),
        method=method,
        num_nodes=nodes,
        branching=branching,
        sampling=sampling,
        hidden=None if kind == "vanilla" else _empty(requests, drafts, HIDDEN, dtype=dtype),
        state_indices=None if slots is None else torch.arange(requests, dtype=torch.int32),
        out=dataclasses.replace(out, flags=_ints(requests, dtype=torch.int32)),
        workspace=dk.Workspace(requests, nodes - 1, vocab, "cpu", markov_rank=rank),
    )


def _expand_tree(requests, method, *, nodes=32, width=8, branching=4, vocab=VOCAB, dtype=torch.bfloat16, mapped=False):
    ids, laws = _ints(vocab) if mapped else None, _empty(requests, nodes, vocab, dtype=dtype)
    law = dk.OneHotProposal() if method == "top_k" else dk.DenseProposal(laws, draft_to_target=ids)
    tree = _tree(requests, nodes, law, "one_hot" if method == "top_k" else method)
    dk.expand_tree(
        tree,
        _empty(requests, width, vocab, dtype=dtype),
        depth=1,
        branching=branching,
        anchor_positions=_ints(requests),
        method=method,
        sampling=None if method == "top_k" else _sampling(requests),
        draft_to_target=ids,
        out=tree,
        workspace=dk.Workspace(requests, nodes - 1, vocab, "cpu"),
    )


def _compact(requests, *, nodes=32, layers=36, kv_heads=8, head_dim=128, dtype=torch.bfloat16, extra=0):
    """Keys and values of all layers; extra: odd bytes per slot, so that nothing wider than a byte moves."""
    pages = [_empty(64, 16, kv_heads, head_dim, dtype=dtype) for _ in range(2)]
    int32 = functools.partial(_ints, dtype=torch.int32)
    rows = _rows(requests, nodes - 1)
    counts = [int32(requests) for _ in range(5)]
    acceptance = dk.Acceptance(
        _ints(requests, nodes), *counts[:3], _ints(requests), counts[3], torch.zeros(len(rows.token_ids), dtype=torch.bool),
        counts[4], kv_source=int32(requests, nodes),
    )  # fmt: skip
    more = [_empty(64, 16, extra, dtype=torch.uint8)] if extra else []
    layout = dataclasses.replace(rows, slot_mapping=_ints(len(rows.token_ids)))
    dk.compact_kv(dk.KVLayers.of([pages] * layers), acceptance, layout, extra=more)


# op -> case -> call.
def _draft_paths(requests, *, method="conditioned", candidates=None, kind="vanilla", nodes=32, drafts=DRAFTS, vocab=VOCAB,
                 rank=RANK, dtype=torch.bfloat16, confidence=False, budgets=False):  # fmt: skip
    scored = dk.ConfidenceHead(_empty(HIDDEN + rank, dtype=dtype), _empty(1, dtype=dtype), torch.ones(drafts))
    dk.draft_tree(
        _empty(requests, drafts, vocab, dtype=dtype),
        _ints(requests),
        _head(kind, vocab, vocab, rank, dtype, None),
        anchor_positions=_ints(requests),
        method=method,
        num_nodes=nodes,
        node_budgets=_ints(requests, dtype=torch.int32) if budgets else None,
        sampling=_sampling(requests),
        hidden=_empty(requests, drafts, HIDDEN, dtype=dtype),
        confidence=scored if confidence else None,
        candidates=candidates,
    )


CASES: dict[str, dict[str, Callable[[], object]]] = {
    "draft_block": {
        "sampled_r1": lambda: draft_call(1),
        "sampled_r2": lambda: draft_call(2),
        "sampled_r8": lambda: draft_call(8),
        "sampled_r64": lambda: draft_call(64),
        "sampled_r1_fp32": lambda: draft_call(1, dtype=torch.float32),
        "sampled_r64_fp32": lambda: draft_call(64, dtype=torch.float32),
        "coupled_r64": lambda: draft_call(64, noise="coupled"),
        "plain_r64": lambda: draft_call(64, rank=0, confidence=False),
        "greedy_r1": lambda: draft_call(1, sampled=False),
        "greedy_r64": lambda: draft_call(64, sampled=False, confidence=False),
        "gated_r1": lambda: draft_call(1, kind="gated"),
        "gated_r64": lambda: draft_call(64, kind="gated"),
        "rnn_r1": lambda: draft_call(1, kind="rnn"),
        "rnn_r64": lambda: draft_call(64, kind="rnn"),
        "rank1024_r64": lambda: draft_call(64, rank=1024),
        "int8_r64": lambda: draft_call(64, w2_dtype=torch.int8),
        "fp8_r64": lambda: draft_call(64, w2_dtype=torch.float8_e4m3fn),
        "mapped_r64_v32000": lambda: draft_call(64, vocab=32000, targets=VOCAB),
        "filtered_r64": lambda: draft_call(64, filtered=True),
        "adjusted_r8": lambda: draft_call(8, adjusted=True),
    },
    "draft_candidates": {
        "c64_r1": lambda: _candidates(1),
        "c64_r64": lambda: _candidates(64),
        "c16": lambda: _candidates(64, 16),
        "c256": lambda: _candidates(64, 256),
        "c64_fp32": lambda: _candidates(64, dtype=torch.float32),
        "c64_rank1024": lambda: _candidates(64, rank=1024),
        "c64_int8": lambda: _candidates(64, w2_dtype=torch.int8),
        "c64_rnn": lambda: _candidates(64, kind="rnn"),
        "c56_bigrams8": lambda: _candidates(64, 56, listed=8),
        "c64_coupled_map": lambda: _candidates(64, vocab=32000, mapped=True, noise="coupled"),
        "c64_greedy": lambda: _candidates(64, sampled=False),
        "c64_adjusted": lambda: _candidates(64, adjusted=True),
        "c64_filtered": lambda: _candidates(64, filtered=True),
    },
    "fixed_layout": {
        "r1": lambda: layout_call(1),
        "r64": lambda: layout_call(64),
        "r256_paged": lambda: layout_call(256, paged=True, slots=300),
        "r1024_prefill": lambda: layout_call(1024, prefill=True, paged=True, slots=1100),
    },
    "tree_layout": {
        "r8": lambda: _tree_layout(8),
        "r64_paged": lambda: _tree_layout(64, nodes=64, paged=True),
    },
    "draft_layout": {
        "r64": lambda: _draft_layout(64),
        "r256_paged": lambda: _draft_layout(256, anchor_first=False, paged=True),
    },
    "schedule_prefixes": {
        "causal_r1": lambda: schedule_call(1),
        "causal_r16": lambda: schedule_call(16),
        "causal_r64": lambda: schedule_call(64),
        "causal_r256": lambda: schedule_call(256, slots=300),
        "causal_r256_plain": lambda: schedule_call(256, drafting=False, paged=False),
        "causal_r1024_k16": lambda: schedule_call(1024, drafts=16),
        "budget_r64": lambda: schedule_call(64, policy="budget"),
        "budget_r1024_k16": lambda: schedule_call(1024, drafts=16, policy="budget"),
        "stale_r64": lambda: schedule_call(64, policy="budget", stale=True),
        "stale_r256": lambda: schedule_call(256, policy="budget", stale=True),
        "stale_r1024_k16": lambda: schedule_call(1024, drafts=16, policy="budget", stale=True),
    },
    "plan_attention": {
        "r1": lambda: attention_call(1, head_dim=None),
        "r64_slots": lambda: attention_call(64, head_dim=None, slots=80),
        "r64_window": lambda: attention_call(64, head_dim=None, window=4096),
        "r64_invariant": lambda: attention_call(64, head_dim=None, invariant=True),
        "r1024": lambda: attention_call(1024, head_dim=None),
    },
    "tree_attention": {
        "chain": lambda: attention_call(64),
        "chain_r1": lambda: attention_call(1),
        "chain_cached": lambda: attention_call(64, cached=True, slots=80),
        "decode": lambda: attention_call(64, drafts=0),
        "decode_group16": lambda: attention_call(64, drafts=0, group=16, kv_heads=2),
        "group8": lambda: attention_call(64, group=8),
        "group5_page1": lambda: attention_call(64, group=5, page_size=1),
        "page128": lambda: attention_call(64, page_size=128),
        "full": lambda: attention_call(64, mask="full"),
        "tree": lambda: attention_call(64, drafts=63, mask="tree"),
        "tree_window": lambda: attention_call(64, drafts=15, mask="tree", window=4096, cached=True),
        "gemma": lambda: attention_call(64, head_dim=256, group=2, window=1024, softcap=50.0),
        "gpt_oss": lambda: attention_call(64, head_dim=64, group=8, window=128, sinks=True),
        "d64": lambda: attention_call(64, head_dim=64),
        "d256": lambda: attention_call(64, head_dim=256, group=2),
        "d80": lambda: attention_call(64, head_dim=80),
        "fp8": lambda: attention_call(64, cache=torch.float8_e4m3fn),
        "fp8_cached": lambda: attention_call(64, cache=torch.float8_e4m3fn, cached=True),
        "fp16": lambda: attention_call(64, dtype=torch.float16),
        "fp32": lambda: attention_call(64, dtype=torch.float32),
        "fp32_d256": lambda: attention_call(64, dtype=torch.float32, head_dim=256, group=2),
        "invariant": lambda: attention_call(64, invariant=True, return_lse=True),
    },
    "accept_tree": {
        "walk": lambda: _accept_tree(64),
        "walk_filters": lambda: _accept_tree(64, filters=True),
        "traversal_adjusted": lambda: _accept_tree(64, rule="traversal", drawn="without_replacement", adjust=True),
        "recursive": lambda: _accept_tree(64, rule="recursive", drawn="iid"),
        "traversal": lambda: _accept_tree(64, rule="traversal", drawn="without_replacement"),
        "traversal_sparse": lambda: _accept_tree(64, rule="traversal", drawn="without_replacement", proposal="sparse"),
    },
    "draft_tree": {
        "best_first": lambda: _draft_paths(1, method="best_first"),
        "candidates": lambda: _draft_paths(1, candidates=64, confidence=True, budgets=True),
        "candidates_256": lambda: _draft_paths(1, candidates=256, nodes=64),
        "candidates_gated": lambda: _draft_paths(1, candidates=64, kind="gated"),
        "candidates_rnn": lambda: _draft_paths(1, candidates=64, kind="rnn", confidence=True),
        "dense": lambda: _draft_paths(1, confidence=True, budgets=True),
        "dense_64_nodes": lambda: _draft_paths(1, nodes=64),
        "dense_gated": lambda: _draft_paths(1, kind="gated"),
        "dense_rnn": lambda: _draft_paths(1, kind="rnn", confidence=True),
        "top_k": lambda: _draft_tree(64, "top_k", (4, 2, 2, 1), slots=80),
        "top_k_fp32": lambda: _draft_tree(1, "top_k", (4, 2, 2, 1), dtype=torch.float32),
        "top_k_no_head": lambda: _draft_tree(1, "top_k", (63,), rank=0, nodes=64),
        "without_replacement": lambda: _draft_tree(64, "without_replacement", (4, 2, 2, 1)),
        "iid": lambda: _draft_tree(64, "iid", (4, 2, 2, 1)),
        "iid_biased": lambda: _draft_tree(64, "iid", (4, 2), biased=True),
        "gated_int8": lambda: _draft_tree(64, "top_k", (4, 2, 2, 1), kind="gated", w2_dtype=torch.int8),
        "rnn": lambda: _draft_tree(64, "without_replacement", (4, 2, 2, 1), kind="rnn"),
    },
    "expand_tree": {
        "top_k": lambda: _expand_tree(64, "top_k"),
        "mapped": lambda: _expand_tree(64, "without_replacement", vocab=32000, mapped=True),
    },
    "compact_kv": {
        "r64": lambda: _compact(64),
        "r1_fp8": lambda: _compact(1, dtype=torch.float8_e4m3fn),
        "r64_bytes": lambda: _compact(64, layers=1, extra=7),
    },
    "accept_chain": {
        "dense": lambda: accept_call(64),
        "dense_fp32": lambda: accept_call(64, dtype=torch.float32),
        "dense_swept": lambda: accept_call(64, proposal="no lse"),
        "one_hot": lambda: accept_call(64, proposal="one_hot"),
        "greedy": lambda: accept_call(64, proposal="one_hot", sampled=False),
        "sparse": lambda: accept_call(64, proposal="sparse"),
        "dense_block": lambda: accept_call(64, rule="block"),
        "coupled": lambda: accept_call(64, rule="coupled", proposal="one_hot"),
        "mapped": lambda: accept_call(64, proposal="mapped"),
        "dense_block_filters": lambda: accept_call(64, rule="block", filters=True),
        "dense_adjust": lambda: accept_call(64, adjust=True),
    },
    "draft_block_partial": {
        "sampled_r1": lambda: _draft_shard(1),
        "sampled_r64": lambda: _draft_shard(64),
        "plain_r64": lambda: _draft_shard(64, rank=0, confidence=False),
        "greedy_r64": lambda: _draft_shard(64, sampled=False),
        "fp8_r64": lambda: _draft_shard(64, w2_dtype=torch.float8_e4m3fn),
        "gated_r1": lambda: _draft_shard(1, kind="gated"),
        "rnn_r64": lambda: _draft_shard(64, kind="rnn"),
        "mapped_r64": lambda: _draft_shard(64, mapped=True),
        "adjusted_r64": lambda: _draft_shard(64, adjusted=True),
        "rnn_adjusted_r64": lambda: _draft_shard(64, kind="rnn", adjusted=True),
    },
    "draft_block_finish": {
        "sampled_r64": lambda: _draft_shard(64, finish=True),
        "greedy_r64": lambda: _draft_shard(64, sampled=False, confidence=False, finish=True),
    },
    "draft_candidates_partial": {
        "c64_r1_rows": lambda: _draft_shard(1, 64, whole=False),
        "c64_r64": lambda: _draft_shard(64, 64),
        "c256": lambda: _draft_shard(64, 256),
        "c64_fp8_rows": lambda: _draft_shard(64, 64, whole=False, w2_dtype=torch.float8_e4m3fn),
        "c64_adjusted_map": lambda: _draft_shard(64, 64, adjusted=True, mapped=True),
    },
    "draft_candidates_finish": {
        "c64_r1_rows": lambda: _draft_shard(1, 64, whole=False, finish=True),
        "c64_r64": lambda: _draft_shard(64, 64, finish=True),
        "c256": lambda: _draft_shard(64, 256, finish=True),
        "c64_fp8_rows": lambda: _draft_shard(64, 64, whole=False, w2_dtype=torch.float8_e4m3fn, finish=True),
        "c64_rnn": lambda: _draft_shard(64, 64, kind="rnn", finish=True),
        "c64_greedy": lambda: _draft_shard(64, 64, sampled=False, finish=True),
        "c64_adjusted_map": lambda: _draft_shard(64, 64, adjusted=True, mapped=True, finish=True),
        "c64_filtered_coupled": lambda: _draft_shard(64, 64, filtered=True, noise="coupled", finish=True),
    },
    "accept_partial": {
        "normalise_dense": lambda: _accept_shard(64, "normalise"),
        "normalise_one_hot": lambda: _accept_shard(64, "normalise", proposal="one_hot"),
        "normalise_sparse": lambda: _accept_shard(64, "normalise", proposal="sparse"),
        "normalise_adjust": lambda: _accept_shard(64, "normalise", proposal="sparse", adjust=True),
        "residual": lambda: _accept_shard(64, "residual"),
        "residual_adjust": lambda: _accept_shard(64, "residual", adjust=True),
        "draw_dense": lambda: _accept_shard(64, "draw"),
        "draw_sparse": lambda: _accept_shard(64, "draw", proposal="sparse"),
        "draw_sparse_block": lambda: _accept_shard(64, "draw", proposal="sparse", rule="block"),
        "draw_adjust": lambda: _accept_shard(64, "draw", proposal="sparse", adjust=True),
    },
    "accept_finish": {
        "drawn": lambda: _accept_shard(64, "finish"),
        "drawn_sparse": lambda: _accept_shard(64, "finish", proposal="sparse"),
        "greedy": lambda: _accept_shard(64, "finish", sampled=False),
    },
}
