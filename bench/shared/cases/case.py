"""A case of bench.kernels: the op that is called, its inputs, its cost and what time it is to take.

    bytes         what must move once: every input read once, every output written once; W2 once per draft position, since it is
                  larger than the caches of most GPUs
    flops         a product and its sum count 2; maximum, scaling, exp and sum of a log-sum-exp 4 per logit
    instructions  fp32 instructions per logit that no layout avoids: SUM_EXP, and NOISE where noise is drawn per token

Sizes are Qwen3-4B's with its published drafter. Targets are those the project set for one H200.
"""

from __future__ import annotations

import dataclasses

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
