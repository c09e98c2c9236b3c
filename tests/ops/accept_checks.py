"""An acceptance against reference/accept.py or reference/tree.py, every output: for the tests of chains, trees and shards."""

import torch

import dspark_kernels as dk
from reference import accept, tree
from reference.cases import AcceptTreeCase
from reference.decisions import Decisions
from reference.distributions import log_prob
from reference.equality import assert_equal_or_tied
from reference.logits import inverse_temperature, read_logits
from reference.sampling import adjust, filtered
from tests.ops.errors import ULP

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PER_REQUEST = ("tokens", "num_accepted", "num_emitted", "num_rejected", "next_token", "last_row", "flags")


def outcome(acceptance, layout):
    """Everything a request can see of the result, comparable: {batch row: values}."""
    names = PER_REQUEST if acceptance.path is None else (*PER_REQUEST, "path", "kv_source")
    owners = layout.batch_indices.tolist()
    committed = list(zip(acceptance.commit_mask.tolist(), owners, strict=True))
    return {
        r: (*(getattr(acceptance, name)[r].tolist() for name in names), [bit for bit, owner in committed if owner == r])
        for r in range(acceptance.tokens.shape[0])
    }


def check(case, acceptance=None, exempt=True, **advanced):
    """The acceptance of a chain or a tree, held against the reference: the given one, else that of a call made here.

    exempt=False: no near tie may excuse a difference. advanced: anchors and positions, which the kernel alone is to advance.
    """
    op, reference = (
        (dk.accept_tree, tree.accept_tree) if isinstance(case, AcceptTreeCase) else (dk.accept_chain, accept.accept_chain)
    )
    arguments = case.arguments()
    acceptance = op(**arguments, **advanced) if acceptance is None else acceptance

    def run(decisions):
        return outcome(reference(**arguments, decisions=decisions), case.layout)

    assert_equal_or_tied(run, outcome(acceptance, case.layout), exempt=exempt)
    assert not acceptance.commit_mask[case.layout.batch_indices < 0].any(), "a padding row was committed"
    if case.logprobs is not None:
        check_logprobs(case, acceptance)
    return acceptance


def check_logprobs(case, acceptance):
    """Log-probabilities of the tokens that the kernel emitted, each by the reference's formula for the row that gave it."""
    for r, count in enumerate(acceptance.num_emitted.tolist()):
        assert (acceptance.logprobs[r, count:] == 0).all()
        slot = r if case.state_indices is None else int(case.state_indices[r])
        scale = inverse_temperature(float(case.sampling.temperature[slot])) if case.sampling is not None else 0.0
        for i in range(count):
            at = int(case.layout.cu_num_logits[r]) + (i if acceptance.path is None else int(acceptance.path[r, i]))
            token, row = int(acceptance.tokens[r, i]), case.target_logits[at].float()
            if case.logprobs == "processed":
                row = adjust(row, case.sampling, slot, at, acceptance.tokens[r, :i].tolist())
            row, _ = read_logits(row)
            if case.logprobs == "processed":
                row = filtered(row, scale, case.sampling, slot, Decisions(), 0)
            want = log_prob(row, token, 1.0 if case.logprobs == "raw" else scale)
            exact, have = torch.tensor([want], dtype=torch.float64), acceptance.logprobs[r, i : i + 1]
            # Three roundings of the scaled distance to the maximum and a few of ln of the sum of exponentials.
            bound = ULP * (3 * max(1.0, abs(want)) + 12)
            same = torch.equal(have.double(), exact) if not exact.isfinite() else abs(float(have) - want) <= bound
            assert same, f"request {r}, token {i}: {float(have)} for {want}"


def with_lse(case):
    """The case's proposal with its log-sum-exp stored."""
    temperature = torch.where(case.sampling.temperature > 0, case.sampling.temperature, 1.0)
    scaled = case.proposal.logits.double() / temperature[:, None, None].double()
    return dk.DenseProposal(case.proposal.logits, lse=scaled.logsumexp(-1).float())
