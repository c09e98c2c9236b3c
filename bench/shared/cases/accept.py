"""Cases of accept_chain: dense, sparse and one-hot proposals, three rules, settings that change logits.

Symbols: R requests, K drafts, V vocabulary, N = R (K + 1) rows. Inputs: reference/cases.py; reference: reference/accept.py,
integers exactly, draws up to near ties (reference/equality.py).
"""

from __future__ import annotations

import dataclasses

import torch

import dspark_kernels as dk
from bench.shared.cases.case import BF16, DRAFTS, NOISE, SUM_EXP, VOCAB, Case, Target
from bench.shared.cases.checks import by_request
from reference import accept, cases
from reference.equality import assert_equal_or_tied


@dataclasses.dataclass(frozen=True)
class Accept:
    """Every draft of every request is verified. proposal: "dense" (with lse), "sparse" or "one_hot". settings: "filters",
    "adjust" (penalties, bias and bit masks)."""

    requests: int
    proposal: str = "dense"
    sampled: bool = True
    drafts: int = DRAFTS
    vocab: int = VOCAB
    rule: str = "token"
    candidates: int = 64
    settings: str | None = None
    logprobs: str | None = None

    op = "accept_chain"

    @property
    def rows(self) -> int:
        return self.requests * (self.drafts + 1)

    @property
    def bytes(self) -> int:
        """The target's logits once, and of a dense proposal one row per request: that of the draft that is rejected; under the
        block rule all of them. Filters: what they read again depends on the rows and is not counted."""
        count = BF16 * self.rows * self.vocab
        count += self.rows * (8 + 4 + 8 + 1)  # ids, logit rows; tokens, commit mask
        # Starts of rows and of logits, anchor's position; four counts and rows, next token, flags, anchor and position.
        count += 2 * 4 * (self.requests + 1) + self.requests * (8 + 4 * 4 + 8 + 4 + 8 + 8)
        if self.sampled:
            count += self.requests * (4 + 8)
            drafts = self.requests * self.drafts
            if self.rule == "coupled":
                pass  # reads no proposal
            elif self.proposal == "dense":
                count += BF16 * self.vocab * (drafts if self.rule == "block" else self.requests) + 4 * drafts
            elif self.proposal == "sparse":
                count += drafts * self.candidates * (8 + BF16)
            if self.settings == "filters":
                count += 3 * 4 * self.requests
            elif self.settings == "adjust":
                # fp32 bias per request, a bit per logit, lists of 6 tokens with counts, three strengths.
                count += 4 * self.requests * self.vocab + 4 * self.rows * -(-self.vocab // 32)
                count += self.requests * (6 * (8 + 4) + 3 * 4)
        return count + (4 * self.rows if self.logprobs else 0)

    @property
    def flops(self) -> int:
        count = (4 if self.sampled else 1) * self.rows * self.vocab
        return count + (4 * self.rows * self.vocab if self.logprobs == "raw" else 0)

    @property
    def instructions(self) -> int:
        each = SUM_EXP * (2 if self.logprobs == "raw" else 1) + (NOISE if self.rule == "coupled" else 0)
        return each * self.rows * self.vocab if self.sampled else 0

    def small(self) -> Accept:
        vocab = 1500 if self.settings is None else 700
        return dataclasses.replace(self, requests=min(self.requests, 5), drafts=3, vocab=vocab, candidates=9)

    def make(self, seed: int) -> dict:
        case = cases.accept_case(
            seed=seed,
            requests=self.requests,
            drafts=self.drafts,
            vocab=self.vocab,
            proposal=self.proposal,
            sampled=self.sampled,
            closeness=0.9,
            sharpness=2.0,
            lengths=torch.full((self.requests,), self.drafts),
            temperatures=(1.0,),
            rule=self.rule,
            candidates=self.candidates,
            filters=cases.FILTERS if self.settings == "filters" else (),
            adjust=cases.ADJUSTMENTS if self.settings == "adjust" else (),
            logprobs=self.logprobs,
        )
        inputs = case.arguments()
        if self.proposal == "dense":
            lse = inputs["proposal"].logits.double().logsumexp(-1).float()  # at temperature 1
            inputs["proposal"] = dataclasses.replace(inputs["proposal"], lse=lse)
        slots = self.requests
        return inputs | dict(anchors=torch.zeros(slots).long(), anchor_positions=torch.zeros(slots).long())

    def workspace(self, device) -> dk.Workspace:
        return dk.Workspace(self.requests, self.drafts, self.vocab, device)

    def run(self, inputs: dict) -> tuple[dk.Acceptance, None]:
        return dk.accept_chain(**inputs), None

    def compare(self, inputs: dict, result: dk.Acceptance, _) -> None:
        """Everything a request can see; its anchor, moved on in place, too."""
        anchors, positions = inputs["anchors"], inputs["anchor_positions"]
        fixed = {name: value for name, value in inputs.items() if name not in ("anchors", "anchor_positions")}

        def outcome(result, anchors, positions):
            columns = (result.tokens, result.num_accepted, result.num_emitted, result.num_rejected, result.next_token)
            commit = result.commit_mask.view(self.requests, self.drafts + 1)
            return by_request(*columns, result.last_row, result.flags, commit, anchors, positions)

        def reference(decisions):
            own = torch.zeros_like(anchors), torch.zeros_like(positions)
            want = accept.accept_chain(**fixed, anchors=own[0], anchor_positions=own[1], decisions=decisions)
            return outcome(want, *own)

        assert_equal_or_tied(reference, outcome(result, anchors, positions))


def registry() -> list[Case]:
    return [
        Case("accept_chain", "dense_r1", Accept(1), Target(microseconds=12)),
        Case("accept_chain", "dense_r8", Accept(8)),
        Case("accept_chain", "dense_r32", Accept(32), Target(floors=1.25)),
        Case("accept_chain", "dense_r64", Accept(64), Target(floors=1.25)),
        Case("accept_chain", "one_hot_r1", Accept(1, "one_hot"), Target(microseconds=12)),
        Case("accept_chain", "one_hot_r64", Accept(64, "one_hot"), Target(floors=1.25)),
        Case("accept_chain", "sparse_r1", Accept(1, "sparse"), Target(microseconds=12)),
        Case("accept_chain", "sparse_r64", Accept(64, "sparse"), Target(floors=1.25)),
        Case("accept_chain", "dense_block_r64", Accept(64, rule="block")),
        Case("accept_chain", "sparse_block_r64", Accept(64, "sparse", rule="block")),
        Case("accept_chain", "coupled_r64", Accept(64, "one_hot", rule="coupled")),
        Case("accept_chain", "one_hot_raw_r64", Accept(64, "one_hot", logprobs="raw")),
        Case("accept_chain", "one_hot_filters_r64", Accept(64, "one_hot", settings="filters")),
        Case("accept_chain", "one_hot_adjust_r64", Accept(64, "one_hot", settings="adjust")),
        Case("accept_chain", "greedy_r1", Accept(1, "one_hot", sampled=False), Target(microseconds=10)),
        Case("accept_chain", "greedy_r8", Accept(8, "one_hot", sampled=False), Target(microseconds=10)),
    ]
