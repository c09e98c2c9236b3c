"""What the model is told about each op: what a tile is, and what follows the hot part. Everything else is read from the binary.

Whoever rewrites a kernel looks here: `python -m bench.model --blocks --op OP --case CASE` lists the loops of what it compiles to,
from which the counts of `after` are taken by hand; nothing checks these. Symbols: R requests, K drafts, V vocabulary, P positions
= R K, c constants of the launch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

from bench.model.estimate import Phase, Steps
from bench.shared.cases.accept import Accept
from bench.shared.cases.attention import Attention
from bench.shared.cases.candidates import Candidates
from bench.shared.cases.case import BF16, DRAFTS, RANK, VOCAB, Case, Target
from bench.shared.cases.draft import Draft
from bench.shared.cases.layout import Schedule
from bench.shared.cases.registry import registry
from bench.shared.cases.trees import AcceptTrees, Compact, DraftTrees
from bench.shared.offline import calls
from dspark_kernels.launch import arch as archs
from dspark_kernels.launch.accept import chain as accept_launch


class Kernel(NamedTuple):
    """An op at one shape.

    call: the launch, to be captured. case: sizes, bytes, target. element, elements: what streams, and how many of them in a
    launch. tile(c): elements of a turn of the hot loop, or of a pass. element_bytes: what a turn loads per element, at least.
    apart: programs of the launch that do not stream. turns: of the hot loop in a program; None = elements / (programs that stream
    x tile).
    """

    case: Case
    call: Callable[[], object]
    element: str
    elements: float
    tile: Callable[[Mapping[str, int]], int]
    element_bytes: float
    after: tuple[Phase, ...]
    apart: int = 0
    turns: float | None = None


def _target(op: str, spec, otherwise: Target | None) -> Target | None:
    """That of bench.kernels, where it has the case."""
    return next((case.target for case in registry() if case.op == op and case.spec == spec), otherwise)


def _case(op: str, name: str, spec, otherwise: Target | None = None) -> Case:
    return Case(op, name, spec, _target(op, spec, otherwise))


# --- acceptance: an item = `steps` chunks, a chunk = GROUP rows x CHUNK blocks of 1024 ids ----------------------------

H200, _BLOCKS = archs.KNOWN["sm_90"], -(-VOCAB // 1024)
# Counted from the blocks of the binary for sm_90, on the longest way that a request without odd rows can take: a draft is rejected,
# and its residual is not empty. A load counts unless its value is first used 300 ns of instructions after it was asked for.
_MERGED_ROW = {
    "greedy": Steps(l2=2, fences=1, atomics=1, barriers=20, instructions=406),
    "one_hot": Steps(l2=1, fences=1, atomics=1, barriers=22, instructions=462),
    "dense": Steps(dram=1, fences=1, atomics=1, barriers=13, instructions=413),  # the logit of the draft in its row
}
_END = {
    "greedy": Steps(l2=1, barriers=1, instructions=328),
    "one_hot": Steps(l2=2, barriers=15, instructions=2481),
    "dense": Steps(l2=3, barriers=14, instructions=2327),
}
# An item of the second phase, which has started long before: its ticket is that of a program which the GPU holds beside the last
# ones of the first phase. Statistics in two loads, as registers are short, and both rows at once.
_RESIDUAL = Steps(spins=1, l2=2, dram=1, fences=1, atomics=1, barriers=8, instructions=816)
_MERGED_NODE = Steps(l2=7, fences=1, atomics=1, barriers=30, instructions=1801)  # with the draw of its token
_WALKED = Steps(l2=5, instructions=326)


def _accept(kind: str, requests: int) -> Kernel:
    proposal = "dense" if kind == "dense" else "one_hot"
    spec = Accept(requests, proposal, sampled=kind != "greedy")
    after = (Phase(_MERGED_ROW[kind]), Phase(_END[kind]))
    apart = 0
    if kind == "dense":
        # The items of a second-phase row, for the one row of a request that may need a residual.
        config = accept_launch.pick(H200, requests, _BLOCKS, DRAFTS, 1)
        apart = requests * -(-_BLOCKS // (config.residual * config.span))
        after = (after[0], Phase(_RESIDUAL, programs=apart), after[1])
    return Kernel(
        _case("accept_chain", f"{kind}_r{requests}", spec, Target(floors=1.25) if requests >= 32 else None),
        functools.partial(calls.accept_call, requests, proposal="lse" if kind == "dense" else proposal, sampled=spec.sampled),
        "logit", spec.rows * VOCAB, _accept_tile, BF16, after, apart,
    )  # fmt: skip


def _accept_tile(c) -> int:
    return c["GROUP"] * c["CHUNK"] * 1024


def _accept_tree(requests: int) -> Kernel:
    spec = AcceptTrees(requests)
    return Kernel(
        _case("accept_tree", f"walk_m32_r{requests}", spec), functools.partial(calls.accept_tree_call, requests),
        "logit", spec.rows * VOCAB, _accept_tile, BF16, (Phase(_MERGED_NODE), Phase(_WALKED)),
    )  # fmt: skip


# --- drafting, dense: a turn = ROWS requests x BLOCK_V ids and the rows of W2 of these ids --------------------------------

_GRID_BARRIER = Steps(fences=1, atomics=1, spins=1, l2=2)


def _draft(requests: int, sampled: bool) -> Kernel:
    spec = Draft(requests, sampled)
    finish = Steps(l2=6, instructions=600) if sampled else Steps(l2=4)
    return Kernel(
        _case("draft_block", f"{'sampled' if sampled else 'greedy'}_r{requests}", spec),
        functools.partial(calls.draft_call, requests, sampled=sampled),
        "logit", spec.logits, lambda c: c["ROWS"] * c["BLOCK_V"], BF16 + BF16 * RANK / requests,
        (Phase(_GRID_BARRIER.times(DRAFTS + 1)), Phase(finish, programs=requests * DRAFTS)),
    )  # fmt: skip


# --- drafting on candidates: BLOCK ids a turn, the row's last program selects, the request's last walks K positions ---

# Counted from the blocks of the binary for sm_90. Two searches for a threshold; on bf16 logits of a normal distribution they take 4
# steps and 1.
_SELECT = Steps(l2=3, fences=1, atomics=1, barriers=24 + 5 * 3, instructions=1138 + 5 * 128)
# Before the first position: ids and settings at once; then noise of all positions; then its first part beside the first rows of W2.
# After the last: all loads of lse and confidence at once.
_WALK = Steps(l2=3, barriers=14, instructions=1142)
# A row of W1, all else being there by then. The last requests of a batch find it in L2 (LAST_ROWS of kernels/draft/selection.py); of
# the others, which may not, the walk ends before those begin. The block with three more barriers is for rows without a finite key.
_POSITION = Steps(l2=1, barriers=4, instructions=341)
# A depth of a tree of paths: 8 dots over the rank, each of which waits for its rows of W2; where not all children fit, two steps of
# a search (on logits of a normal distribution); some 6 loads one after another.
_TREE_DEPTH = Steps(l2=14, barriers=49, instructions=1980)
_PREFETCH = Steps(l2=1, barriers=1, instructions=110)  # by the program that selects, before the tree may begin


def _sum(*parts: Steps) -> Steps:
    return Steps(*(sum(counts) for counts in zip(*parts, strict=True)))


def _candidates(requests: int) -> Kernel:
    spec = Candidates(requests)
    walk = _sum(_WALK, _POSITION.times(DRAFTS))
    return Kernel(
        _case("draft_candidates", f"c64_r{requests}", spec), functools.partial(calls.candidates_call, requests),
        "logit", requests * DRAFTS * VOCAB, lambda c: c["BLOCK"], BF16,
        (Phase(_SELECT, programs=requests * DRAFTS), Phase(walk, programs=requests)),
    )  # fmt: skip


def _draft_tree(requests: int) -> Kernel:
    spec = DraftTrees(requests)
    return Kernel(
        _case("draft_tree", f"c64_r{requests}", spec), functools.partial(calls.draft_paths_call, requests, candidates=64),
        "logit", requests * DRAFTS * VOCAB, lambda c: c["BLOCK"], BF16,
        (Phase(_sum(_SELECT, _PREFETCH), programs=requests * DRAFTS), Phase(_TREE_DEPTH.times(DRAFTS), programs=requests)),
    )  # fmt: skip


# --- layouts, attention, compaction -----------------------------------------------------------------------------------


def _schedule(requests: int) -> Kernel:
    spec = Schedule(requests, "causal")
    # Turns of the sort beyond the one of each loop that meets no condition, which the pass has. Merges inside a warp (61
    # instructions a turn) double the columns of a run from 1 to 32, with 0 + 1 + 2 + 3 + 4 distances after the first (30). Merges
    # across the 8 warps of 256 requests (222) have 0 + 1 + 2 distances through shared memory (55); the one across the 2 warps of 64
    # requests loops no more. One request is in order. Not in it: the scans of drafts that tie at the cut, min_len and bypass.
    sort = {
        1: Steps(),
        64: Steps(instructions=4 * 61 + 10 * 30),
        256: Steps(barriers=2 * 2 + 3 * 2, instructions=4 * 61 + 10 * 30 + 2 * 222 + 3 * 55),
    }[requests]
    return Kernel(
        _case("schedule_prefixes", f"causal_r{requests}", spec), functools.partial(calls.schedule_call, requests),
        "draft", requests * DRAFTS, lambda c: requests * DRAFTS, 1 << 20,
        (Phase(sort),), turns=1,
    )  # fmt: skip


def _attention(requests: int, context: int) -> Kernel:
    """An element is a key of a key-value head, with its value."""
    spec = Attention(requests, context)
    return Kernel(
        _case("tree_attention", f"r{requests}_c{context}_q8", spec, Target(floors=1 / 0.85)),
        functools.partial(calls.attention_call, requests),
        "key", requests * context * spec.kv_heads, lambda c: c["BLOCK_N"], 2 * BF16 * spec.head_dim,
        (Phase(Steps(l2=4, fences=1, atomics=1, barriers=16, instructions=255)),),
    )  # fmt: skip


def _compact(requests: int) -> Kernel:
    """An element is a byte of a key or value that moves; a unit has UNIT bytes."""
    spec = Compact(requests)
    moved = requests * spec.accepted * spec.layers * 2 * spec.kv_heads * spec.head_dim * BF16
    return Kernel(
        _case("compact_kv", f"r{requests}", spec), functools.partial(calls.compact_call, requests),
        "byte", moved, lambda c: c["UNIT"] * c["ROWS"] * c["CHUNK"], 1, (), turns=1,
    )  # fmt: skip


def kernels() -> list[Kernel]:
    """Every op and shape of the report."""
    found = [_accept(kind, requests) for kind in ("greedy", "one_hot", "dense") for requests in (1, 8, 64)]
    found += [_draft(requests, sampled) for sampled in (True, False) for requests in (1, 8, 64)]
    found += [_candidates(requests) for requests in (1, 8, 64)]
    found += [_schedule(requests) for requests in (1, 64, 256)]
    found += [_accept_tree(requests) for requests in (1, 64)]
    return found + [_draft_tree(1), _attention(1, 8192), _attention(64, 8192), _compact(64)]
