"""Search the launch configurations of a GPU and write its table, with the measurement that justifies each entry.

    python -m bench.tune                    without a GPU: what every entry of every table compiles to
    python -m bench.tune --predict          the same, and configurations one step away, ranked by prediction
    python -m bench.tune                    on a GPU: time entries and what is one step away from them, keep what is faster

A step changes one parameter; what decides in which order a request's numbers are summed is none, since bits may not depend on the
batch. Configurations that spill registers or exceed shared memory are out. The others are ranked by

    time = bytes / bandwidth * max(1, bandwidth * LATENCY / (multiprocessors * resident * bytes on the way per program))

with the bytes of bench.kernels' case and resident programs from registers, shared memory and warps of the binary. A prediction
changes no table: only a time does, of a case that equals the reference, if it is GAIN faster than the entry it replaces. Times are
medians of CUDA-graph replays on cold inputs. Entries are timed most important first and each is written as soon as it is known, so
that the command, started again, goes on where it was.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.shared import timing
from dspark_kernels.launch import table
from dspark_kernels.launch.arch import KNOWN, Arch
from dspark_kernels.launch.table import Entry, Table

GAIN = 0.03  # of the median: less is not worth a change
LATENCY = 700e-9  # s from a load to its data, about; assumed
BANDWIDTH = {  # bytes per second on paper of the part whose multiprocessors launch/arch.py lists: vendors' data sheets
    "sm_80": 2.0e12, "sm_86": 0.77e12, "sm_89": 0.86e12, "sm_90": 4.8e12, "sm_100": 8.0e12, "sm_120": 1.79e12, "gfx942": 5.3e12,
    "gfx950": 8.0e12,
}  # fmt: skip
ROUNDS = 2  # of steps from the best so far


class BadArgument(Exception):
    """Message of one line that names the argument."""


@dataclasses.dataclass(frozen=True)
class Tuned:
    """How the entries of a kernel are compiled, timed and varied.

    call: (bench.compile_cases, shape) -> what launches it there. spec: (bench.kernel_cases, bench.attention_cases, shape) -> the
    case that times it, or None: then it is compiled only. space: parameter -> values. flight: (shape, config) -> bytes that a
    program has on the way. importance: orders entries, the largest first.
    """

    op: str
    call: Callable
    spec: Callable
    space: dict[str, tuple]
    flight: Callable[[dict, dict], int]
    importance: Callable[[dict], float]


def _bits(kind: str) -> tuple[int, int]:
    """Bytes of an element of queries and of keys."""
    queries, keys = (int(part.split("-")[0]) // 8 for part in kind.split(", "))
    return queries, keys


def _attention_call(calls, shape):
    queries, keys = _bits(shape["kind"])
    group = {16: 2, 32: 4, 64: 8}[shape["block_m"]]
    cache = calls.torch.float8_e4m3fn if keys == 1 else None
    dtype = calls.torch.float32 if queries == 4 else calls.torch.bfloat16
    calls.attention_call(64, group=group, head_dim=shape["head"], dtype=dtype, cache=cache)


def _attention_spec(cases, attention_cases, shape):
    if _bits(shape["kind"]) != (2, 2):
        return None  # bench.kernels has no such case
    group = {16: 2, 32: 4, 64: 8}[shape["block_m"]]
    return attention_cases.Attention(32, 8192, query_heads=8 * group, head_dim=shape["head"])


def _layout_call(calls, shape):
    requests = shape["requests"]
    few = requests <= 256
    calls.layout_call(requests, prefill=not few, paged=True, slots=requests + (44 if few else 76))  # as in the report


def _schedule_requests(shape) -> int:
    return shape["candidates"] // 8


def _draft_call(calls, shape):
    requests, dtype = (1 if shape["one_tile"] else 64), getattr(calls.torch, _OPERANDS[shape["operands"]])
    calls.draft_call(requests, dtype=dtype)


def _layout_cases():
    from bench.shared.cases import layout as layout_cases

    return layout_cases


_OPERANDS = {"16 bit": "bfloat16", "32 bit": "float32"}
_ACCEPT = {"light": dict(), "heavy": dict(proposal="no lse"), "wide": dict(adjust=True)}

KERNELS = {
    "draft": Tuned(
        op="draft_block",
        call=_draft_call,
        # bench.kernels has no case in fp32.
        spec=lambda cases, attention_cases, shape: (
            cases.Draft(1 if shape["one_tile"] else 64) if shape["operands"] == "16 bit" else None
        ),
        space=dict(block_v=(64, 128), num_warps=(4, 8), num_stages=(1, 2, 3), programs_per_sm=(1, 2)),
        flight=lambda shape, config: config["num_stages"] * config["block_v"] * (512 if shape["operands"] == "16 bit" else 128),
        importance=lambda shape: 8.0 + shape["one_tile"],
    ),
    "accept": Tuned(
        op="accept_chain",
        call=lambda calls, shape: calls.accept_call(64, **_ACCEPT[shape["law"]]),
        # bench.kernels has no case without the proposal's lse.
        spec=lambda cases, attention_cases, shape: cases.Accept(64) if shape["law"] == "light" else None,
        space=dict(pairs=(2, 4, 8), num_warps=(4, 8), lag=(1, 2, 4), max_registers=(96, 128, 168)),
        flight=lambda shape, config: 2 * 1024 * config["pairs"],
        importance=lambda shape: 8.5,
    ),
    "attention": Tuned(
        op="tree_attention",
        call=_attention_call,
        spec=_attention_spec,
        space=dict(block_n=(16, 32, 64, 128), num_warps=(4, 8), num_stages=(1, 2, 3, 4), resident=(1, 2, 3)),
        flight=lambda shape, config: 2 * config["num_stages"] * config["block_n"] * shape["head"] * _bits(shape["kind"])[1],
        importance=lambda shape: 5.0 * (_bits(shape["kind"]) == (2, 2)) * (shape["head"] == 128) + shape["block_m"] / 100,
    ),
    "schedule": Tuned(
        op="schedule_prefixes",
        call=lambda calls, shape: calls.schedule_call(_schedule_requests(shape), max_rows=shape["rows"]),
        spec=lambda cases, attention_cases, shape: _layout_cases().Schedule(_schedule_requests(shape), "causal"),
        space=dict(block=(128, 256, 512, 1024), sort=(512, 1024, 2048), num_warps=(2, 4, 8, 16)),
        flight=lambda shape, config: 36 * config["block"],
        importance=lambda shape: 2.0 + 0.5 * (shape["candidates"] == shape["rows"]),
    ),
    "layout": Tuned(
        op="fixed_layout",
        call=_layout_call,
        spec=lambda cases, attention_cases, shape: _layout_cases().Fixed(shape["requests"]),
        space=dict(block=(64, 128, 256, 512), num_warps=(1, 2, 4, 8)),
        flight=lambda shape, config: 32 * config["block"],
        importance=lambda shape: 1.0,
    ),
    "plan": Tuned(
        op="plan_attention",
        call=lambda calls, shape: calls.attention_call(shape["requests"], head_dim=None),
        spec=lambda cases, attention_cases, shape: None,
        space=dict(block=(64, 128, 256, 512), num_warps=(2, 4, 8, 16)),
        flight=lambda shape, config: 40 * config["block"],
        importance=lambda shape: 0.5,
    ),
}


# --- configurations ---------------------------------------------------------------------------------------------------


def steps(config: dict, space: dict[str, tuple]) -> list[dict]:
    """Every configuration that differs from `config` in one parameter."""
    return [
        {**config, name: value} for name, values in space.items() for value in values if name in config and value != config[name]
    ]


@dataclasses.dataclass(frozen=True)
class Binary:
    """What a configuration compiles to. spills: bytes of spill code and stack. case: the row of bench/results/compile.csv that
    has it, "" = compiled here."""

    registers: int
    spills: int
    shared: int
    shared_limit: int
    num_warps: int
    triton: str
    case: str = ""

    @classmethod
    def of(cls, row: dict, case: str = "") -> Binary:
        spills = sum(int(row[name]) for name in ("spill_stores", "spill_loads", "stack"))
        numbers = (int(row[name]) for name in ("shared", "shared_limit", "num_warps"))
        return cls(int(row["registers"]), spills, *numbers, row["triton"], case)

    @property
    def runs(self) -> bool:
        return self.spills == 0 and self.shared <= self.shared_limit

    def resident(self, arch: Arch) -> int:
        """Programs of which one multiprocessor can hold the registers, shared memory and warps."""
        if arch.vendor == "amd":
            waves = 4 * min(8, 512 // max(1, self.registers))  # four units of 512 registers a lane
            warps, shared = waves // self.num_warps, arch.shared_memory
        else:
            registers = 32 * self.num_warps * -(-max(1, self.registers) // 8) * 8
            most = 48 if arch.family in ("sm_86", "sm_89", "sm_120") else 64  # CUDA guide, compute capabilities
            warps, shared = min(65536 // registers, most // self.num_warps), arch.shared_memory + 1024
        held = shared // (self.shared + (1024 if arch.vendor == "nvidia" else 0)) if self.shared else warps
        return min(warps, held, 16 if arch.vendor == "amd" else 32)


def predicted(size: int, flight: int, binary: Binary, arch: Arch) -> float:
    """Microseconds for a case of `size` bytes."""
    bandwidth, resident = BANDWIDTH[arch.family], max(1, binary.resident(arch))
    return 1e6 * size / bandwidth * max(1.0, bandwidth * LATENCY / (arch.multiprocessors * resident * flight))


def compiled(kernel: str, shape: dict, config: dict, arch: str) -> Binary:
    """Compile one configuration offline, or find it in the compile report. Needs a process in which kernels are not interpreted."""
    import torch

    from bench import compile, compile_cases  # in this order: compile decides that kernels are not interpreted

    torch.set_num_threads(1)
    with table.trial(kernel, shape, config):
        with compile.capture(arch, False) as launches:
            KERNELS[kernel].call(compile_cases, shape)
        launch = launches[0]  # a form of several launches runs one binary again and again
        key = dict(op=KERNELS[kernel].op, arch=arch, source=launch.source, launch=launch.launch)
        for row in compile.read(compile.REPORT):
            if all(row[name] == value for name, value in key.items()):
                return Binary.of(row, f"{row['op']} {row['case']}")
        compile.CASES = {kernel: {"trial": lambda: KERNELS[kernel].call(compile_cases, shape)}}
        (row,) = compile.rows_of(arch, kernel, True)
    return Binary.of(row)


# --- tables -----------------------------------------------------------------------------------------------------------


def write(path: Path, name: str, entries: Table) -> None:
    """A line per entry, so that a difference shows which one changed."""
    parts = []
    for kernel, found in entries.items():
        lines = ",\n".join("   " + json.dumps(dataclasses.asdict(entry)) for entry in found)
        parts.append(f'  "{kernel}": [\n{lines}\n  ]')
    partial = path.with_name(path.name + ".partial")
    partial.write_text(f'{{\n "gpu": "{name}",\n "entries": {{\n' + ",\n".join(parts) + "\n }\n}\n", encoding="utf-8")
    partial.replace(path)


def replaced(entries: Table, kernel: str, number: int, entry: Entry) -> Table:
    return {
        name: tuple(entry if (name, i) == (kernel, number) else old for i, old in enumerate(found))
        for name, found in entries.items()
    }


def reason(binary: Binary, time: dict | str) -> dict:
    """The measurements that justify an entry."""
    numbers = dataclasses.asdict(binary)
    case = numbers.pop("case")
    return {"compiled": numbers | ({"report": case} if case else {}), "time": time}


def ordered(entries: Table, kernels: Sequence[str]) -> list[tuple[str, int, Entry]]:
    """Entries of these kernels, the most important first."""
    found = [(kernel, number, entry) for kernel in kernels for number, entry in enumerate(entries.get(kernel, ()))]
    return sorted(found, key=lambda item: -KERNELS[item[0]].importance(item[2].shape))


def label(kernel: str, shape: dict) -> str:
    return f"{kernel} " + ", ".join(f"{name} {value}" for name, value in shape.items())


def changes(old: dict, new: dict) -> str:
    return ", ".join(f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name]) or "as it is"


# --- by compiling -----------------------------------------------------------------------------------------------------


def explain(names: Sequence[str], kernels: Sequence[str], folder: Path, submit: Callable, predict: bool) -> int:
    """What every entry compiles to, into the tables; with `predict` what is one step away, too, on the screen."""
    wrong = 0
    for name in names:
        entries, path = table.read(table.FOLDER / f"{name}.json"), folder / f"{name}.json"
        todo = ordered(entries, kernels)
        pending = [(item, submit(item[0], item[2].shape, item[2].config, name)) for item in todo]
        for count, ((kernel, number, entry), future) in enumerate(pending, 1):
            binary = future.result()
            verdict = "no spill" if binary.runs else f"SPILLS OR TOO LARGE: {binary.spills} bytes, {binary.shared} shared"
            wrong += not binary.runs
            print(
                f"[{count}/{len(pending)}] {name} {label(kernel, entry.shape)}: {binary.registers} registers, {binary.shared} of"
                f" {binary.shared_limit} bytes shared, {binary.resident(KNOWN[name])} resident, {verdict}",
                flush=True,
            )
            timed = entry.why.get("time", "not measured")
            entries = replaced(entries, kernel, number, dataclasses.replace(entry, why=reason(binary, timed)))
            write(path, name, entries)
            if predict:
                print("\n".join(ranking(kernel, entry, binary, name, submit)), flush=True)
    print(f"written to {folder}; no times were taken")
    return 1 if wrong else 0


def case_bytes(kernel: str, shape: dict) -> int:
    from bench.shared.cases import attention as attention_cases, registry as kernel_cases

    spec = KERNELS[kernel].spec(kernel_cases, attention_cases, shape)
    return 0 if spec is None else spec.bytes


def ranking(kernel: str, entry: Entry, binary: Binary, name: str, submit: Callable) -> list[str]:
    """Configurations one step away that run, best prediction first, beside the entry's own."""
    tuned, size = KERNELS[kernel], case_bytes(kernel, entry.shape)
    if not size:
        return ["    no case to predict"]
    near = steps(entry.config, tuned.space)
    futures = [submit(kernel, entry.shape, config, name) for config in near]
    found = [(entry.config, binary)] + [(config, future.result()) for config, future in zip(near, futures, strict=True)]
    rated = [(predicted(size, tuned.flight(entry.shape, config), b, KNOWN[name]), b, config) for config, b in found if b.runs]
    lines = [
        f"    predicted {us:9.2f} us {b.registers:4} registers {b.resident(KNOWN[name]):3} resident  {changes(entry.config, c)}"
        for us, b, c in sorted(rated, key=lambda item: item[0])
    ]
    return [*lines, f"    {len(found) - len(rated)} of {len(found)} spill or do not fit"]


# --- by timing --------------------------------------------------------------------------------------------------------


def search(entry: Entry, space: dict, binary_of: Callable, time_of: Callable, rank: Callable, most: int, deadline: float):
    """(best config, its time, the entry's own time, configurations timed).

    binary_of: configs -> their Binary or None; time_of: config -> microseconds or None (red or failed); rank: (config, binary) ->
    predicted time. Steps from the best so far, `most` of them by rank, until none is GAIN faster, ROUNDS times at most.
    """
    own = time_of(entry.config)
    best, least, timed = entry.config, own, 1
    seen = [entry.config]
    for _ in range(ROUNDS):
        near = [config for config in steps(best, space) if config not in seen]
        pairs = [(c, b) for c, b in zip(near, binary_of(near), strict=True) if b is not None and b.runs]
        start = best
        for config, _ in sorted(pairs, key=lambda pair: rank(*pair))[:most]:
            if time.monotonic() > deadline:
                break
            seen.append(config)
            taken = time_of(config)
            timed += 1
            if taken is not None and (least is None or taken < (1 - GAIN) * least):
                best, least = config, taken
        if best == start:
            break
    return best, least, own, timed


def tune(name: str, arch: Arch, kernels: Sequence[str], path: Path, tools, most: int, deadline: float) -> int:
    """Time the entries of this GPU's table, the most important first. tools: submit, timer(kernel, shape, config), facts()."""
    start = table.FOLDER / f"{name}.json"
    entries = table.read(path if path.exists() else start if start.exists() else table.FOLDER / f"{arch.family}.json")
    source = timing.source_digest(tables=False)  # which is what changes here
    todo, left = ordered(entries, kernels), 0
    for count, (kernel, number, entry) in enumerate(todo, 1):
        head, tuned = f"[{count}/{len(todo)}] {label(kernel, entry.shape)}", KERNELS[kernel]
        done = entry.why.get("time")
        if isinstance(done, dict) and done.get("source") == source:
            print(f"{head}: timed before", flush=True)
            continue
        size = case_bytes(kernel, entry.shape)
        if not size:
            print(f"{head}: no case to time", flush=True)
            continue
        if time.monotonic() > deadline:
            left += 1
            print(f"{head}: no time left", flush=True)
            continue

        def binaries(configs, kernel=kernel, shape=entry.shape):
            futures = [tools.submit(kernel, shape, config, arch.family) for config in configs]
            return [_result(future) for future in futures]

        best, least, own, timed = search(
            entry,
            tuned.space,
            binaries,
            lambda config, kernel=kernel, shape=entry.shape: tools.timer(kernel, shape, config),
            lambda config, b, tuned=tuned, shape=entry.shape, size=size: predicted(size, tuned.flight(shape, config), b, arch),
            most,
            deadline,
        )
        if least is None:
            left += 1
            print(f"{head}: no configuration equals the reference, {timed} tried", flush=True)
            continue
        binary = binaries([best])[0]
        record = {"us": round(least, 2), "us_before": None if own is None else round(own, 2), "timed": timed, "source": source}
        why = {"time": record | tools.facts()} if binary is None else reason(binary, record | tools.facts())
        entries = replaced(entries, kernel, number, Entry(entry.shape, best, why))
        write(path, name, entries)
        print(f"{head}: {least:.2f} us, {_us(own)} before, {timed} timed, {changes(entry.config, best)}", flush=True)
    print(f"written to {path}")
    return 1 if left else 0


def _us(value: float | None) -> str:
    return "no time" if value is None else f"{value:.2f} us"


def _result(future) -> Binary | None:
    try:
        return future.result()
    except Exception:  # what does not compile is no candidate
        return None


@dataclasses.dataclass(frozen=True)
class Tools:
    """Of a real GPU."""

    submit: Callable
    bench: object

    def timer(self, kernel: str, shape: dict, config: dict) -> float | None:
        """Median of cold graph replays, None for what differs from the reference or does not run."""
        from bench import kernels
        from bench.shared.cases import attention as attention_cases, registry as kernel_cases

        spec = KERNELS[kernel].spec(kernel_cases, attention_cases, shape)
        with table.trial(kernel, shape, config):
            rows = kernels.run(kernel_cases.Case(KERNELS[kernel].op, "trial", spec), self.bench)
        times = [row.p50_us for row in rows if (row.status, row.call, row.cache) == ("ok", "graph", "cold")]
        if not times:
            print(f"    {config}: {rows[0].status}", flush=True)
        return times[0] if times else None

    def facts(self) -> dict:
        machine = self.bench.machine
        return {name: getattr(machine, name) for name in ("gpu", "driver", "torch", "triton", "commit")}


# --- command ----------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadArgument(message)


def parser() -> argparse.ArgumentParser:
    first, rest = __doc__.split("\n", 1)
    p = _Parser(prog="python -m bench.tune", description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--arch", action="append", choices=KNOWN, help="without timing: tables to explain (repeatable; default: all)")
    p.add_argument("--kernel", action="append", choices=KERNELS, help="only these entries (repeatable; default: all)")
    p.add_argument("--predict", action="store_true", help="without timing: rank what is one step away (minutes per entry)")
    p.add_argument("--compile-only", action="store_true", help="take no times, also where there is a GPU")
    p.add_argument("--most", type=int, default=6, help="configurations timed per entry and round (default: %(default)s)")
    p.add_argument("--seconds", type=float, default=3600.0, help="start no new configuration after (default: %(default)s)")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time (default: %(default)s)")
    p.add_argument("--out", metavar="PATH", help="the table to write on a GPU, else the folder of tables (default: the package's)")
    return p


def pool(jobs: int):
    return concurrent.futures.ProcessPoolExecutor(max(1, jobs), mp_context=multiprocessing.get_context("spawn"))


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 1: an entry spills, or some are left; 2: a bad argument."""
    try:
        arguments = parser().parse_args(argv)
        for option, value in (("--most", arguments.most), ("--jobs", arguments.jobs), ("--seconds", arguments.seconds)):
            if not value > 0:
                raise BadArgument(f"{option}: expected more than 0, got {value:g}")
        import torch

        chosen = arguments.kernel or list(KERNELS)
        with pool(arguments.jobs) as workers:

            def submit(*given):
                return workers.submit(compiled, *given)

            if arguments.compile_only or not torch.cuda.is_available():
                folder = Path(arguments.out) if arguments.out else table.FOLDER
                if not folder.is_dir():
                    raise BadArgument(f"--out: expected a folder that exists, got {arguments.out}")
                return explain(arguments.arch or list(KNOWN), chosen, folder, submit, arguments.predict)
            if arguments.arch or arguments.predict:
                raise BadArgument("--arch, --predict: expected with --compile-only where there is a GPU, which is what is tuned")
            return on_gpu(arguments, chosen, submit)
    except BadArgument as error:
        print(f"bench.tune: {error}", file=sys.stderr)
        return 2


def on_gpu(arguments, chosen: Sequence[str], submit: Callable) -> int:
    import torch

    from bench import kernels
    from dspark_kernels.launch import arch as archs

    deadline = time.monotonic() + arguments.seconds
    device = torch.device("cuda", torch.cuda.current_device())
    arch = archs.current(device)
    path = Path(arguments.out) if arguments.out else table.FOLDER / f"{arch.name}.json"
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise BadArgument(f"--out: expected a file in a folder that exists, got {path}")
    clock, machine = timing.DeviceClock(), timing.machine(device)
    bench = kernels.Bench(
        device=device, clock=clock, machine=machine, bandwidth=timing.copy_bandwidth(clock, device),
        samples=kernels.QUICK_SAMPLES, baselines=(), small=False, capture=timing.graph_of, facts=dict,
    )  # fmt: skip
    print(f"{machine.gpu}, driver {machine.driver}, torch {machine.torch}, Triton {machine.triton}: table {arch.name}")
    return tune(arch.name, arch, chosen, path, Tools(submit, bench), arguments.most, deadline)


if __name__ == "__main__":
    sys.exit(main())
