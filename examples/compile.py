"""Ops inside torch.compile: python examples/compile.py

The step below, matrix product and mask included, compiles into one graph (fullgraph=True) and gives what it gives uncompiled.
"""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # set before Triton is imported

import dspark_kernels as dk  # noqa: E402

# Inductor compiles what surrounds the ops. On a CPU it would need a C++ compiler, and the kernels are interpreted in any case.
BACKEND = "inductor" if DEVICE == "cuda" else "aot_eager"


def step(hidden, lm_head, anchors, positions, temperature, seed, w1, w2):
    """Drafts of a block, and which of them are worth a look: the tokens [R, K], and their probability under the drafter."""
    base_logits = hidden @ lm_head.T
    sampling = dk.SamplingTensors(temperature, seed)
    block = dk.draft_block(base_logits, anchors, dk.MarkovHead(w1, w2), anchor_positions=positions, sampling=sampling)
    chosen = block.proposal.logits.gather(-1, block.tokens[..., None])[..., 0] / temperature[:, None]
    return block.tokens, (chosen - block.proposal.lse).exp()


def inputs(requests=2, drafts=3, vocab=130, size=16, rank=4):
    """Arguments of a step."""
    torch.manual_seed(0)
    random = lambda *shape: torch.randn(*shape, device=DEVICE)  # noqa: E731
    anchors, positions = torch.arange(requests, device=DEVICE), torch.full((requests,), 9, device=DEVICE)
    sampling = (torch.full((requests,), 0.8, device=DEVICE), torch.arange(requests, device=DEVICE))
    return (
        random(requests, drafts, size),
        random(vocab, size),
        anchors,
        positions,
        *sampling,
        random(vocab, rank),
        random(vocab, rank),
    )


def main():
    """Compile the step, compare with the plain call, and return both results."""
    arguments = inputs()
    plain, compiled = step(*arguments), torch.compile(step, fullgraph=True, backend=BACKEND)(*arguments)
    assert torch.equal(plain[0], compiled[0])
    torch.testing.assert_close(plain[1], compiled[1])
    return plain, compiled


if __name__ == "__main__":
    (tokens, probs), _ = main()
    print(f"the same with and without torch.compile ({BACKEND}): drafts {tokens.tolist()}, probabilities {probs.tolist()}")
