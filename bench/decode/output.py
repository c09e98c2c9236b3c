"""What is written beside the table: runs as JSON, and texts in which accepted drafts are marked."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Sequence

from bench.decode.models import Models
from bench.decode.runs import Run
from bench.shared import summary


def as_json(arguments, runs: Sequence[Run]) -> dict:
    keys = ("output_ids", "acceptance_lengths", "proposal_lengths")
    return {
        "model": arguments.model or "embedded",
        "rule": arguments.rule,
        "max_new_tokens": arguments.max_new_tokens,
        "seed": arguments.seed,
        "runs": [
            {
                "system": run.system.name,
                "drafter": run.system.source or None,
                "temperature": run.temperature,
                "confidence_threshold": run.system.threshold,
                "policy": None if run.system.cost is None else arguments.policy,
                "max_drafts": run.system.drafts,
                "tree": None if run.system.tree is None else dataclasses.asdict(run.system.tree),
                "kernels": run.system.ops is not None,
                **{
                    key: (None if isinstance(value, float) and math.isnan(value) else value)
                    for key, value in dataclasses.asdict(summary.Summary.of(run.generations)).items()
                },
                **summary.engine_fields(run.generations),
                "prompts": [{key: getattr(g, key) for key in keys} for g in run.generations],
            }
            for run in runs
        ],
    }


def show(run: Run, models: Models, prompts: Sequence[list[int]]) -> str:
    """Texts in which accepted drafts and the target's own tokens differ by colour, or by brackets where there is no colour."""
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    paint = {True: ("\033[32m", "\033[0m"), False: ("\033[1;31m", "\033[0m")} if coloured else {True: ("", ""), False: ("[", "]")}
    parts = [f"{run.system.label}, T = {run.temperature:g}: accepted drafts " + ("green" if coloured else "plain")]
    parts[0] += ", the target's own tokens " + ("red" if coloured else "in brackets")
    for prompt, generation in zip(prompts, run.generations, strict=True):
        text = ["-" * 80, "\n", models.decode(prompt), "|"]
        for token, accepted in zip(generation.output_ids[len(prompt) :], generation.accepted, strict=True):
            start, end = paint[accepted]
            text.append(start + models.decode([token]) + end)
        parts.append("".join(text))
    return "\n".join(parts)
