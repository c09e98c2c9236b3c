"""What a system's generations amount to: the numbers of a table row, and the table.

    tokens per round = mean of (accepted drafts + 1) over the rounds of all requests, with its standard error
    conditional acceptance at position k = rounds that accepted >= k drafts / rounds that accepted >= k - 1 and verified one there

A round belongs to one request; a prompt's pass and the token that comes from it belong to none.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # which imports torch
    from reference.loop import Generation


@dataclasses.dataclass(frozen=True)
class Summary:
    """Numbers of one system at one temperature. NaN where there is nothing to count."""

    tokens_per_round: float
    standard_error: float
    acceptance: list[float]  # conditional, by draft position from 1
    target_passes_per_token: float
    draft_passes_per_round: float
    verified_per_round: float  # drafts sent to verification, the anchor's row not counted
    draft_ms: float  # per round of a request; a batch shares its time among its requests
    verify_ms: float
    tokens_per_second: float

    @classmethod
    def of(cls, generations: Sequence[Generation]) -> Summary:
        lengths = [length for g in generations for length in g.acceptance_lengths]
        verified = [length for g in generations for length in g.proposal_lengths]
        rounds, tokens = len(lengths), sum(lengths)
        mean = _ratio(tokens, rounds)
        variance = _ratio(sum((length - mean) ** 2 for length in lengths), rounds - 1)
        depths = [depth for g in generations for depth in g.proposal_depths or g.proposal_lengths]
        acceptance = []
        for k in range(1, max(depths, default=0) + 1):
            reached = sum(length >= k and depth >= k for length, depth in zip(lengths, depths, strict=True))
            acceptance.append(_ratio(sum(length > k for length in lengths), reached))
        draft, verify = sum(g.draft_seconds for g in generations), sum(g.verify_seconds for g in generations)
        return cls(
            tokens_per_round=mean,
            standard_error=math.sqrt(variance / rounds) if rounds > 1 else math.nan,
            acceptance=acceptance,
            target_passes_per_token=_ratio(sum(g.target_passes for g in generations), tokens),
            draft_passes_per_round=_ratio(sum(g.draft_passes for g in generations), rounds),
            verified_per_round=_ratio(sum(verified), rounds),
            draft_ms=_ratio(1e3 * draft, rounds),
            verify_ms=_ratio(1e3 * verify, rounds),
            tokens_per_second=_ratio(tokens, draft + verify),
        )


def engine_fields(generations: Sequence[Generation]) -> dict:
    """The numbers that engines report of speculative decoding, under their names (vLLM, "Per-Request Acceptance Metrics").

    mean_acceptance_length   1 + accepted drafts / rounds: the token after the accepted drafts counts
    draft_acceptance_rate    accepted drafts / verified drafts
    acceptance_histogram     rounds by accepted drafts: entry n counts those that accepted n
    """
    accepted = Counter(length - 1 for g in generations for length in g.acceptance_lengths)
    rounds, total = accepted.total(), sum(n * count for n, count in accepted.items())
    verified = sum(length for g in generations for length in g.proposal_lengths)
    return {
        "mean_acceptance_length": 1 + total / rounds if rounds else None,
        "draft_acceptance_rate": total / verified if verified else None,
        "acceptance_histogram": [accepted[n] for n in range(max(accepted, default=-1) + 1)],
    }


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else math.nan


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


COLUMNS = (
    ("tokens/round", "accepted drafts and the token after them, with standard error"),
    ("target/token", "passes of the target per token"),
    ("draft/round", "forward passes of the drafter per round"),
    ("verified", "drafts sent to verification per round"),
    ("draft ms", "drafting per round of a request (a batch shares its time)"),
    ("verify ms", "scheduling, the target's pass and acceptance"),
    ("tokens/s", "of all requests together, prompts not counted"),
    ("acceptance by position", "of drafts at position 1, 2, ... (in a tree: any there) after accepted ones, in percent"),
)


def row(name: str, summary: Summary) -> list[str]:
    """Cells of a table row."""
    error = "" if math.isnan(summary.standard_error) else f" ±{summary.standard_error:.2f}"
    return [
        name,
        _number(summary.tokens_per_round, 2) + error,
        _number(summary.target_passes_per_token, 3),
        _number(summary.draft_passes_per_round, 2),
        _number(summary.verified_per_round, 2),
        _number(summary.draft_ms, 2),
        _number(summary.verify_ms, 2),
        _number(summary.tokens_per_second, 0),
        " ".join(_number(100 * share, 0) for share in summary.acceptance) or "-",
    ]


def table(title: str, rows: Sequence[Sequence[str]]) -> str:
    """Rows under the column names, aligned: names and the last column to the left, numbers to the right."""
    lines = [[title, *(name for name, _ in COLUMNS)], *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = []
    for line in lines:
        cells = [c.ljust(w) if i in (0, len(line) - 1) else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        text.append("  ".join(cells).rstrip())
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)


def legend() -> str:
    width = max(len(name) for name, _ in COLUMNS)
    return "\n".join(f"  {name.ljust(width)}  {meaning}" for name, meaning in COLUMNS)
