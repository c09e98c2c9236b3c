"""How kernels are timed: device events around replays of CUDA graphs and around eager calls, cold and warm.

    cold: several sets of inputs take turns, and what they leave of FLUSH caches is read in between
    warm: one set of inputs, nothing in between
    graph: the device is kept busy until the host has queued the replay, so that the device's time alone is seen
    eager: the host starts from an idle device, so that its own time per call is seen, too

Times are microseconds, sizes bytes. The floor of a call is the bytes it must move once over the bandwidth of a large device copy,
measured in the same run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
from collections.abc import Callable, Sequence

import torch

from bench.shared.paths import ROOT
from dspark_kernels.env import smi

FLUSH = 4  # L2 sizes of other memory between two uses of an input
WARMUP = 3
_BUSY_CYCLES = 150_000  # of the device, some 80 us: longer than the host takes to queue a replay


@dataclasses.dataclass(frozen=True)
class Timing:
    """Percentiles of samples, in microseconds."""

    p20: float
    p50: float
    p80: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """Between two samples a percentile is on the line through them."""
        if not samples:
            raise ValueError("samples: expected at least one, got none")
        ordered = sorted(samples)

        def percentile(share):
            at = share * (len(ordered) - 1)
            low = int(at)
            high = min(low + 1, len(ordered) - 1)
            return ordered[low] + (at - low) * (ordered[high] - ordered[low])

        return cls(percentile(0.2), percentile(0.5), percentile(0.8), len(ordered))


class DeviceClock:
    """The clock of a CUDA or HIP device: marks in its current stream."""

    def mark(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def microseconds(self, start, end) -> float:
        return 1e3 * start.elapsed_time(end)

    def wait(self) -> None:
        torch.cuda.synchronize()

    def busy(self) -> None:
        torch.cuda._sleep(_BUSY_CYCLES)


class Flush:
    """Evicts `size` bytes from the cache by reading; written lines would have to be written back during later work."""

    def __init__(self, size: int, device):
        self._buffer = torch.randn(size // 4, device=device) if size >= 4 else None
        self._sink = torch.empty((), device=device)

    def __call__(self) -> None:
        if self._buffer is not None:
            torch.sum(self._buffer, dim=0, out=self._sink)


def measure(calls: Sequence[Callable], clock, *, count: int, queued: bool, before: Callable | None = None) -> Timing:
    """Time `count` calls, the given ones in turn.

    queued: the device is busy while the host gets ahead; otherwise every call starts from an idle device. before: runs, not timed,
    before each call.
    """
    for i in range(max(WARMUP, len(calls))):
        calls[i % len(calls)]()
    clock.wait()
    marks = []
    for i in range(count):
        if before is not None:
            before()
        if queued:
            clock.busy()
        else:
            clock.wait()
        start = clock.mark()
        calls[i % len(calls)]()
        marks.append((start, clock.mark()))
    clock.wait()
    return Timing.of([clock.microseconds(*pair) for pair in marks])


def input_sets(set_bytes: int, l2_bytes: int, most: int = 8) -> tuple[int, int]:
    """(sets of inputs that take turns, bytes to read in between) so that FLUSH caches pass between two uses of a set."""
    wanted = FLUSH * l2_bytes
    sets = min(most, max(2, 1 + -(-wanted // max(1, set_bytes))))
    return sets, max(0, wanted - (sets - 1) * set_bytes)


def graph_of(call: Callable) -> Callable:
    """Capture a call in a CUDA graph; the replay. What the call returns is `replay.result`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, allocates and picks algorithms outside the capture
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay():
        graph.replay()

    replay.result = result
    return replay


def copy_bandwidth(clock, device, count: int = 20) -> float:
    """Bytes per second of a device-to-device copy of random data, bytes read and bytes written together."""
    free, _ = torch.cuda.mem_get_info(device)
    numbers = min(2**31, free // 4) // 4
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    timing = measure([lambda: target.copy_(source)], clock, count=count, queued=True)
    return 2 * source.nbytes / (1e-6 * timing.p50)


# --- what a result is a result of -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Machine:
    """Facts that stand beside every time. Clocks in MHz, as nvidia-smi gives them right after work; "" = not known."""

    gpu: str
    driver: str
    torch: str
    triton: str
    commit: str
    multiprocessors: int = 0
    lanes: int = 0  # fp32 instructions a multiprocessor issues per clock (CUDA guide, throughput of instructions), 0 = not known
    l2_bytes: int = 0
    sm_clock: str = ""
    memory_clock: str = ""
    max_sm_clock: str = ""

    @property
    def lanes_per_second(self) -> float | None:
        """fp32 instructions a second at the highest clock."""
        if not self.max_sm_clock or not self.lanes:
            return None
        return self.lanes * self.multiprocessors * 1e6 * float(self.max_sm_clock)


def commit() -> str:
    """The commit, "+" where the tree differs from it; where there is no git, a digest of the package's source."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        if done.returncode == 0:
            return done.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        pass
    return "source " + source_digest()


def source_digest(tables: bool = True) -> str:
    """Digest of the Python source that results depend on, and of the launch tables."""
    digest = hashlib.sha256()
    for folder in ("dspark_kernels", "reference", "bench", "tests"):
        paths = [*(ROOT / folder).rglob("*.py")]
        if folder == "dspark_kernels" and tables:
            paths += (ROOT / folder / "launch" / "tables").glob("*.json")
        for path in sorted(paths):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


def machine(device) -> Machine:
    """Facts about this machine's GPU. Clocks are read as they are now, so ask right after work."""
    properties = torch.cuda.get_device_properties(device)
    driver, sm, memory, max_sm = smi("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm")
    return Machine(
        gpu=torch.cuda.get_device_name(device),
        driver=driver,
        torch=torch.__version__,
        triton=triton_version(),
        commit=commit(),
        multiprocessors=properties.multi_processor_count,
        lanes=0 if torch.version.hip else 64 if (properties.major, properties.minor) == (8, 0) else 128,
        l2_bytes=getattr(properties, "L2_cache_size", 0) or 64 * 2**20,
        sm_clock=sm,
        memory_clock=memory,
        max_sm_clock=max_sm,
    )
