"""Ranks of test_distributed.py as real processes: python -m tests.integrations.ranks FOLDER.

One process imports everything and forks into four ranks, which meet over gloo on the loopback interface. Each writes what its calls
returned to FOLDER/rank<number>.pt; in the end one rank is late for a gather, and another dies before one.
"""

import datetime
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from dspark_kernels.integrations import distributed
from dspark_kernels.integrations.distributed import VocabularyShards
from dspark_kernels.testing import interpreter
from reference import cases
from tests.ops import shards as loops

RANKS = 4
PAIRS = ((0, 1), (2, 3))  # each a group of two
LATE, DEAD = 1, 3
TIMEOUT = 5.0  # seconds, of the groups in which a rank fails
NUMBERS = ("vocab_start", "vocab_shards", "vocab_size")


class Draft(NamedTuple):
    """A call of draft_block. exact: whether it has the bits of the whole op, by the cut."""

    width: int
    axes: dict
    options: dict = {}
    exact: bool = True
    stateless: bool = False  # an rnn head whose state the caller does not want

    def case(self):
        return cases.draft_case(requests=2, hidden_size=8, **self.axes)

    def run(self, group):
        case, ranks = self.case(), dist.get_world_size(group)
        vocab = case.base_logits.shape[2]
        shards = VocabularyShards(vocab, 2, 4, width=self.width, group=group, device="cpu", markov_rank=16)
        base, head, own = loops.draft_ranks(case, ranks, self.width)[shards.rank]
        own = loops.of(own, *NUMBERS)
        if self.stateless:
            own = loops.of(own, "head_state")
        block = shards.draft_block(base, case.anchors, head, keep_logits=True, **own, **self.options)
        return block, own.get("head_state")


class Accept(NamedTuple):
    """A call of accept_chain that advances anchors."""

    width: int
    axes: dict
    exact: bool = True

    def case(self):
        return cases.accept_case(requests=2, drafts=2, dtype=torch.float32, closeness=0.9, **self.axes)

    def run(self, group):
        case, ranks = self.case(), dist.get_world_size(group)
        vocab = case.target_logits.shape[1]
        shards = VocabularyShards(vocab, 2, 2, width=self.width, group=group, device="cpu")
        proposal = case.proposal
        if self.axes.get("proposal", "dense") == "dense":
            proposal = type(proposal)(loops.cut(proposal.logits, ranks, self.width)[shards.rank])
        advanced = anchors_of(case)
        logits = loops.cut(case.target_logits, ranks, self.width)[shards.rank]
        result = shards.accept_chain(logits, case.layout, proposal, sampling=case.sampling, rule=case.rule, **advanced)
        return result, advanced


def anchors_of(case):
    """What acceptance advances in place."""
    requests = case.layout.draft_lens.shape[0]
    return dict(anchors=torch.zeros(requests, dtype=torch.int64), anchor_positions=torch.arange(requests))


# Cuts at multiples of 64 and 1024 ids are exact; the last rank has fewer ids than the others, or none.
OF_FOUR = dict(
    draft_any_cut=Draft(13, dict(seed=1, drafts=2, vocab=40), exact=False),
    draft_candidates=Draft(13, dict(seed=2, drafts=2, vocab=40, kind="rnn"), dict(candidates=5)),
    accept_any_cut=Accept(14, dict(seed=3, vocab=40), exact=False),
    accept_greedy=Accept(11, dict(seed=4, vocab=40, sampled=False)),
)
OF_TWO = (
    dict(
        draft=Draft(64, dict(seed=5, drafts=3, vocab=100, grid=0.25)),
        accept_dense=Accept(1024, dict(seed=6, vocab=1100)),
    ),
    dict(
        draft_rnn=Draft(64, dict(seed=9, drafts=2, vocab=70, kind="rnn", grid=0.25), stateless=True),
        accept_sparse_block=Accept(1024, dict(seed=8, vocab=1030, proposal="sparse", rule="block")),
    ),
)


def differing(group):
    """What a rank is told whose width is not that of the others."""
    try:
        VocabularyShards(40, 1, 1, width=20 + dist.get_rank(group), group=group, device="cpu")
    except ValueError as error:
        return str(error)


def failing(group, fail):
    """(seconds, what torch.distributed said) of a block whose second gather lacks a rank. fail: called by that rank, else None."""
    shards = VocabularyShards(40, 1, 2, group=group, device="cpu")
    gather, gathers = distributed._all_gather, []

    def counted(*arguments):
        gathers.append(1)
        if len(gathers) == 2 and fail is not None:
            fail()
        return gather(*arguments)

    distributed._all_gather = counted
    start = time.monotonic()
    zero = torch.zeros(1, dtype=torch.int64)
    try:
        shards.draft_block(torch.zeros(1, 2, 20), zero, anchor_positions=zero)
    except Exception as error:
        return time.monotonic() - start, f"{type(error).__name__}: {error}"
    finally:
        distributed._all_gather = gather


def rank_main(rank, folder):
    whole = datetime.timedelta(seconds=100)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=whole)
    groups = [dist.new_group(pair, timeout=whole) for pair in PAIRS]
    brittle = [dist.new_group(pair, timeout=datetime.timedelta(seconds=TIMEOUT)) for pair in PAIRS]
    pair = rank // 2
    results = {name: call.run(None) for name, call in OF_FOUR.items()}
    results |= {name: call.run(groups[pair]) for name, call in OF_TWO[pair].items()}
    results["differing"] = differing(groups[pair])

    def saved():
        torch.save(results, folder / f"part{rank}.pt")
        (folder / f"part{rank}.pt").rename(folder / f"rank{rank}.pt")

    def late():
        saved()
        while not (folder / "rank0.pt").exists():
            time.sleep(0.05)
        os._exit(0)

    def dead():
        saved()
        os._exit(1)

    results["failing"] = failing(brittle[pair], {LATE: late, DEAD: dead}.get(rank))
    saved()
    os._exit(0)  # without goodbyes to ranks that are gone


def main(folder):
    torch.set_num_threads(1)
    interpreter.repair()
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            try:
                rank_main(rank, folder)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(3)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(codes)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
