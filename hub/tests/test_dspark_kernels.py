"""One round of the ops against plain PyTorch, and the conformance suite on the kernel itself."""

import importlib

import pytest
import torch

REQUESTS, DRAFTS, VOCAB, RANK = 3, 4, 300, 8


@pytest.fixture
def state(device):
    """Anchors and their positions."""
    return torch.tensor([5, 17, 299], device=device), torch.tensor([10, 0, 77], device=device)


def normal(*shape, seed, device):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def verified(dk, tokens, state, lengths):
    """A block of these drafts, and the layout of its rows."""
    anchors, positions = state
    block = dk.DraftBlock(tokens, dk.OneHotProposal(), torch.zeros(len(tokens), dtype=torch.int32, device=tokens.device))
    return block, dk.fixed_layout(block, lengths, anchors=anchors, anchor_positions=positions)


@pytest.mark.kernels_ci
def test_ops_are_registered_under_the_name_that_the_kernel_is_loaded_by(dk):
    assert dk.__name__.startswith("_dspark_kernels_")
    assert hasattr(getattr(torch.ops, dk.__name__), "accept_chain")


@pytest.mark.kernels_ci
def test_greedy_drafts_follow_the_head(dk, device, state):
    anchors, positions = state
    base = normal(REQUESTS, DRAFTS, VOCAB, seed=1, device=device)
    w1, w2 = normal(VOCAB, RANK, seed=2, device=device), normal(VOCAB, RANK, seed=3, device=device)
    block = dk.draft_block(base, anchors, dk.MarkovHead(w1, w2), anchor_positions=positions)
    last, wanted = anchors, []
    for k in range(DRAFTS):
        last = (base[:, k] + w1[last] @ w2.T).argmax(1)
        wanted.append(last)
    assert torch.equal(block.tokens, torch.stack(wanted, 1))


@pytest.mark.kernels_ci
def test_a_layout_packs_anchors_and_admitted_drafts(dk, device, state):
    tokens = torch.arange(REQUESTS * DRAFTS, device=device).view(REQUESTS, DRAFTS)
    lengths = torch.tensor([2, 0, 4], dtype=torch.int32, device=device)
    _, layout = verified(dk, tokens, state, lengths)
    assert layout.query_start_loc.tolist() == [0, 3, 4, 9]
    assert layout.token_ids[:9].tolist() == [5, 0, 1, 17, 299, 8, 9, 10, 11]
    assert layout.positions[:9].tolist() == [10, 11, 12, 0, 77, 78, 79, 80, 81]


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_acceptance_is_the_prefix_that_agrees(dk, device, state, dtype):
    target = normal(REQUESTS, DRAFTS + 1, VOCAB, seed=4, device=device).to(dtype)
    best = target.argmax(2)
    right = torch.tensor([4, 0, 2], device=device)  # drafts that agree, of four
    index = torch.arange(DRAFTS, device=device)
    tokens = torch.where(index < right[:, None], best[:, :-1], (best[:, :-1] + 1) % VOCAB)
    block, layout = verified(dk, tokens, state, torch.full((REQUESTS,), DRAFTS, dtype=torch.int32, device=device))
    got = dk.accept_chain(target.flatten(0, 1), layout, block.proposal)
    assert got.num_accepted.tolist() == right.tolist()
    assert got.next_token.tolist() == best.gather(1, right[:, None])[:, 0].tolist()


@pytest.mark.kernels_ci
def test_a_seed_gives_the_same_tokens_again(dk, device, state):
    anchors, positions = state
    sampling = dk.SamplingTensors(torch.ones(REQUESTS, device=device), torch.arange(REQUESTS, device=device))
    base = normal(REQUESTS, DRAFTS, VOCAB, seed=5, device=device)
    first, again = (dk.draft_block(base, anchors, anchor_positions=positions, sampling=sampling) for _ in range(2))
    assert torch.equal(first.tokens, again.tokens)


@pytest.mark.kernels_ci
def test_the_token_rule_conforms(dk, device):
    """The suite's tests of every length and number of accepted drafts, of greedy rows, and of what else is in the batch."""
    testing, ours = (importlib.import_module(f"{dk.__name__}.{name}") for name in ("testing", "testing.ours"))
    report = testing.check(ours.token, tests=["rows", "greedy", "batch"], requests=64, device=device)
    assert report.passed, str(report)
