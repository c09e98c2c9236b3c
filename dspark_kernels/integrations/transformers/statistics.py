"""What a call of generate drafted and accepted."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Counts of one call.

    rounds: passes of the target after the prompt's, each over the whole batch. row_rounds: rounds of each row until it ended, added
    up. accepted: by position k = 1..K, how often draft k was accepted, those past a row's end included. new_tokens: emitted by all
    rows. flags: `dspark_kernels.Flag` bits that any row showed.
    """

    rounds: int
    row_rounds: int
    accepted: tuple[int, ...]
    new_tokens: int
    flags: int

    @property
    def acceptance_by_position(self) -> tuple[float, ...]:
        """Share of the rounds in which draft k was accepted, k = 1..K."""
        return tuple(count / max(1, self.row_rounds) for count in self.accepted)

    @property
    def tokens_per_round(self) -> float:
        """Accepted drafts and the token that follows them, on average over rows and rounds."""
        return 1 + sum(self.accepted) / max(1, self.row_rounds)
