"""What bench.compile does once its arguments are known: compare reports, or compile and write one."""

from __future__ import annotations

import concurrent.futures
import sys

from bench.compile.cases import CASES
from bench.compile.report import compare, compiled_rows, problems, rows_of, stale, write
from bench.shared.command import BadArgument
from bench.shared.offline.report import read
from bench.shared.workers import pool
from dspark_kernels.launch import arch as archs


def run(options) -> int:
    """0: every launch is as it has to be; 1: one is not."""
    known = sorted({case for op in CASES.values() for case in op})
    for case in options.case or ():
        if case not in known:
            raise BadArgument(f"--case: expected one of {', '.join(known)}, got {case!r}")
    selected = options.arch or list(archs.KNOWN)
    ops = options.op or list(CASES)

    def is_selected(row):
        return row["arch"] in selected and row["op"] in ops and (not options.case or row["case"] in options.case)

    committed = read(options.out)
    if options.check:
        expected = [row for arch in selected for op in ops for row in rows_of(arch, op, False, options.case)]
        chosen = [row for row in committed if is_selected(row)]
        found = stale(expected, chosen) + [text for row in chosen for text in problems(row)]
        print("\n".join(found) or f"{len(chosen)} rows are fresh")
        return 1 if found else 0

    if options.compare:
        found = compare(*([row for row in rows if is_selected(row)] for rows in (committed, read(options.compare))))
        print("\n".join(found))
        return 1 if len(found) > 1 else 0

    rows, found = [], []
    # Rows of cases that are gone go too.
    others = [row for row in committed if not is_selected(row) and row["case"] in CASES.get(row["op"], ())]
    kept = [row for row in committed if is_selected(row) and row["case"] in CASES.get(row["op"], ())]
    with pool(options.jobs) as workers:
        pending = {
            workers.submit(compiled_rows, arch, op, options.cached, options.case, committed if options.changed else []): (op, arch)
            for arch in selected
            for op in ops
        }
        for future in concurrent.futures.as_completed(pending):
            try:
                new = future.result()
            except Exception as error:
                found.append(f"{' '.join(pending[future])}: {type(error).__name__}: {error}")
                continue
            rows += new
            kept = [row for row in kept if (row["op"], row["arch"]) != pending[future]]
            write(options.out, others + kept + rows)  # as they come: a run that is stopped keeps what it has
            for row in new:
                print(" ".join(f"{row[name]:>{width}}" for name, width in _SHOWN.items()), flush=True)
                found += problems(row)
    write(options.out, others + kept + rows)
    print("\n".join(found) or f"{len(rows)} launches: no spill, shared memory within limits", file=sys.stderr)
    return 1 if found else 0


_SHOWN = dict(
    op=12, case=22, arch=7, registers=4, spill_stores=5, scalar_spills=4, stack=5, shared=7, matrix_instructions=4,
    binary_bytes=7, num_warps=2, num_stages=2, compile_seconds=6,
)  # fmt: skip
