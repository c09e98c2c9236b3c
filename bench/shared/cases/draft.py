"""Cases of draft_block over the whole vocabulary: sampled, greedy, without a head, gated, rnn, quantised, filtered.

Symbols: R requests, K drafts, V vocabulary, r rank, H hidden size. Inputs: reference/cases.py; checks: the reference, draw by draw
up to near ties (reference/equality.py), floats within the roundings that lead to them.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

import dspark_kernels as dk
from bench.shared.cases.case import BF16, DRAFTS, HIDDEN, NOISE, RANK, SUM_EXP, VOCAB, Case, Target
from bench.shared.cases.checks import ULP, by_request, close, largest, require
from bench.shared.cases.draft_logits import latents_of, unfiltered
from reference import cases, draft
from reference.equality import assert_equal_or_tied


@dataclasses.dataclass(frozen=True)
class Draft:
    """A dense block; rank 0: no head, no confidence. kind "vanilla", "gated", "rnn"; w2 None (bf16), "int8", "fp8"; filtered:
    top_k 50, then top_p 0.95."""

    requests: int
    sampled: bool = True
    drafts: int = DRAFTS
    vocab: int = VOCAB
    rank: int = RANK
    hidden: int = HIDDEN
    kind: str = "vanilla"
    w2: str | None = None
    filtered: bool = False

    op = "draft_block"

    @property
    def logits(self) -> int:
        return self.requests * self.drafts * self.vocab

    @property
    def mixing(self) -> tuple[int, int]:
        """Inputs and outputs of what makes a head's latents."""
        return {
            "vanilla": (0, 0),
            "gated": (self.hidden + self.rank, self.rank),
            "rnn": (self.hidden + 2 * self.rank, 3 * self.rank),
        }[self.kind]

    @property
    def bytes(self) -> int:
        slots, positions = self.requests, self.requests * self.drafts
        count = BF16 * self.logits  # base logits
        count += slots * (8 + 8 + 4) + 8 * positions  # anchors, their positions, flags; drafts
        if self.rank:
            row = BF16 * self.rank if self.w2 is None else self.rank + 4  # of W2, with its scale
            count += row * self.drafts * self.vocab + BF16 * self.rank * positions  # W2 per position, rows of W1
            count += BF16 * (positions * self.hidden + self.hidden + self.rank + 1) + 4 * self.drafts  # hidden, confidence head
            count += 2 * 4 * positions  # confidence, raw and calibrated
            inputs, outputs = self.mixing
            count += BF16 * (inputs + 1) * outputs + (4 * slots * self.rank if self.kind == "rnn" else 0)  # and the state, written
        if self.sampled:
            count += BF16 * self.logits + 4 * positions + slots * (4 + 8)  # logits of the proposal and their lse; temperature, seed
            count += slots * (4 + 4) if self.filtered else 0
        return count

    @property
    def flops(self) -> int:
        count = 4 * self.logits if self.sampled else 0
        if self.rank:
            count += self.logits * (2 * self.rank + 1) + 2 * self.requests * self.drafts * (self.hidden + self.rank)
            inputs, outputs = self.mixing
            count += 2 * self.requests * self.drafts * inputs * outputs
            count += self.logits if self.w2 is not None else 0  # scales
        return count

    @property
    def instructions(self) -> int:
        return self.logits * (SUM_EXP + NOISE) if self.sampled else 0

    def small(self) -> Draft:
        few = min(self.requests, 5)
        return dataclasses.replace(self, requests=few, drafts=3, vocab=700, rank=min(self.rank, 16), hidden=24)

    def make(self, seed: int) -> dict:
        case = cases.draft_case(
            seed=6 * seed,  # every sixth has a bias and calibration temperatures
            requests=self.requests,
            drafts=self.drafts,
            vocab=self.vocab,
            rank=self.rank,
            hidden_size=self.hidden,
            dtype=torch.bfloat16,
            sampled=self.sampled,
            confidence="markov" if self.rank else None,
            temperatures=(1.0,),
            kind=self.kind,
            w2_dtype={None: None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[self.w2],
        )
        if self.filtered:
            settings = torch.full((self.requests,), 50, dtype=torch.int32), torch.full((self.requests,), 0.95)
            case.sampling = dataclasses.replace(case.sampling, top_k=settings[0], top_p=settings[1])
        return case.arguments()

    def workspace(self, device) -> dk.Workspace:
        return dk.Workspace(self.requests, self.drafts, self.vocab, device, markov_rank=0 if self.kind == "vanilla" else self.rank)

    def run(self, inputs: dict) -> tuple[dk.DraftBlock, Tensor]:
        """The op's result, and the logits [R, K, V] before filters."""
        block = dk.draft_block(**inputs)
        if self.filtered:
            return block, unfiltered(inputs, block)
        return block, (block if self.sampled else dk.draft_block(**inputs, keep_logits=True)).proposal.logits

    def compare(self, inputs: dict, block: dk.DraftBlock, stored: Tensor) -> None:
        """Drafts and their support chosen from the stored logits, those logits, their lse and the confidences."""
        kept = block.proposal.logits if self.sampled else stored
        require(
            torch.equal(torch.where(kept > -torch.inf, stored, -torch.inf), kept),
            "draft_block: filters change logits that they keep",
        )

        def outcome(block, logits):
            return by_request(block.tokens, block.flags, *((logits > -torch.inf,) if self.filtered else ()))

        def reference(decisions):
            want = draft.draft_block(**inputs, keep_logits=True, stored_logits=stored, decisions=decisions)
            return outcome(want, want.proposal.logits)

        assert_equal_or_tied(reference, outcome(block, kept))
        for r in range(self.requests):
            self._compare_request(r, inputs, block, stored[r], kept[r])

    def _compare_request(self, r: int, inputs: dict, block: dk.DraftBlock, stored: Tensor, kept: Tensor) -> None:
        """Request r given its drafts, [K, V]: fp64, beside eager PyTorch in fp32."""
        base, head = inputs["base_logits"][r], inputs["head"]
        exact, eager = base.double(), base.float()
        embedded = None
        if head is not None:
            previous = torch.cat([inputs["anchors"][r : r + 1], block.tokens[r, :-1]])
            embedded = head.w1[previous]
            latents = [latents_of(head, embedded, inputs["hidden"][r], dtype) for dtype in (torch.float64, torch.float32)]
            scale = 1.0 if head.w2_scale is None else head.w2_scale
            exact = exact + latents[0] @ head.w2.double().T * scale
            # Rounded once, to the type of the product with W2, as the kernel's.
            eager = eager + latents[1].to(embedded.dtype).float() @ head.w2.float().T * scale
        # Twice eager's error, because the largest of a few roundings is itself random.
        own = (eager.to(stored.dtype).double() - exact).abs().max().item()
        close(stored, exact, 2 * own + ULP * largest(exact), f"draft_block: logits of request {r}")
        if self.sampled:
            scaled = kept.double() / float(inputs["sampling"].temperature[r])
            # Six roundings of half an ulp on the way to the largest value, and the sum's near 1 (tests/ops/test_draft.py).
            bound = ULP / 2 * (6 * largest(scaled[scaled > -torch.inf]) + 2)
            close(block.proposal.lse[r], scaled.logsumexp(-1), bound, f"draft_block: lse of request {r}")
        confidence = inputs["confidence"]
        if confidence is not None:
            terms = torch.cat([inputs["hidden"][r], embedded], -1).double() * confidence.weight.double()
            raw = terms.sum(-1) + (0.0 if confidence.bias is None else confidence.bias.double())
            bound = ULP * largest(terms.abs().sum(-1))  # sums of fp32 in any order stay far below
            close(block.confidence_logits[r], raw, bound, f"draft_block: confidence_logits of request {r}")
            scale = 1.0 if confidence.sts_temperatures is None else confidence.sts_temperatures[: self.drafts].double()
            close(block.confidence[r], torch.sigmoid(raw / scale), 1e-5, f"draft_block: confidence of request {r}")


def registry() -> list[Case]:
    return [
        Case("draft_block", "sampled_r1", Draft(1), Target(floors=1.25)),
        Case("draft_block", "sampled_r8", Draft(8)),
        Case("draft_block", "sampled_r64", Draft(64), Target(floors=1.4, issue=True)),
        Case("draft_block", "greedy_r1", Draft(1, sampled=False), Target(floors=1.25)),
        Case("draft_block", "greedy_r64", Draft(64, sampled=False), Target(floors=1.25)),
        Case("draft_block", "no_head_r64", Draft(64, rank=0)),
        Case("draft_block", "gated_r1", Draft(1, kind="gated")),
        Case("draft_block", "gated_r64", Draft(64, kind="gated")),
        Case("draft_block", "rnn_r1", Draft(1, kind="rnn")),
        Case("draft_block", "rnn_r64", Draft(64, kind="rnn")),
        Case("draft_block", "int8_r1", Draft(1, w2="int8")),
        Case("draft_block", "int8_r64", Draft(64, w2="int8")),
        Case("draft_block", "fp8_r1", Draft(1, w2="fp8")),
        Case("draft_block", "fp8_r64", Draft(64, w2="fp8")),
        Case("draft_block", "filtered_r1", Draft(1, filtered=True)),
        Case("draft_block", "filtered_r64", Draft(64, filtered=True)),
    ]
