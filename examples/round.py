"""One speculative-decoding round with dspark_kernels, on toy models: python examples/round.py [rounds].

The engine owns the models; here two lookup tables stand in for the drafter's backbone and for the target.
"""

import os
import sys

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels then run in Triton's interpreter; set before it is imported
    from dspark_kernels.testing import interpreter

    interpreter.repair()

import dspark_kernels as dk  # noqa: E402


# README: begin
def decoding_round(backbone, target, head, confidence, cost, sampling, anchors, positions, workspace=None):
    # The drafter's backbone, one parallel pass over the block (the engine's).
    base_logits, hidden = backbone(anchors, positions)
    # Launch 1: K drafts under the sequential head, their distribution, and the probability that each survives.
    block = dk.draft_block(
        base_logits, anchors, head, anchor_positions=positions, sampling=sampling, hidden=hidden, confidence=confidence,
        workspace=workspace,
    )  # fmt: skip
    # Launch 2: how many drafts of each request are worth verifying at the engine's measured costs, and the packed rows.
    layout = dk.schedule_prefixes(block, cost, anchors=anchors, anchor_positions=positions, workspace=workspace)
    # The target's forward pass over all rows of all requests (the engine's).
    target_logits = target(layout.token_ids, layout.positions, layout.batch_indices)
    # Launch 3: accept, correct or add the bonus token; anchors and positions move on in place.
    return dk.accept_chain(
        target_logits, layout, block.proposal, sampling=sampling, anchors=anchors, anchor_positions=positions,
        workspace=workspace,
    )  # fmt: skip


# README: end


def main(rounds: int = 4) -> list[list[int]]:
    """Decode for `rounds` rounds; returns the tokens each request emitted."""
    requests, drafts, vocab, rank, width = 3, 5, 500, 16, 32
    torch.manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, device=DEVICE)

    target_table, embedding = 2.5 * random(vocab, vocab), random(vocab, width)
    w1, w2 = random(vocab, rank), random(vocab, rank) * rank**-0.5

    def backbone(anchors, positions):
        hidden = embedding[anchors][:, None] + 0.1 * torch.arange(drafts, device=DEVICE)[None, :, None]
        # A drafter that knows the target's next distribution and guesses the later ones.
        logits = random(requests, drafts, vocab)
        logits[:, 0] = target_table[anchors] - w1[anchors] @ w2.T
        return logits, hidden

    def target(token_ids, positions, batch_indices):
        return target_table[token_ids]

    anchors = torch.tensor([7, 42, 99], device=DEVICE)
    positions = torch.tensor([11, 5, 80], device=DEVICE)
    sampling = dk.SamplingTensors(
        temperature=torch.tensor([1.0, 0.0, 0.7], device=DEVICE), seed=torch.tensor([1, 2, 3], device=DEVICE)
    )
    workspace = dk.Workspace(requests, drafts, vocab, DEVICE)
    head, confidence = dk.MarkovHead(w1, w2), dk.ConfidenceHead(0.05 * random(width + rank))
    cost = dk.CostTable.from_curve([1, 24], [2.0e-3, 2.6e-3], device=DEVICE)  # seconds of a step at 1 and at 24 rows
    emitted = [[] for _ in range(requests)]
    for _ in range(rounds):
        step = decoding_round(backbone, target, head, confidence, cost, sampling, anchors, positions, workspace)
        for request, (tokens, count) in enumerate(zip(step.tokens.tolist(), step.num_emitted.tolist(), strict=True)):
            emitted[request] += tokens[:count]
    return emitted


if __name__ == "__main__":
    for request, tokens in enumerate(main(int(sys.argv[1]) if len(sys.argv) > 1 else 4)):
        print(f"request {request}: {tokens}")
