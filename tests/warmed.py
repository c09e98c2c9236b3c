"""Run by test_warmup in a process of its own: prints how many variants serving needs that a warm-up did not compile.

Launches are caught before they compile, so that only what they are compiled from is compared.
"""

import dataclasses
import random
import sys

import torch

import dspark_kernels as dk
from bench import compile as report  # decides that kernels are not interpreted, before an op loads them

REQUESTS, SLOTS, DRAFTS, VOCAB, RANK = 40, 48, 5, 5000, 64
ints = lambda *shape, dtype=torch.int64: torch.zeros(*shape, dtype=dtype)  # noqa: E731

logits = torch.zeros(REQUESTS, DRAFTS, VOCAB, dtype=torch.bfloat16)
head = dk.MarkovHead(torch.zeros(VOCAB, RANK, dtype=torch.bfloat16), torch.zeros(VOCAB, RANK, dtype=torch.bfloat16))
sampling = dk.SamplingTensors(torch.ones(SLOTS), ints(SLOTS))
block = dk.DraftBlock(
    ints(SLOTS, DRAFTS),
    dk.DenseProposal(torch.zeros(SLOTS, DRAFTS, VOCAB, dtype=torch.bfloat16), lse=torch.zeros(SLOTS, DRAFTS)),
    ints(REQUESTS, dtype=torch.int32),
    torch.ones(SLOTS, DRAFTS),
    torch.ones(SLOTS, DRAFTS),
)
links = (ints(SLOTS, 12, dtype=torch.int32) for _ in range(4))
tree = dk.DraftTree(
    ints(SLOTS, 12), *links, ints(SLOTS, 12), ints(SLOTS, dtype=torch.int32),
    dk.DenseProposal(torch.zeros(SLOTS, 12, VOCAB, dtype=torch.bfloat16)), "iid", ints(REQUESTS, dtype=torch.int32),
)  # fmt: skip
target = torch.zeros(REQUESTS * (DRAFTS + 1), VOCAB, dtype=torch.bfloat16)
cost = dk.CostTable(torch.ones(REQUESTS * (DRAFTS + 1) + 1))
slots, anchors, positions = torch.arange(REQUESTS, dtype=torch.int32), ints(SLOTS), ints(SLOTS)
hidden = torch.zeros(REQUESTS, DRAFTS, 32, dtype=torch.bfloat16)
confidence = dk.ConfidenceHead(torch.zeros(32 + RANK, dtype=torch.bfloat16))

NODES = DRAFTS + 1
links = [ints(SLOTS, NODES, dtype=torch.int32) for _ in range(4)]
tree = dk.DraftTree(
    ints(SLOTS, NODES), *links, ints(SLOTS, NODES), ints(SLOTS, dtype=torch.int32),
    dk.DenseProposal(torch.zeros(SLOTS, NODES, VOCAB, dtype=torch.bfloat16)), "without_replacement", ints(SLOTS, dtype=torch.int32),
)  # fmt: skip
layers = dk.KVLayers.of([[torch.zeros(8, 16, 2, 64, dtype=torch.bfloat16) for _ in range(2)] for _ in range(3)])


def calls(r):
    """The ops of a step of r requests, with the buffers that serving uses."""
    rows = r * (DRAFTS + 1)
    draft = dataclasses.replace(block, flags=block.flags[:r])
    yield dk.draft_block, dict(
        base_logits=logits[:r], anchors=anchors, head=head, anchor_positions=positions, sampling=sampling, hidden=hidden[:r],
        confidence=confidence, state_indices=slots[:r], out=draft,
    )  # fmt: skip
    yield dk.schedule_prefixes, dict(
        block=draft, cost=cost, anchors=anchors, anchor_positions=positions, state_indices=slots[:r]
    )  # fmt: skip
    grown = dict(anchor_positions=positions, method="iid", sampling=sampling, state_indices=slots[:r])
    trees = dataclasses.replace(tree, flags=tree.flags[:r])
    yield dk.draft_tree, dict(
        base_logits=logits[:r], anchors=anchors, head=head, num_nodes=12, branching=(3, 2), out=trees, **grown
    )  # fmt: skip
    yield dk.expand_tree, dict(tree=trees, node_logits=logits[:r], depth=2, branching=2, out=trees, **grown)
    int32 = lambda n: ints(n, dtype=torch.int32)  # noqa: E731
    layout = dk.VerifyLayout(
        int32(r), int32(r + 1), int32(r + 1), ints(rows), ints(rows), int32(rows), int32(rows), int32(1), int32(r), None, DRAFTS
    )
    yield dk.accept_chain, dict(
        target_logits=target[:rows], layout=layout, proposal=block.proposal, sampling=sampling, anchors=anchors,
        anchor_positions=positions, state_indices=slots[:r],
    )  # fmt: skip


    # Trees: target rows and layouts of as many nodes as a chain has rows.
    accepted = dk.Acceptance(
        ints(r, NODES), int32(r), int32(r), int32(r), ints(r), int32(r), torch.zeros(r * NODES, dtype=torch.bool), int32(r), None,
        *(ints(r, NODES, dtype=torch.int32) for _ in range(2)),
    )  # fmt: skip
    yield dk.accept_tree, dict(
        target_logits=target[:rows], layout=dataclasses.replace(layout, slot_mapping=ints(rows)), tree=tree, rule="traversal",
        sampling=sampling, anchors=anchors, anchor_positions=positions, state_indices=slots[:r], out=accepted,
    )  # fmt: skip
    yield dk.compact_kv, dict(layers=layers, acceptance=accepted, layout=dataclasses.replace(layout, slot_mapping=ints(rows)))


def main() -> int:
    upto = int(sys.argv[1])
    with report.capture("sm_90", compiled=False) as launches:
        for r in range(1, upto + 1):
            for op, call in calls(r):
                dk.warmup(op, call)
        warm = {(launch.kernel, launch.launch) for launch in launches}
        del launches[:]
        random.seed(1)
        for r in random.sample(range(1, REQUESTS + 1), REQUESTS):
            for op, call in calls(r):
                op(**call)
        needed = {(launch.kernel, launch.launch) for launch in launches}
    print(len(needed - warm), len(needed), len(launches))
    return 0


if __name__ == "__main__":
    sys.exit(main())
