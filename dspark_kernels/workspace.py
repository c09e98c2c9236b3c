"""Scratch memory that a caller allocates once and lends to every op of one stream.

Two parts: `counters`, zero before and after every launch (arrival counters, packed arg-maxima, the grid barrier, whose sign
bit alone may stay flipped), and `scratch`, whose content never outlives a launch. An op declares how much it needs with
`declare`; the workspace takes the largest need of all ops.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_device, check_int, check_type
from .library import Out

Needs = Callable[..., tuple[int, int]]  # of an op: sizes -> int64 words of (counters, scratch)
Take = Callable[[int, torch.dtype], Tensor]  # elements, dtype -> a region
Place = tuple[int, int, torch.dtype]  # where a region begins, its elements, their dtype
Region = tuple[Tensor, int]  # a region, and where the next one begins

# op -> (requests, drafts, vocab) -> (int64 words of counters, int64 words of scratch)
_NEEDS: dict[str, Needs] = {}
# The same for ops that need to know the heads of a model: (requests, rows, query heads, KV heads, head size, invariant, device).
_HEAD_NEEDS: dict[str, Needs] = {}

# int64 words at the start of `counters` that keep their place in every launch: the grid barrier.
RESERVED = 2
MOST_REGIONS = 4096  # that a workspace keeps, about 1 KB each on the host: launches of every batch size on a few sizes of rows


def declare(op: str) -> Callable[[Needs], Needs]:
    """Register the function that tells how many int64 words an op needs beyond the reserved ones."""

    def register(needs: Needs) -> Needs:
        _NEEDS[op] = needs
        return needs

    return register


def declare_heads(op: str) -> Callable[[Needs], Needs]:
    """`declare` for an op of attention: it has room only where a workspace was made for heads."""

    def register(needs: Needs) -> Needs:
        _HEAD_NEEDS[op] = needs
        return needs

    return register


class Workspace:
    """Scratch memory for the ops of one stream. With `out=` and `workspace=` an op allocates nothing.

    Launches (and CUDA graphs) that may run at the same time must not share a workspace. Every launch that finishes leaves it clean;
    call `reset()` after one that was aborted.

    Args:
        max_requests, max_drafts, vocab_size: the largest batch that it serves: R, K (for trees M - 1) and V.
        device: where the memory lies; None = the current CUDA device, or the CPU where there is none.
        query_heads, kv_heads, head_dim: of the attention layers; give them if `tree_attention` is to use the workspace. Layers
            with different heads need one workspace for each kind, as the smaller head can need more.
        max_rows: forward rows of `tree_attention`; default max_requests * (max_drafts + 1).
        batch_invariant: whether `tree_attention` will be called with it, which takes more scratch: see `plan_attention`.
        markov_rank: rank of a gated or rnn head of `draft_block` or `draft_tree`; 0 for other heads, which need no room.

    Raises:
        TypeError, ValueError: a size that is not an integer in its range; a device that torch does not have here.
    """

    def __init__(
        self,
        max_requests: int,
        max_drafts: int,
        vocab_size: int,
        device: str | torch.device | None = None,
        *,
        query_heads: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        max_rows: int | None = None,
        batch_invariant: bool = False,
        markov_rank: int = 0,
    ) -> None:
        self.max_requests = check_int("max_requests", max_requests, low=1)
        self.max_drafts = check_int("max_drafts", max_drafts, low=0)
        self.vocab_size = check_int("vocab_size", vocab_size, low=1)
        device = check_device("device", device)
        self.markov_rank = check_int("markov_rank", markov_rank, low=0)
        needs = [needed(max_requests, max_drafts, vocab_size) for needed in _NEEDS.values()]
        heads = (query_heads, kv_heads, head_dim)
        if any(size is not None for size in heads):
            for name, size in zip(("query_heads", "kv_heads", "head_dim"), heads, strict=True):
                check_int(name, size, low=1)
            rows = check_int("max_rows", max_requests * (max_drafts + 1) if max_rows is None else max_rows, low=1)
            needs += [needed(max_requests, rows, *heads, batch_invariant, device) for needed in _HEAD_NEEDS.values()]
        counters = RESERVED + max(words for words, _ in needs)
        self.counters = torch.zeros(counters, dtype=torch.int64, device=device)
        scratch = max(words for _, words in needs) + node_latent_words(max_requests, max_drafts, markov_rank)
        self.scratch = torch.empty(scratch, dtype=torch.int64, device=device)
        for memory in (self.counters, self.scratch):
            memory.regions = {}  # type: ignore[attr-defined]  # see Carver

    def reset(self) -> None:
        """Zero the counters again, after a launch that did not finish."""
        self.counters.zero_()

    @property
    def bytes(self) -> int:
        """Device memory that it holds."""
        return 8 * (self.counters.numel() + self.scratch.numel())


def latents_of(
    take: Take, products: int, latents: int, states: int, rank: int, parts: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scratch of a head with latents: rows of precomputed products, of latents, and of states (None unless it is an rnn head).

    products, latents, states: how many rows of each. parts: ranks per row of products, 1 for a gated head and 3 for an rnn head.
    """
    precomputed, latent = take(products * parts * rank, torch.float32), take(latents * rank, dtype)
    return precomputed, latent, take(states * rank, torch.float32) if parts == 3 else None


def latent_words(requests: int, drafts: int, rank: int, parts: int = 3) -> int:
    """int64 words of `latents_of` for a block: products per position, a latent and two states per request."""
    return measured(latents_of, requests * drafts, requests, 2 * requests, rank, parts)


def padded_nodes(drafts: int) -> int:
    """Nodes of a tree of so many drafts, padded."""
    return max(16, 1 << drafts.bit_length())


def node_latent_words(requests: int, drafts: int, rank: int, parts: int = 3) -> int:
    """`latent_words` where every node of a tree has a latent and two states of its own."""
    nodes = requests * padded_nodes(drafts)
    return measured(latents_of, requests * drafts, nodes, 2 * nodes, rank, parts)


class Lent(NamedTuple):
    """Memory of one launch, int64."""

    counters: Out[Tensor]
    scratch: Out[Tensor]


def lend(
    op: str,
    workspace: Workspace | None,
    requests: int,
    drafts: int,
    vocab: int,
    device: torch.device,
    *,
    rank: int = 0,
    latents: int = 0,
) -> Lent:
    """Memory for one launch: the caller's, checked to be large enough, or fresh.

    latents: int64 words that a head with latents of `rank` needs beside the op's own scratch.
    """
    counters, scratch = _NEEDS[op](requests, drafts, vocab)
    return lend_words(workspace, counters, scratch + latents, device, room_for(requests, drafts, vocab, rank))


def room_for(requests: int, drafts: int, vocab: int, rank: int = 0) -> str:
    """What to make a workspace for, a message for `lend_words`. rank: of a head with latents, 0 = none."""
    wanted, made_for = f"{requests} requests x {drafts} drafts over {vocab} ids", "{made_for}"
    if rank:
        wanted, made_for = f"{wanted} and markov_rank={rank}", "{made_for} and markov_rank={markov_rank}"
    return f"expected room for {wanted}, got one made for {made_for}"


def lend_words(workspace: Workspace | None, counters: int, scratch: int, device: torch.device, message: str) -> Lent:
    """`lend` for an op that knows its words itself; `message` says what to make a workspace for that is too small."""
    counters += RESERVED
    if workspace is None:
        return Lent(
            torch.zeros(counters, dtype=torch.int64, device=device),
            torch.empty(scratch, dtype=torch.int64, device=device),
        )
    check_type("workspace", workspace, Workspace)
    if workspace.counters.device != device:
        raise ValueError(f"workspace: expected one on {device}, got one on {workspace.counters.device}")
    if workspace.counters.numel() < counters or workspace.scratch.numel() < scratch:
        made_for = f"{workspace.max_requests} x {workspace.max_drafts} over {workspace.vocab_size}"
        raise ValueError(f"workspace: {message.format(made_for=made_for, markov_rank=workspace.markov_rank)}")
    return Lent(workspace.counters, workspace.scratch)


def measured(carve: Callable[..., object], *sizes: int) -> int:
    """int64 words of what `carve(take, *sizes)` takes: scratch is described once, by the function that carves it."""
    # An op asks at every call, with few different sizes; a traced call may have sizes that are symbols.
    return _count(carve, *sizes) if torch.compiler.is_compiling() else _counted(carve, *sizes)


def _count(carve: Callable[..., object], *sizes: int) -> int:
    words = 0

    def take(count: int, dtype: torch.dtype) -> None:
        nonlocal words
        words += words_of(count, dtype)

    carve(take, *sizes)
    return words


_counted = functools.lru_cache(maxsize=4096)(_count)


class Carver:
    """Cuts typed regions out of one int64 tensor, each at a 16-byte boundary."""

    def __init__(self, memory: Tensor, start: int = 0) -> None:
        self._memory, self._next = memory, start
        # Regions of a workspace's memory are kept: a launch takes about twenty, each of which costs more to cut than to look up.
        self._regions: dict[Place, Region] | None = getattr(memory, "regions", None)

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        if self._regions is None:
            region, self._next = self._cut(self._memory, count, dtype)
            return region
        place = self._next, count, dtype
        found = self._regions.get(place)
        if found is None:
            if len(self._regions) >= MOST_REGIONS:
                self._regions.clear()
            # Of a tensor that shares the memory: what is cut refers to what it is cut from, which must not refer to it.
            found = self._regions[place] = self._cut(self._memory.detach(), count, dtype)
        region, self._next = found
        return region

    def _cut(self, memory: Tensor, count: int, dtype: torch.dtype) -> Region:
        """(region, where the next one begins)."""
        end = self._next + words_of(count, dtype)
        region = memory[self._next : end]
        return region if dtype == torch.int64 else region.view(dtype), end


def words_of(count: int, dtype: torch.dtype) -> int:
    """int64 words of a region of `count` elements, rounded up to 16 bytes."""
    per_word = 8 // dtype.itemsize
    return -(-count // (2 * per_word)) * 2
