"""Run by test_warmup in a process of its own: prints how many variants serving needs that a warm-up did not compile.

Launches are caught before they compile, so that only what they are compiled from is compared.
"""

import dataclasses
import random
import sys

import torch

import dspark_kernels as dk
from bench.shared.offline.capture import capture  # decides that kernels are not interpreted, before an op loads them
from dspark_kernels.ops.draft import candidate_shards, shards as draft_shards

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
NODES = DRAFTS + 1  # so that trees have as many rows as chains
links = [ints(SLOTS, NODES, dtype=torch.int32) for _ in range(4)]
tree = dk.DraftTree(
    ints(SLOTS, NODES), *links, ints(SLOTS, NODES), ints(SLOTS, dtype=torch.int32),
    dk.DenseProposal(torch.zeros(SLOTS, NODES, VOCAB, dtype=torch.bfloat16)), "iid", ints(REQUESTS, dtype=torch.int32),
)  # fmt: skip
layers = dk.KVLayers.of([[torch.zeros(8, 16, 2, 64, dtype=torch.bfloat16) for _ in range(2)] for _ in range(3)])
target = torch.zeros(REQUESTS * (DRAFTS + 1), VOCAB, dtype=torch.bfloat16)
cost = dk.CostTable(torch.ones(REQUESTS * (DRAFTS + 1) + 1))
slots, anchors, positions = torch.arange(REQUESTS, dtype=torch.int32), ints(SLOTS), ints(SLOTS)
hidden = torch.zeros(REQUESTS, DRAFTS, 32, dtype=torch.bfloat16)
confidence = dk.ConfidenceHead(torch.zeros(32 + RANK, dtype=torch.bfloat16))
# The second of two vocabulary shards, of an rnn head, dense and on candidates.
WIDTH, CANDIDATES = VOCAB // 2, 16
shard_logits, half = logits[..., :WIDTH].contiguous(), head.w2[:WIDTH].contiguous()
joint = [torch.zeros(3 * RANK, *inputs, dtype=torch.bfloat16) for inputs in ((2 * RANK + 32,), ())]
rnn, state, gathered = (
    dk.RnnMarkovHead(head.w1, half, joint_weight=joint[0], joint_bias=joint[1]),
    torch.zeros(SLOTS, RANK),
    ints(2**22),
)
workspace = dk.Workspace(REQUESTS, DRAFTS, VOCAB, "cpu", markov_rank=RANK)
dense = dataclasses.replace(block.proposal, logits=torch.zeros(SLOTS, DRAFTS, WIDTH, dtype=torch.bfloat16))
lists = ints(SLOTS, DRAFTS, CANDIDATES), torch.zeros(SLOTS, DRAFTS, CANDIDATES, dtype=torch.bfloat16)
sparse = dk.SparseProposal(*lists, lse=torch.zeros(SLOTS, DRAFTS))


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
        base_logits=logits[:r], anchors=anchors, head=head, num_nodes=NODES, branching=(2, 1), out=trees, **grown
    )  # fmt: skip
    yield dk.expand_tree, dict(tree=trees, node_logits=logits[:r], depth=2, branching=1, out=trees, **grown)
    int32 = lambda n: ints(n, dtype=torch.int32)  # noqa: E731
    layout = dk.VerifyLayout(
        int32(r), int32(r + 1), int32(r + 1), ints(rows), ints(rows), int32(rows), int32(rows), int32(1), int32(r), None, DRAFTS
    )
    yield dk.accept_chain, dict(
        target_logits=target[:rows], layout=layout, proposal=block.proposal, sampling=sampling, anchors=anchors,
        anchor_positions=positions, state_indices=slots[:r],
    )  # fmt: skip
    accepted = dk.Acceptance(
        ints(r, NODES), int32(r), int32(r), int32(r), ints(r), int32(r), torch.zeros(r * NODES, dtype=torch.bool), int32(r), None,
        *(ints(r, NODES, dtype=torch.int32) for _ in range(2)),
    )  # fmt: skip
    yield dk.accept_tree, dict(
        target_logits=target[:rows], layout=dataclasses.replace(layout, slot_mapping=ints(rows)), tree=tree, rule="traversal",
        sampling=sampling, anchors=anchors, anchor_positions=positions, state_indices=slots[:r], out=accepted,
    )  # fmt: skip
    yield dk.compact_kv, dict(layers=layers, acceptance=accepted, layout=dataclasses.replace(layout, slot_mapping=ints(rows)))


def shard_calls(r):
    """Drafting on shards: position 1 of the dense form, and a block on candidates."""
    common = dict(anchors=anchors, head=rnn, vocab_start=WIDTH, vocab_shards=2, sampling=sampling, state_indices=slots[:r])
    common |= dict(confidence=confidence, hidden=hidden[:r], head_state=state, anchor_positions=positions)
    of_dense = dict(block=dataclasses.replace(block, proposal=dense, flags=block.flags[:r]), position=1)
    of_lists = dict(block=dataclasses.replace(block, proposal=sparse, flags=block.flags[:r]), candidates=CANDIDATES)
    of_lists["workspace"] = workspace
    words = draft_shards.part_words(r, WIDTH, True), candidate_shards.part_words(shard_logits[:r], rnn, candidates=CANDIDATES)
    for form, size in zip((of_dense, of_lists), words, strict=True):
        part = dict(base_logits=shard_logits[:r], out=gathered[:size])
        yield dk.draft_block_partial, common | form | part
        own = dict(base_logits=shard_logits[:r]) if form is of_lists else {}
        yield dk.draft_block_finish, common | form | own | dict(gathered=gathered[: 2 * size].view(2, size))


def main() -> int:
    upto = int(sys.argv[1])
    with capture("sm_90", compiled=False) as launches:
        for r in range(1, upto + 1):
            for op, call in (*calls(r), *shard_calls(r)):
                dk.warmup(op, call)
        warm = {(launch.kernel, launch.launch) for launch in launches}
        del launches[:]
        random.seed(1)
        for r in random.sample(range(1, REQUESTS + 1), REQUESTS):
            for op, call in (*calls(r), *shard_calls(r)):
                op(**call)
        needed = {(launch.kernel, launch.launch) for launch in launches}
    print(len(needed - warm), len(needed), len(launches))
    return 0


if __name__ == "__main__":
    sys.exit(main())
