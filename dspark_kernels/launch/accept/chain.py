"""Launch configuration of chain acceptance."""

from __future__ import annotations

import dataclasses

from ..arch import Arch
from ..table import Parameters, find
from .items import steps


@dataclasses.dataclass(frozen=True)
class AcceptConfig:
    """group x chunk: rows x blocks of 1024 ids of a chunk, which is worked on at once; more than one row only where a chunk covers
    whole rows. lag: requests by which the second phase follows the first. max_registers: per thread, None = the compiler's choice.
    num_stages: of loads before a dot. steps: chunks of a work item of the first phase, one after the other. residual, span: blocks of
    a step of the second phase, which reads target and draft, and steps of its items.
    """

    group: int
    chunk: int
    lag: int
    num_warps: int
    max_registers: int | None
    num_stages: int = 3
    steps: int = 1
    span: int = 1
    residual: int = 1


def pick(arch: Arch, num_requests: int, num_blocks: int, num_drafts: int, residual_rows: int, work: str = "light") -> AcceptConfig:
    """The configuration for requests with rows of `num_blocks` blocks.

    residual_rows: rows of a request whose residuals the second phase sums block by block. work: what a program does besides, which
    takes registers: "light"; "middle": noise for every id (coupled), an id map; "heavy": fp32 logits, sparse proposals, draft rows
    that are read again; "wide": penalties, bias, masks, filters, whose tiles are spread over eight warps.

    A chunk has four blocks: at V = 151936 a row is 38 chunks, so one request with 7 drafts gives 304 items of one chunk, more than
    two per multiprocessor of any GPU in launch/arch.py but the largest; with more requests an item has more chunks (items.py).
    Without a limit ptxas spills in the tails, to keep more programs resident than the loads in flight need; the limits are the
    smallest at which no architecture spills (bench/compile).
    """
    if arch.vendor == "interpreter":
        # It pays per operation, not per element: as few, large items as the grid of small vocabularies allows.
        tuned: Parameters = dict(pairs=16, lag=2, num_warps=4, max_registers=None)
    else:
        tuned = dict(find(arch, "accept", work=work).config)
    pairs = tuned.pop("pairs")
    chunk = min(pairs, 1 << (num_blocks - 1).bit_length())
    group = min(pairs // chunk, 1 << num_drafts.bit_length()) if chunk >= num_blocks else 1
    program = arch, tuned["num_warps"], tuned["max_registers"]
    first = steps(*program, num_requests * -(-(num_drafts + 1) // group), -(-num_blocks // chunk))
    residual = max(1, group * chunk // (4 if work == "middle" else 2))  # a map is read, too
    second = steps(*program, num_requests * residual_rows, -(-num_blocks // residual))
    lag = tuned.pop("lag") * first  # as many items between the phases as with one chunk an item
    return AcceptConfig(group, chunk, lag, steps=first, span=second, residual=residual, **tuned)
