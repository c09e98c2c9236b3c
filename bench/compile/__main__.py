"""What each kernel compiles to on each architecture, without a GPU: registers, spills, memory, matrix instructions.

The launches are the ops' own: every case calls a public op on CPU tensors under another architecture's launch
configuration, and the launch is compiled instead of run. Each row is keyed by two digests: `source`, of the code of the
kernel and all device functions it can call, and `launch`, of everything else that decides the binary (types and
alignment of arguments, constants, options). `--check` computes both again, without compiling, and compares. A third digest,
`ir`, is of the Triton IR without names: rows whose IR is the same are of the same binary, however the source was rearranged.

    python -m bench.compile                    compile everything and write bench/results/compile.csv
    python -m bench.compile --arch sm_90       the same for one architecture; other rows stay
    python -m bench.compile --changed          compile only what has another IR than its row
    python -m bench.compile --check            are the committed rows those of the code as it is?
    python -m bench.compile --compare OLD.csv  which rows of two reports have another IR, other registers or spills?
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import sys
from pathlib import Path

from bench.compile.cases import CASES
from bench.compile.report import compare, compiled_rows, problems, rows_of, stale, write
from bench.shared.offline.report import REPORT, read
from dspark_kernels.launch import arch as archs


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compile", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", action="append", choices=archs.KNOWN, help="architecture (repeatable; default: all)")
    parser.add_argument("--op", action="append", choices=CASES, help="op (repeatable; default: all)")
    every_case = sorted({case for op in CASES.values() for case in op})
    parser.add_argument("--case", action="append", choices=every_case, metavar="CASE", help="case (default: all)")
    parser.add_argument("--check", action="store_true", help="compare the report with the code; compile nothing")
    parser.add_argument("--changed", action="store_true", help="compile only launches whose IR is not that of their row")
    parser.add_argument("--compare", type=Path, metavar="OLD.csv", help="compare the report with another one; compile nothing")
    parser.add_argument("--out", "--output", type=Path, default=REPORT, metavar="FILE", help="the report (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time (default %(default)s)")
    parser.add_argument("--cached", action="store_true", help="take binaries from Triton's cache where it has them")
    options = parser.parse_args(arguments)
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
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max(1, options.jobs), mp_context=context) as pool:
        pending = {
            pool.submit(compiled_rows, arch, op, options.cached, options.case, committed if options.changed else []): (op, arch)
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


if __name__ == "__main__":
    sys.exit(main())
