"""Cases of draft_block on the C best base logits of each position.

Symbols: R requests, K drafts, V vocabulary, r rank, H hidden size, C candidates. Inputs: reference/cases.py;
reference: reference/draft.py.
"""

from __future__ import annotations

import dataclasses

import torch

import dspark_kernels as dk
from bench.shared.cases.case import BF16, DRAFTS, HIDDEN, RANK, VOCAB, Case, Target
from bench.shared.cases.checks import ULP, by_request, close, largest
from reference import cases, draft
from reference.equality import assert_equal_or_tied


@dataclasses.dataclass(frozen=True)
class Candidates:
    """A block on the C best base logits of each position; vanilla head and confidence."""

    requests: int
    candidates: int = 64
    drafts: int = DRAFTS
    vocab: int = VOCAB
    rank: int = RANK
    hidden: int = HIDDEN

    op = "draft_block"

    @property
    def bytes(self) -> int:
        slots, positions = self.requests, self.requests * self.drafts
        count = BF16 * positions * self.vocab  # base logits
        count += BF16 * positions * self.rank * (self.candidates + 1)  # rows of W2, a row of W1
        count += BF16 * (positions * self.hidden + self.hidden + self.rank + 1) + 4 * self.drafts  # hidden, confidence head
        count += slots * (8 + 8 + 4 + 4 + 8)  # anchors, their positions, flags, temperature, seed
        # Drafts, confidence twice, lse; ids and logits of the proposal.
        return count + positions * (8 + 2 * 4 + 4 + (8 + BF16) * self.candidates)

    @property
    def flops(self) -> int:
        """A comparison per base logit; bias, sum-exp and confidence of the candidates."""
        positions = self.requests * self.drafts
        return positions * (self.vocab + self.candidates * (2 * self.rank + 1 + 4) + 2 * (self.hidden + self.rank))

    @property
    def instructions(self) -> int:
        return 0  # noise and exponentials are drawn for the candidates alone

    def small(self) -> Candidates:
        few = min(self.requests, 3)
        return dataclasses.replace(self, requests=few, candidates=20, drafts=2, vocab=500, rank=16, hidden=24)

    def make(self, seed: int) -> dict:
        case = cases.draft_case(
            seed=6 * seed,  # every sixth has a bias and calibration temperatures
            requests=self.requests,
            drafts=self.drafts,
            vocab=self.vocab,
            rank=self.rank,
            hidden_size=self.hidden,
            dtype=torch.bfloat16,
            temperatures=(1.0,),
        )
        return case.arguments() | dict(candidates=self.candidates)

    def workspace(self, device) -> dk.Workspace:
        return dk.Workspace(self.requests, self.drafts, self.vocab, device)

    def run(self, inputs: dict) -> tuple[dk.DraftBlock, None]:
        return dk.draft_block(**inputs), None

    def compare(self, inputs: dict, block: dk.DraftBlock, _) -> None:
        """Candidates exactly, drafts from the stored proposal, that proposal and its confidences."""
        proposal = block.proposal

        def reference(decisions):
            want = draft.draft_block(**inputs, stored_logits=proposal.logits, decisions=decisions)
            return by_request(want.tokens, want.flags, want.proposal.ids)

        assert_equal_or_tied(reference, by_request(block.tokens, block.flags, proposal.ids))
        for r in range(self.requests):
            base, head = inputs["base_logits"][r].gather(1, proposal.ids[r]), inputs["head"]
            latent = head.w1[torch.cat([inputs["anchors"][r : r + 1], block.tokens[r, :-1]])]
            rows = head.w2[proposal.ids[r]]  # [K, C, r]
            exact = base.double() + (rows.double() @ latent.double()[..., None])[..., 0]
            eager = base.float() + (rows.float() @ latent.float()[..., None])[..., 0]
            own = (eager.to(proposal.logits.dtype).double() - exact).abs().max().item()
            close(proposal.logits[r], exact, 2 * own + ULP * largest(exact), f"draft_block: logits of request {r}")
            stored = proposal.logits[r].double()
            close(proposal.lse[r], stored.logsumexp(-1), ULP / 2 * (6 * largest(stored) + 2), f"draft_block: lse of request {r}")
            confidence = inputs["confidence"]
            terms = torch.cat([inputs["hidden"][r], latent], -1).double() * confidence.weight.double()
            raw = terms.sum(-1) + (0.0 if confidence.bias is None else confidence.bias.double())
            bound = ULP * largest(terms.abs().sum(-1))
            close(block.confidence_logits[r], raw, bound, f"draft_block: confidence_logits of request {r}")


def registry() -> list[Case]:
    return [
        Case("draft_candidates", "c64_r1", Candidates(1), Target(microseconds=15)),
        Case("draft_candidates", "c64_r64", Candidates(64), Target(floors=1.3)),
    ]
