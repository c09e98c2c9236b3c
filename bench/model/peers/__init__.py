"""Peers' Triton kernels, put through the model of ours where their package is installed: vLLM and SGLang.

    load.py       their modules, without importing their package
    of_*.py       which of their functions make the step that an op of ours makes, and what streams in it
    record.py     launches and torch ops of a step
    way.py        the way of a program through a kernel
    report.py     columns, times, the file

Nothing of a peer is in this repository: what is modelled is what the installed package holds. Its functions run on tensors without
data, so that its launches are those it makes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.model.ops import Kernel
from bench.model.peers import of_sglang, of_vllm, report
from bench.model.peers.load import loaded, version
from bench.model.report import Row

PEERS = {"vllm": of_vllm, "sglang": of_sglang}


def beside(out: Path) -> Path:
    """The peers' file beside the one of our rows."""
    return out.with_name(f"peers-{out.name}")


def lines(kernels: Sequence[Kernel], ours: Sequence[Row], arch: str, out: Path) -> Iterator[str]:
    """Model the peers' steps that do what `kernels` do; what to print, each line as soon as it is known. The rows go into `out`.
    ours: rows of these kernels."""
    logits = {(kernel.case.op, kernel.case.name): kernel.elements for kernel in kernels}
    done: list[report.Row] = []
    for name, peer in PEERS.items():
        there = version(name)
        if there is None:
            yield f"{name}: not installed"
            continue
        try:
            with loaded(peer.package()) as (modules, absent):
                yield f"{name} {there}: {len(absent)} modules that it imports are not loaded: {', '.join(absent)}"
                for step in peer.steps():
                    if (step.op, step.case) in logits:
                        done += report.rows_of(step, modules, name, there, arch, logits[step.op, step.case])
        except Exception as error:  # another version of a peer may have other functions: it is said, and ours stands without it
            yield f"{name} {there}: not modelled: {type(error).__name__}: {error}"
    for row in ours:
        steps = [each for each in done if (each.op, each.case, each.kernel) == (row.op, row.case, report.STEP)]
        if steps:
            yield report.our_line(row)
            yield from map(report.line, steps)
    if done:
        report.write(out, done)
        yield f"written to {out}"
