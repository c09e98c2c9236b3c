"""The cases of bench.kernels: one call of a public op each, with its inputs, its cost counted by hand, and its check.

    bytes         what must move once: every input read once, every output written once; W2 once per draft position, since it is
                  larger than the caches of most GPUs
    flops         a product and its sum count 2; maximum, scaling, exp and sum of a log-sum-exp 4 per logit
    instructions  fp32 instructions per logit that no layout avoids: SUM_EXP, and NOISE where noise is drawn per token

Symbols: R requests, K drafts, V vocabulary, r rank, H hidden size, N = R (K + 1) rows. Inputs: reference/cases; checks: the
reference, draw by draw up to near ties (reference/equality.py), integers exactly, floats within the roundings that lead to them.
Targets are those the project set for one H200; sizes are Qwen3-4B's with its published drafter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

import dspark_kernels as dk
from reference import accept, cases, draft
from reference.equality import assert_equal_or_tied

from .draft_laws import latents_of, unfiltered

VOCAB, DRAFTS, RANK, HIDDEN = 151936, 7, 256, 2560
BF16 = 2  # bytes
SUM_EXP, NOISE = 10, 93  # instructions per logit: counted in the compiled code
PAGE = 16  # of a paged cache


@dataclasses.dataclass(frozen=True)
class Target:
    """At most `microseconds`, or `floors` times the floor (with `issue`: times the larger of floor and issue time)."""

    microseconds: float | None = None
    floors: float | None = None
    issue: bool = False

    def limit(self, floor: float, issue: float | None) -> float:
        """Microseconds. issue: time of the instructions, None = not known."""
        if self.microseconds is not None:
            return self.microseconds
        return self.floors * (max(floor, issue) if self.issue and issue is not None else floor)


@dataclasses.dataclass(frozen=True)
class Case:
    """op and name: as on the command line. target: None where there is none. spec: a frozen dataclass of sizes with

    bytes, flops, instructions; small() -> the same at sizes for the interpreter; make(seed) -> the op's arguments on the host;
    workspace(device); run(arguments) -> (result of a call, what else the comparison needs); compare(arguments, *run(arguments)),
    which raises AssertionError where the result is not the reference's; where the op has no out and workspace,
    call(arguments) -> what is timed.
    """

    op: str
    name: str
    spec: object
    target: Target | None = None


# --- tensors in dataclasses in dictionaries ---------------------------------------------------------------------------


def mapped(value, change: Callable[[Tensor], Tensor]):
    """The same structure with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(part, change) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(part, change) for part in value)
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **{f.name: mapped(getattr(value, f.name), change) for f in dataclasses.fields(value)})
    return value


def tensors(value) -> list[Tensor]:
    found = []
    mapped(value, lambda tensor: found.append(tensor) or tensor)
    return found


def nbytes(value) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(value))


def poison(value) -> None:
    """Overwrite every tensor with what no op writes: NaN, -77777, True."""
    for tensor in tensors(value):
        tensor.fill_(float("nan") if tensor.is_floating_point() else True if tensor.dtype == torch.bool else -77777)


def same(have, want) -> bool:
    """Whether two structures hold the same bits."""
    pairs = zip(tensors(have), tensors(want), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


# --- what a check compares --------------------------------------------------------------------------------------------

ULP = 2.0**-23


def require(condition, message: str) -> None:
    """Assert, also under python -O."""
    if not condition:
        raise AssertionError(message)


def close(actual, exact, bound: float, what: str) -> None:
    """max |actual - exact| <= bound, exact in fp64; NaN never passes."""
    error = (actual.double() - exact).abs().max().item()
    require(error <= bound, f"{what}: error {error:.3g} exceeds {bound:.3g}")


def largest(x: Tensor) -> float:
    return max(1.0, x.abs().max().item())


def by_request(*columns) -> dict[int, tuple]:
    return dict(enumerate(zip(*(column.tolist() for column in columns), strict=True)))


# --- draft_block ------------------------------------------------------------------------------------------------------


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
            count += BF16 * self.logits + 4 * positions + slots * (4 + 8)  # law and its lse; temperature, seed
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
        """Drafts and their support chosen from the stored law, that law, its lse and the confidences."""
        kept = block.proposal.logits if self.sampled else stored
        require(torch.equal(torch.where(kept > -torch.inf, stored, -torch.inf), kept), "draft_block: filters change the law")

        def outcome(block, law):
            return by_request(block.tokens, block.flags, *((law > -torch.inf,) if self.filtered else ()))

        def reference(decisions):
            want = draft.draft_block(**inputs, keep_logits=True, stored_logits=stored, decisions=decisions)
            return outcome(want, want.proposal.logits)

        assert_equal_or_tied(reference, outcome(block, kept))
        for r in range(self.requests):
            self._compare_law(r, inputs, block, stored[r], kept[r])

    def _compare_law(self, r: int, inputs: dict, block: dk.DraftBlock, stored: Tensor, kept: Tensor) -> None:
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
            law = kept.double() / float(inputs["sampling"].temperature[r])
            # Six roundings of half an ulp on the way to the largest value, and the sum's near 1 (tests/test_draft.py).
            bound = ULP / 2 * (6 * largest(law[law > -torch.inf]) + 2)
            close(block.proposal.lse[r], law.logsumexp(-1), bound, f"draft_block: lse of request {r}")
        confidence = inputs["confidence"]
        if confidence is not None:
            terms = torch.cat([inputs["hidden"][r], embedded], -1).double() * confidence.weight.double()
            raw = terms.sum(-1) + (0.0 if confidence.bias is None else confidence.bias.double())
            bound = ULP * largest(terms.abs().sum(-1))  # sums of fp32 in any order stay far below
            close(block.confidence_logits[r], raw, bound, f"draft_block: confidence_logits of request {r}")
            scale = 1.0 if confidence.sts_temperatures is None else confidence.sts_temperatures[: self.drafts].double()
            close(block.confidence[r], torch.sigmoid(raw / scale), 1e-5, f"draft_block: confidence of request {r}")


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
        # Drafts, confidence twice, lse; ids and logits of the law.
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
        """Candidates exactly, drafts from the stored law, that law and its confidences."""
        law = block.proposal

        def reference(decisions):
            want = draft.draft_block(**inputs, stored_logits=law.logits, decisions=decisions)
            return by_request(want.tokens, want.flags, want.proposal.ids)

        assert_equal_or_tied(reference, by_request(block.tokens, block.flags, law.ids))
        for r in range(self.requests):
            base, head = inputs["base_logits"][r].gather(1, law.ids[r]), inputs["head"]
            latent = head.w1[torch.cat([inputs["anchors"][r : r + 1], block.tokens[r, :-1]])]
            rows = head.w2[law.ids[r]]  # [K, C, r]
            exact = base.double() + (rows.double() @ latent.double()[..., None])[..., 0]
            eager = base.float() + (rows.float() @ latent.float()[..., None])[..., 0]
            own = (eager.to(law.logits.dtype).double() - exact).abs().max().item()
            close(law.logits[r], exact, 2 * own + ULP * largest(exact), f"draft_block: logits of request {r}")
            stored = law.logits[r].double()
            close(law.lse[r], stored.logsumexp(-1), ULP / 2 * (6 * largest(stored) + 2), f"draft_block: lse of request {r}")
            confidence = inputs["confidence"]
            terms = torch.cat([inputs["hidden"][r], latent], -1).double() * confidence.weight.double()
            raw = terms.sum(-1) + (0.0 if confidence.bias is None else confidence.bias.double())
            bound = ULP * largest(terms.abs().sum(-1))
            close(block.confidence_logits[r], raw, bound, f"draft_block: confidence_logits of request {r}")


# --- accept_chain -----------------------------------------------------------------------------------------------------


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
                pass  # reads no law
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


# --- the registry -----------------------------------------------------------------------------------------------------


def registry() -> list[Case]:
    """Every case, those that matter most first."""
    from . import attention_cases, layout_cases, tree_cases  # they build on what is above

    found = [
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
    found += layout_cases.scheduling()
    found += [
        Case("draft_candidates", "c64_r1", Candidates(1), Target(microseconds=15)),
        Case("draft_candidates", "c64_r64", Candidates(64), Target(floors=1.3)),
    ]
    return found + attention_cases.registry() + tree_cases.registry() + layout_cases.registry()
