"""The decoding loop that every system shares: propose -> schedule -> verify -> accept -> commit.

One round of a request turns its anchor (the last emitted token, not yet in the target's cache) into num_accepted + 1 tokens.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Callable, Sequence

from dspark_kernels.types import CostTable


@dataclasses.dataclass(frozen=True)
class Request:
    """One sequence to decode.

    prompt: token ids, at least one. max_new_tokens: >= 1. temperature: 0 = greedy. seed: int64, the request's own noise.
    stop_tokens: the request ends after the first of these that it emits (which stays in the output).
    """

    prompt: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()


@dataclasses.dataclass
class Generation:
    """What decoding one request gave. Lists "per round" have one entry per round, lists "per token" one per new token.

    The first new token comes from the prefill and belongs to no round. Rounds go on while the anchor's index is below
    len(prompt) + max_new_tokens, so one more may run when the output is complete; its lengths are not clipped, the output is.
    """

    output_ids: list[int]  # prompt included
    acceptance_lengths: list[int] = dataclasses.field(default_factory=list)  # per round, accepted drafts + 1
    proposal_lengths: list[int] = dataclasses.field(default_factory=list)  # per round, drafts that were verified
    drafted_lengths: list[int] = dataclasses.field(default_factory=list)  # per round, drafts that were made
    confidences: list[list[float]] = dataclasses.field(default_factory=list)  # per round, [] without a confidence head
    draft_passes: int = 0  # forward passes of the drafter in all rounds
    target_passes: int = 0  # forward passes of the target in all rounds (= rounds; the prefill is not one)
    draft_seconds: float = 0.0  # proposing, and keeping the drafter's state up to date
    verify_seconds: float = 0.0  # scheduling, the target's pass and acceptance
    prefill_seconds: float = 0.0  # the prompt's pass, the first token and the drafter's pass over the prompt
    logprobs: list[float] = dataclasses.field(default_factory=list)  # per token: ln of its chance under the sampling law
    accepted: list[bool] = dataclasses.field(default_factory=list)  # per token: an accepted draft, or the target's own
    flags: int = 0  # dspark_kernels.types.Flag bits met while drafting or accepting

    @property
    def new_tokens(self) -> int:
        return len(self.accepted)


def decode(
    target,
    drafter,
    requests: Sequence[Request],
    *,
    rule: str = "token",
    max_drafts: int | None = None,
    confidence_threshold: float = 0.0,
    cost: CostTable | None = None,
    policy: str = "causal",
    ops: SimpleNamespace | None = None,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> list[Generation]:
    """Decode every request; results in the order of `requests`.

    Args:
        target: reference.model.Target.
        drafter: a reference.drafters.Drafter (Autoregressive(target) for plain decoding).
        rule: "token", "block" or "coupled".
        max_drafts: verify at most this many drafts per round (None = all that the drafter makes).
        confidence_threshold: 0 = verify the whole block; t = up to the first draft whose confidence is below t. Needs a
            drafter with a confidence head.
        cost, policy: schedule with measured costs instead (ops.schedule_prefixes); same need.
        ops: namespace with draft_block, fixed_layout, accept_chain and schedule_prefixes (default: the reference's).
        batch_size: requests decoded at once; as one leaves, the next takes its slot.
        progress: called with the number of new output tokens after each step.
    """
    raise NotImplementedError
