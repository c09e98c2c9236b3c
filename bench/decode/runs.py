"""Every system decodes every prompt; then its output is compared with the target's own and the reference's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from bench.decode import lossless, trees
from bench.decode.models import Models
from bench.decode.systems import System
from bench.shared.command import first_line
from bench.shared.parity import CheckedOps
from bench.shared.progress import Progress
from reference.loop import Generation, Request, decode


@dataclasses.dataclass(frozen=True)
class Run:
    """A system's generations at one temperature."""

    system: System
    temperature: float
    generations: list[Generation]


def run_all(arguments, models: Models, systems: Sequence[System], prompts: Sequence[list[int]]) -> list[Run]:
    """Every system at every temperature."""
    # Greedy, what is drawn is chosen: such a tree would be another row of the same.
    rows = [(s, t) for t in arguments.temperature for s in systems if t > 0 or not trees.sampled(s.tree)]
    progress = Progress(len(rows) * len(prompts) * arguments.max_new_tokens)
    runs = []
    for system, temperature in rows:
        progress.start(f"{system.label}, T = {temperature:g}")
        run = _prepared(arguments, models, system, temperature)
        if system.ops is None or not arguments.device.startswith("cpu"):  # nobody reads the interpreter's times
            run(prompts[:1], 2 * system.drafter.max_drafts + 2)  # first calls set threads and memory up; not timed
        runs.append(Run(system, temperature, run(prompts, arguments.max_new_tokens, progress)))
    progress.close()
    return runs


def _prepared(arguments, models: Models, system: System, temperature: float):
    """decode(...) with all but prompts and length filled in."""

    def run(prompts, max_new_tokens, progress=None):
        requests = [
            Request(prompt, max_new_tokens, temperature, arguments.seed << 32 | index, models.stop_tokens)
            for index, prompt in enumerate(prompts)
        ]
        return decode(
            models.target,
            system.drafter,
            requests,
            rule=arguments.rule,
            max_drafts=system.drafts,
            confidence_threshold=system.threshold,
            cost=system.cost,
            policy=arguments.policy,
            tree=system.tree,
            ops=system.ops,
            batch_size=arguments.batch_size,
            progress=progress,
        )

    return run


def verdicts(arguments, models: Models, runs: Sequence[Run], prompts) -> list[tuple[str, lossless.Verdict]]:
    """Every run against plain decoding at its temperature, and runs of kernels against the reference's."""
    found = []
    exact = None
    for run in runs:
        plain = next((r for r in runs if r.system.name == "autoregressive" and r.temperature == run.temperature), None)
        label = f"{run.system.label}, T = {run.temperature:g}"
        if plain is not None and plain is not run:
            if run.temperature > 0:
                verdict = lossless.sampled(run.generations, plain.generations)
            else:
                exact = exact or models.exact()
                verdict = lossless.greedy(run.generations, plain.generations, models.target, exact)
            found.append((label, verdict))
        if run.system.ops is not None:
            reference = next(
                r for r in runs if r.temperature == run.temperature and r.system == dataclasses.replace(run.system, ops=None)
            )
            found.append((f"{label} against the reference", _same(arguments, models, run, reference, prompts)))
    return found


def _same(arguments, models: Models, run: Run, reference: Run, prompts) -> lossless.Verdict:
    """Kernels against the reference: the same tokens and lengths in every round, or call by call up to near ties."""
    keys = ("output_ids", "acceptance_lengths", "proposal_lengths")
    pairs = list(zip(run.generations, reference.generations, strict=True))
    parted = [index for index, (have, want) in enumerate(pairs) if any(getattr(have, k) != getattr(want, k) for k in keys)]
    rounds = sum(len(g.acceptance_lengths) for g in run.generations)
    text = f"{len(pairs)} requests, {rounds} rounds: "
    if not parted:
        return lossless.Verdict(True, text + "all tokens and lengths identical")
    # A rounding in a stored proposal or a near tie leads to another text. Decoding again, every call on the same inputs.
    checked = CheckedOps(run.system.ops)
    try:
        _prepared(arguments, models, dataclasses.replace(run.system, ops=checked), run.temperature)(
            prompts, arguments.max_new_tokens
        )
    except AssertionError as error:
        return lossless.Verdict(False, f"{text}{len(parted)} requests differ, and a call does: {first_line(error)}")
    return lossless.Verdict(True, f"{text}{len(parted)} part at roundings; each of {checked.calls} calls equal up to near ties")
