"""What a step of the engine costs by its size: measured once, kept as a table, read by the prefix scheduler.

    cost(B) = the curve at the smallest captured size >= B,   B <= the largest captured size (a graph runs padded)
            = the line between the two measured sizes around B,   above

Symbols: B rows of the target's step (anchors, prefill rows and admitted drafts); R requests that are drafted for.

Source: "DSpark: Confidence-Scheduled Speculative Decoding with Semi-Autoregressive Generation", arXiv 2607.05147: the
engine's measured steps per second at B tokens; `seconds` is the inverse. The reference for how a table is read is
reference/schedule.py.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checks import Checked, check_device, check_int, check_type

FORMAT = "dspark_kernels cost table"
VERSION = 1
_FIELDS = ("format", "version", "seconds", "draft_seconds", "info")
# What the scheduler counts in: whole units of 100 ns, and how many of them a step may take.
UNITS_PER_SECOND = 1e7
COST_LIMIT = (1 << 24) - 1
_LIMIT = f"at most {COST_LIMIT / UNITS_PER_SECOND:.3f} seconds (2^24 - 1 units of 100 ns, all that the scheduler tells apart)"
# What fp32 holds: outside of it a time would become 0 or infinite in the table.
_LEAST, _MOST = 2.0**-149, torch.finfo(torch.float32).max


@dataclasses.dataclass(frozen=True, eq=False)
class CostTable(Checked):
    """Measured seconds of a step by its size.

    seconds: fp32 [B_max+1], entry B = one target step at B rows. draft_seconds: fp32 [R_max+1] or None, entry R =
    drafting for R requests. Entry 0 is no measurement in either, and nothing depends on it. info: a mapping of plain
    JSON values that says where the table comes from, or None.

    Beyond the table the cost goes on along the line through its last two entries. It goes on flat where that line
    falls, and where entry 1 is the only measurement. Costs, and with them the slope of that line, are whole multiples
    of 100 ns from 1 to 2^24 - 1 (1.678 s), so a table should reach the largest step that the engine runs.

    Raises TypeError or ValueError for another dtype, shape or device, fewer than 2 entries, and, in a table on the
    host, entries from 1 on that are not finite and positive, or above 1.678 s, alone or as the longest step with the
    longest drafting. The entries of a table on a device are not looked at: there a longer time, an infinite one or NaN
    counts as 1.678 s, so that two of them cost the same and the drafts between them nothing.
    """

    seconds: Tensor
    draft_seconds: Tensor | None = None
    info: Mapping[str, Any] | None = None

    def _check(self) -> None:
        rules = dict(dtype=torch.float32, contiguous=True)
        seconds = self._tensor("seconds", shape=("B_max+1",), **rules)
        self._check_entries("seconds", seconds)
        drafting = self._optional("draft_seconds", shape=("R_max+1",), device=seconds.device, **rules)
        if drafting is not None:
            self._check_entries("draft_seconds", drafting)
            self._check_sum(drafting)
        if self.info is not None:
            _check_info(self._name("info"), self.info)

    def _check_entries(self, field: str, table: Tensor) -> None:
        if table.shape[0] < 2:
            raise ValueError(f"{self._name(field)}: expected at least 2 entries, got {table.shape[0]}")
        # A device table cannot be read without a synchronisation; host tables are checked whole.
        if table.device.type == "cpu":
            wrong = (~(table[1:].isfinite() & (table[1:] > 0))).nonzero()
            if len(wrong):
                entry = 1 + int(wrong[0])
                found = f"{table[entry].item()} at entry {entry}"
                raise ValueError(f"{self._name(field)}: expected finite, positive seconds from entry 1 on, got {found}")
            long = _beyond(table[1:]).nonzero()
            if len(long):
                entry = 1 + int(long[0])
                raise ValueError(f"{self._name(field)}: {_too_long(f'{table[entry].item():g} seconds at entry {entry}')}")

    def _check_sum(self, drafts: Tensor) -> None:
        """A step with drafting is cut at the limit too."""
        if self.seconds.device.type == "cpu":
            step, drafting = (table[1:].max().item() for table in (self.seconds, drafts))
            if _beyond(step + drafting):
                found = f"{step:g} seconds for the longest step and {drafting:g} seconds for drafting"
                raise ValueError(f"{self._name('draft_seconds')}: {_too_long(found)}")

    @classmethod
    def from_curve(
        cls,
        sizes: Sequence[int],
        seconds: Sequence[float],
        *,
        draft_sizes: Sequence[int] | None = None,
        draft_seconds: Sequence[float] | None = None,
        captured: Sequence[int] | None = None,
        device: str | torch.device | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> CostTable:
        """A table from times at a few sizes.

        sizes: rows of the measured target steps, strictly increasing, from 1 on; seconds: one time each. draft_sizes,
        draft_seconds: the same for drafting, by requests. captured: rows of the CUDA graphs that the engine holds,
        strictly increasing, none above the last of `sizes`; None or empty = no graphs. All are sequences or
        one-dimensional tensors. device: where the table lies; None = the current CUDA device, or the CPU where there is none. The
        ops take it there, `scheduling` on the CPU; `to` moves it.

        Up to the largest captured size a step costs what the smallest captured size that holds it costs, because the
        engine pads it to that size. That time is the curve's, so measure the captured sizes. Elsewhere, and for
        drafting, the curve is linear between measured sizes and flat below the first. Nothing is smoothed. The table
        ends at the last of `sizes`. If that is a captured size with a gap below it, the table ends flat, and every step
        beyond it looks free: measure one size above the graphs unless the engine never runs such a step.

        Raises TypeError or ValueError that names the argument.
        """
        device = check_device("device", device)
        sizes = _sizes("sizes", sizes)
        captured = _captured(captured, sizes)
        steps = _table(sizes, _times("seconds", seconds, sizes), captured)
        _check_pair("draft_seconds", draft_seconds, "draft_sizes", draft_sizes)
        drafts = None
        if draft_sizes is not None:
            draft_sizes = _sizes("draft_sizes", draft_sizes)
            drafts = _table(draft_sizes, _times("draft_seconds", draft_seconds, draft_sizes))
        return cls(steps, drafts, info).to(device)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON; `load` gives back the same bits. Waits for the device if the table is on one.

        Raises ValueError for a device table with entries that a table on the host may not have, OSError where the file
        cannot be written.
        """
        table = self.to("cpu")  # a new table, so checked whole before anything is written
        content = {
            "format": FORMAT,
            "version": VERSION,
            "seconds": _entries(table.seconds),
            "draft_seconds": None if table.draft_seconds is None else _entries(table.draft_seconds),
            "info": None if table.info is None else dict(table.info),
        }
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | torch.device | None = None) -> CostTable:
        """Read a table that `save` wrote. device: as in `from_curve`.

        Raises FileNotFoundError or another OSError where there is no readable file, ValueError for a file that is not
        such a table, whole and with times that a table may have; each names the file, and the field that is wrong.
        """
        device = check_device("device", device)
        file = Path(path)
        content = _json(file)
        if content.get("format") != FORMAT:
            raise ValueError(f"{file}: format: expected {FORMAT!r}, got {content.get('format')!r}")
        if content.get("version") != VERSION:
            raise ValueError(f"{file}: version: expected {VERSION}, got {content.get('version')!r}")
        for field in _FIELDS:
            if field not in content:
                raise ValueError(f"{file}: {field}: expected this field, found none")
        for field in content:
            if field not in _FIELDS:
                raise ValueError(f"{file}: {field}: expected the fields {', '.join(_FIELDS)} alone")
        seconds = _read_entries(f"{file}: seconds", content["seconds"])
        drafts = None if content["draft_seconds"] is None else _read_entries(f"{file}: draft_seconds", content["draft_seconds"])
        try:
            table = cls(seconds, drafts, content["info"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from None
        return table.to(device)


def measure(
    step: Callable[[int], object],
    sizes: Sequence[int],
    *,
    draft_step: Callable[[int], object] | None = None,
    draft_sizes: Sequence[int] | None = None,
    captured: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    warmup: int = 3,
    repeats: int = 20,
    progress: Callable[[int, int], object] | None = None,
) -> CostTable:
    """Time a step function over sizes; the table is on the CPU (`to` moves it).

    step(n) runs one target step of n rows; draft_step(n) drafts for n requests. sizes, draft_sizes, captured: as in
    `CostTable.from_curve`. device: whose time counts, a CUDA device or "cpu"; None = the current CUDA device, or the CPU
    where there is none. warmup: calls per size that are not counted, all of them before the first that is; repeats:
    calls per size that are counted, their median is the entry. progress(done, total) is called after every call.

    On a CUDA device a call is timed by two events on the current stream and starts on an idle device; work that the step
    puts on other streams counts if the current stream waits for it. Elsewhere by time.perf_counter.

    Repeats are interleaved: a round runs every size once, and rounds run up and down the sizes in turn. A machine that
    slows down steadily as it warms then adds the same to every size (exactly so for an even number of repeats). Size by
    size it would put the drift into the slope, which is what the scheduler reads. The median drops what other processes
    do now and then.

    info: device, torch, triton (None where it is not installed), python, date (UTC), clock ("cuda events" or
    "perf_counter"), warmup, repeats, captured (a list, empty without graphs), and lists with one entry per size: sizes,
    and in seconds medians, p20, p80; with draft_step also draft_sizes, draft_medians, draft_p20, draft_p80.

    Raises TypeError or ValueError that names the argument, before the first call; ValueError where a median is not
    above 0, or above what a table may hold. Errors of the step functions pass through.
    """
    sizes = _sizes("sizes", sizes)
    captured = _captured(captured, sizes)
    _check_callable("step", step)
    _check_pair("draft_sizes", draft_sizes, "draft_step", draft_step)
    kinds = {"": (step, sizes)}
    if draft_step is not None:
        _check_callable("draft_step", draft_step)
        kinds["draft_"] = (draft_step, _sizes("draft_sizes", draft_sizes))
    check_int("warmup", warmup, low=0)
    check_int("repeats", repeats, low=1)
    if progress is not None:
        _check_callable("progress", progress)
    device = _device(device)
    on_cuda = device.type == "cuda"

    jobs = [(kind, call, n) for kind, (call, at) in kinds.items() for n in at]
    warm = [job for job in jobs for _ in range(warmup)]
    counted = [job for number in range(repeats) for job in (reversed(jobs) if number % 2 else jobs)]
    timed = _cuda_seconds if on_cuda else _wall_seconds
    times: dict[tuple[str, int], list[float]] = {(kind, n): [] for kind, _, n in jobs}
    with torch.cuda.device(device) if on_cuda else contextlib.nullcontext():
        for done, (kind, call, n) in enumerate(warm + counted):
            seconds = timed(call, n)
            if done >= len(warm):
                times[kind, n].append(seconds)
            if progress is not None:
                progress(done + 1, len(warm) + len(counted))

    info: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if on_cuda else _host(),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "clock": "cuda events" if on_cuda else "perf_counter",
        "warmup": warmup,
        "repeats": repeats,
        "captured": captured,
    }
    for kind, (_, at) in kinds.items():
        info |= _statistics(kind, at, [times[kind, n] for n in at])
    drafts = info.get("draft_sizes"), info.get("draft_medians")
    return CostTable.from_curve(
        sizes, info["medians"], draft_sizes=drafts[0], draft_seconds=drafts[1], captured=captured, device="cpu", info=info
    )


def _wall_seconds(call: Callable[[int], object], n: int) -> float:
    start = time.perf_counter()
    call(n)
    return time.perf_counter() - start


def _cuda_seconds(call: Callable[[int], object], n: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call(n)
    end.record()
    # After every call: launches that queue up behind the step before would hide how long they take.
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


def _statistics(kind: str, sizes: list[int], times: list[list[float]]) -> dict[str, list[float]]:
    """Medians and quantiles of each size, in seconds, under the names that `measure` documents."""
    points = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64, device="cpu")
    low, median, high = torch.tensor(times, dtype=torch.float64, device="cpu").quantile(points, dim=1).tolist()
    for n, seconds in zip(sizes, median, strict=True):
        if not seconds > 0:
            raise ValueError(f"{kind}step: expected a step that takes time, got a median of {seconds} s at size {n}")
        if _beyond(seconds):
            raise ValueError(f"{kind}step: expected a step of {_LIMIT}, got a median of {seconds:g} s at size {n}")
    return {f"{kind}sizes": sizes, f"{kind}medians": median, f"{kind}p20": low, f"{kind}p80": high}


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return check_device("device", None)
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected a CUDA device or 'cpu', got {device!r} ({error})") from None
    # Any other device works behind the host's back, and neither clock would see it.
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"device: expected a CUDA device or 'cpu', got {str(device)!r}")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device: expected one of the {count} CUDA devices that torch sees, or 'cpu', got {str(device)!r}")
    return device


def _host() -> str:
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


def _version(package: str) -> str | None:
    # From the installed files: importing Triton only to ask for its version would be dear, and may fail.
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _table(sizes: list[int], seconds: list[float], captured: Sequence[int] = ()) -> Tensor:
    """The curve at 0, 1, ..., sizes[-1] as fp32, entry 0 = 0."""
    limit = captured[-1] if captured else 0

    def at(rows: int) -> float:
        if rows <= limit:
            rows = captured[bisect.bisect_left(captured, rows)]
        right = bisect.bisect_left(sizes, rows)
        if right == 0 or sizes[right] == rows:
            return seconds[right]
        left = right - 1
        share = (rows - sizes[left]) / (sizes[right] - sizes[left])
        # In this form a flat stretch is exactly flat, and so is the table there.
        return seconds[left] + share * (seconds[right] - seconds[left])

    return torch.tensor([0.0, *map(at, range(1, sizes[-1] + 1))], dtype=torch.float32, device="cpu")


def _as_list(name: str, values: object) -> list[Any]:
    if isinstance(values, Tensor):
        values = values.tolist()
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes, Mapping)):
        raise TypeError(f"{name}: expected a sequence of numbers, got {type(values).__name__}")
    return list(values)


def _sizes(name: str, values: object, allow_empty: bool = False) -> list[int]:
    sizes = _as_list(name, values)
    if not sizes and not allow_empty:
        raise ValueError(f"{name}: expected at least one size, got none")
    last = 0
    for i, size in enumerate(sizes):
        check_int(f"{name}[{i}]", size, low=1)
        if size <= last:
            raise ValueError(f"{name}[{i}]: expected more than {last}, the size before it, got {size}")
        last = size
    return sizes


def _captured(captured: object, sizes: list[int]) -> list[int]:
    captured = [] if captured is None else _sizes("captured", captured, allow_empty=True)
    if captured and captured[-1] > sizes[-1]:
        raise ValueError(f"captured: expected sizes up to {sizes[-1]}, the last measured one, got {captured[-1]}")
    return captured


def _times(name: str, values: object, sizes: list[int]) -> list[float]:
    times = _as_list(name, values)
    if len(times) != len(sizes):
        raise ValueError(f"{name}: expected {len(sizes)} times, one per size, got {len(times)}")
    _check_times(name, times)
    return times


def _check_times(name: str, times: list[Any], first: int = 0) -> None:
    for i, value in enumerate(times[first:], start=first):
        # Written so that NaN fails; integers of any length compare without an overflow.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not _LEAST <= value <= _MOST:
            raise ValueError(f"{name}[{i}]: expected finite, positive seconds (fp32), got {value!r}")
        if _beyond(value):
            raise ValueError(f"{name}[{i}]: {_too_long(f'{value:g} seconds')}")


def _beyond(seconds: Any) -> Any:
    """Whether a number, or each of a tensor, rounds to more units than there are."""
    return seconds * UNITS_PER_SECOND >= COST_LIMIT + 0.5


def _too_long(found: str) -> str:
    return f"expected {_LIMIT}, got {found}; did you give milliseconds?"


def _check_pair(name: str, value: object, other: str, value_of_other: object) -> None:
    if (value is None) != (value_of_other is None):
        missing, given = (name, other) if value is None else (other, name)
        raise ValueError(f"{missing}: expected together with {given}, got None")


def _check_callable(name: str, value: object) -> None:
    if not callable(value):
        raise TypeError(f"{name}: expected a function, got {type(value).__name__}")


def _check_info(name: str, info: Mapping[str, Any]) -> None:
    check_type(name, info, Mapping)
    try:
        kept = json.loads(json.dumps(dict(info), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name}: expected plain JSON values ({error})") from None
    # Tuples and keys that are not strings would come back as something else.
    if kept != dict(info):
        raise ValueError(f"{name}: expected plain JSON values (lists, objects with string keys), got {dict(info)!r}")


def _entries(table: Tensor) -> list[float | None]:
    """Every entry as the double of the same value; entry 0 may be anything, and JSON has no NaN or infinity."""
    first, *rest = table.tolist()
    return [first if abs(first) <= _MOST else None, *rest]


def _read_entries(name: str, entries: object) -> Tensor:
    if not isinstance(entries, list):
        raise ValueError(f"{name}: expected a list, got {type(entries).__name__}")
    if len(entries) < 2:
        raise ValueError(f"{name}: expected at least 2 entries, got {len(entries)}")
    _check_times(name, entries, first=1)
    zeroth, *rest = entries
    if zeroth is None:
        zeroth = float("nan")
    elif isinstance(zeroth, bool) or not isinstance(zeroth, (int, float)) or not abs(zeroth) <= _MOST:
        raise ValueError(f"{name}[0]: expected a finite number or null, got {zeroth!r}")
    return torch.tensor([zeroth, *rest], dtype=torch.float32, device="cpu")


def _json(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected JSON, got a file that does not parse ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content
