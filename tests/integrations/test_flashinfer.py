"""integrations.flashinfer: the signature, shapes and examples of FlashInfer's own test, and the distribution of what is emitted."""

import inspect

import pytest
import torch

from dspark_kernels.integrations.flashinfer import chain_speculative_sampling
from dspark_kernels.testing.statistics import compare

# Of flashinfer-python 0.7.4: names in order, and what may be left out.
SIGNATURE = {
    "draft_probs": ...,
    "draft_token_ids": ...,
    "target_probs": ...,
    "maybe_output_accepted_token_num": None,
    "maybe_output_emitted_draft_token_num": None,
    "deterministic": True,
    "generator": None,
    "seed": None,
    "offset": None,
}


def probs(*shape, seed=0):
    weights = torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
    return weights / weights.sum(-1, keepdim=True)


def test_signature():
    parameters = inspect.signature(chain_speculative_sampling).parameters
    assert {name: ... if p.default is p.empty else p.default for name, p in parameters.items()} == SIGNATURE
    assert list(parameters) == list(SIGNATURE)


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("requests, drafts, vocab", [(1, 1, 111), (19, 3, 111), (2, 7, 1500)])
def test_shapes(requests, drafts, vocab, one_hot):
    """A one-hot target that follows the drafts is emitted whole; else what is emitted is a prefix, one token, and -1."""
    draft_probs, ids = probs(requests, drafts, vocab), torch.randint(vocab, (requests, drafts), dtype=torch.int32)
    target_probs = probs(requests, drafts + 1, vocab, seed=1)
    wanted = torch.cat([ids, torch.randint(vocab, (requests, 1), dtype=torch.int32)], 1)
    if one_hot:
        target_probs = torch.zeros_like(target_probs).scatter_(2, wanted.long()[..., None], 1.0)
    accepted, emitted = torch.full((requests,), 5, dtype=torch.int32), torch.zeros(requests, dtype=torch.int32)
    tokens, *counts = chain_speculative_sampling(draft_probs, ids, target_probs, accepted, emitted)
    assert counts[0] is accepted and counts[1] is emitted, "counts are added to in place"
    assert tokens.dtype == torch.int32 and tokens.shape == (requests, drafts + 1)
    assert torch.equal(emitted + 1, (tokens != -1).sum(1)) and (accepted - 5 >= emitted).all()
    assert (accepted - 5 == emitted)[emitted >= drafts - 1].all(), "the first rejected draft is verified once"
    prefix = torch.arange(drafts) < emitted[:, None]
    assert torch.equal(tokens[:, :-1][prefix], ids[prefix])
    last = tokens.gather(1, emitted.long()[:, None])
    assert ((last >= 0) & (last < vocab)).all() and (tokens[torch.arange(drafts + 1) > emitted[:, None]] == -1).all()
    if one_hot:
        assert torch.equal(tokens, wanted) and (accepted == 5 + drafts).all()


def test_seeds():
    """The same pair gives the same tokens, as ints and as tensors; another offset, seed, row or generator state others."""
    draft_probs, ids, target = probs(8, 2, 64), torch.randint(64, (8, 2)), probs(8, 3, 64, seed=1).bfloat16()
    draft_probs, ids, target = draft_probs[:1].expand(8, 2, 64), ids[:1].expand(8, 2), target[:1].expand(8, 3, 64)

    def tokens(**how):
        return chain_speculative_sampling(draft_probs, ids, target, **how)[0]

    first = tokens(seed=2**63 + 7, offset=3)
    pair = dict(seed=torch.tensor([7 - 2**63]), offset=torch.tensor([3]).view(torch.uint64))
    assert torch.equal(tokens(**pair), first)
    for other in (dict(seed=8, offset=3), dict(seed=2**63 + 7, offset=4)):
        assert not torch.equal(tokens(**other), first)
    assert len(first.unique(dim=0)) > 1, "every row has the noise of the first"
    generator = torch.Generator().manual_seed(3)
    assert not torch.equal(tokens(generator=generator), tokens(generator=generator))
    again = tokens(generator=torch.Generator().manual_seed(3))
    assert torch.equal(again, tokens(generator=torch.Generator().manual_seed(3)))


def test_the_example_of_its_docstring():
    """The first draft has twice its probability under the target, the second has none, and its correction is certain."""
    draft_probs = torch.tensor([[[0.1, 0.2, 0.3, 0.4], [0.2, 0.3, 0.4, 0.1]]])
    target_probs = torch.tensor([[[0.0, 0.1, 0.6, 0.3], [1.0, 0.0, 0.0, 0.0], [0.7, 0.1, 0.1, 0.1]]])
    tokens, accepted, emitted = chain_speculative_sampling(draft_probs, torch.tensor([[2, 1]], dtype=torch.int32), target_probs)
    assert (tokens.tolist(), accepted.tolist(), emitted.tolist()) == ([[2, 0, -1]], [1], [1])


def test_distribution():
    """Emitted tokens, emitted drafts and drafts that pass alone, against exact probabilities; with another proposal it shows."""
    draft, target = torch.tensor([0.6, 0.2, 0.2], dtype=torch.float64), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)

    def run(requests, proposal):
        ids = torch.multinomial(draft.expand(requests, 3), 2, replacement=True, generator=torch.Generator().manual_seed(1))
        target_probs = torch.stack([target, target, draft]).expand(requests, 3, 3).float()
        tokens, *numbers = chain_speculative_sampling(proposal.expand(requests, 2, 3).float(), ids, target_probs, seed=11, offset=0)
        return [found.bincount(minlength=3) for found in (tokens[:, 0], tokens[tokens[:, 1] >= 0, 1], *numbers)]

    rate = torch.minimum(draft, target).sum()
    alone = torch.stack([(1 - rate) ** 2, 2 * rate * (1 - rate), rate**2])
    wanted = dict(first=target, second=target, accepted=alone, emitted=torch.stack([1 - rate, rate * (1 - rate), rate**2]))
    found = zip(wanted.items(), run(120, draft), strict=True)
    findings = [finding for (name, probs), counts in found for finding in compare(name, counts, probs, 1e-3)]
    assert all(finding.p_value > 1e-3 for finding in findings), findings
    wrong = compare("first", run(56, target)[0], target, 1e-3)
    assert wrong[1].p_value < 1e-5, wrong


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(target_probs=torch.ones(2, 2, 9)), ValueError, "target_probs: expected shape"),
        (dict(draft_token_ids=torch.zeros(2, 2)), TypeError, "draft_token_ids: expected dtype"),
        (dict(seed=1, offset=torch.zeros(1).long()), ValueError, "seed: expected a tensor where offset is one"),
        (dict(seed=torch.zeros(3).long(), offset=torch.zeros(1).long()), ValueError, "seed: expected 1 or 2 entries, got 3"),
        (dict(seed=1.5, offset=0), TypeError, "seed: expected an int or a tensor, got float"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    right = dict(draft_probs=probs(2, 2, 9), draft_token_ids=torch.zeros(2, 2).int(), target_probs=probs(2, 3, 9))
    with pytest.raises(error) as caught:
        chain_speculative_sampling(**right | change)
    assert str(caught.value).startswith(message)
