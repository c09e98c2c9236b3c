"""A round of speculative decoding in a CUDA graph: python examples/cuda_graph.py [rounds].

The first call of each op allocates its result; that and a workspace are given to every later call, which then allocates nothing and
never waits for the host, so that a graph can capture it. Without a GPU the same calls run one by one, in Triton's interpreter.
"""

import os
import sys

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # set before Triton is imported

import dspark_kernels as dk  # noqa: E402


class Round:
    """A batch of requests, and what a round reads and writes: tensors that stay where they are.

    Lookup tables stand in for the engine's models: of the drafter [V, K * V], of the target [V, V].
    """

    def __init__(self, requests=3, drafts=3, vocab=200):
        torch.manual_seed(0)
        self.target = 2.5 * torch.randn(vocab, vocab, device=DEVICE)
        self.drafter = torch.cat([self.target, *(torch.randn(vocab, vocab, device=DEVICE) for _ in range(drafts - 1))], 1)
        self.anchors = torch.arange(7, 7 + requests, device=DEVICE)
        self.positions = torch.arange(20, 20 + requests, device=DEVICE)
        temperature, seed = torch.linspace(0, 1, requests, device=DEVICE), torch.arange(requests, device=DEVICE)
        self.sampling = dk.SamplingTensors(temperature, seed)
        self.lengths = torch.full((requests,), drafts, dtype=torch.int32, device=DEVICE)
        self.base_logits = torch.empty(requests, drafts, vocab, device=DEVICE)
        self.target_logits = torch.empty(requests * (drafts + 1), vocab, device=DEVICE)
        self.workspace = dk.Workspace(requests, drafts, vocab, DEVICE)
        self.block = self.layout = self.acceptance = None  # outputs, once there are any

    def __call__(self):
        torch.index_select(self.drafter, 0, self.anchors, out=self.base_logits.flatten(1))  # the drafter's pass (the engine's)
        place = dict(anchors=self.anchors, anchor_positions=self.positions)
        kept = dict(workspace=self.workspace)
        self.block = dk.draft_block(self.base_logits, **place, sampling=self.sampling, out=self.block, **kept)
        self.layout = dk.fixed_layout(self.block, self.lengths, **place, out=self.layout)
        torch.index_select(self.target, 0, self.layout.token_ids, out=self.target_logits)  # the target's pass (the engine's)
        self.acceptance = dk.accept_chain(
            self.target_logits, self.layout, self.block.proposal, sampling=self.sampling, out=self.acceptance, **place, **kept
        )


def captured(call):
    """A function that does what `call` does: the replay of a graph, or on a machine without a GPU the call itself."""
    if DEVICE == "cpu":
        print("no GPU: the calls run one by one")
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def main(rounds: int = 4) -> list[list[int]]:
    """Decode for `rounds` rounds; returns the tokens that each request emitted."""
    batch = Round()
    emitted = [[] for _ in batch.anchors]

    def note():
        for tokens, count, row in zip(
            emitted, batch.acceptance.num_emitted.tolist(), batch.acceptance.tokens.tolist(), strict=True
        ):
            tokens += row[:count]

    batch()  # compiles, and allocates the outputs
    note()
    replay = captured(batch)
    for _ in range(rounds - 1):
        replay()
        note()
    return emitted


if __name__ == "__main__":
    for request, tokens in enumerate(main(int(sys.argv[1]) if len(sys.argv) > 1 else 4)):
        print(f"request {request}: {tokens}")
