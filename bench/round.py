"""Time a whole decoding round of this package in one CUDA graph, and say how much of an engine's round that is.

    draft_block -> schedule_prefixes -> plan_attention -> tree_attention (L layers) -> accept_chain

    python -m bench.round                                        R = 1, 8, 64, 256 requests; sizes of Qwen3-4B and its drafter
    python -m bench.round --backbone-ms 0.8 --target-ms 3.1      with an engine's measured times beside the ops
    python -m bench.round --target-bytes 16e9                    or with the bytes of its weights

With a GPU: every op alone in a graph and all of them in one, inputs cold, medians of replays, written to
bench/results/round-<gpu>.csv. Before, a small round equals the reference on the GPU, and what the graph writes at full size
equals, bit by bit, what the calls one by one write. Without a GPU small rounds are compared with the reference in Triton's
interpreter, and no times are taken. The column "predicted" is always there: bytes that must move once over the bandwidth.

A round of the engine = backbone + target without its attention + these ops. Times of the models that are not given are MODELLED
(bench/roofline.py): weights over bandwidth or products over flops, whichever is longer; every draft is verified. `share` is an
op's part of that round. If all ops took no time, the round would be 1 / (1 - share) times as fast: nobody can gain more here.

Inputs are random, so fewer drafts are accepted than in practice, and acceptance draws more corrections. Layers whose caches fit
into the GPU's cache take turns over several.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import dspark_kernels as dk
from bench import kernels
from bench.kernels import BadArgument
from bench.shared import roofline, timing

OPS = ("draft_block", "schedule_prefixes", "plan_attention", "tree_attention", "accept_chain")
DECISIONS = ("draft_block", "schedule_prefixes", "accept_chain")
REQUESTS = (1, 8, 64, 256)
PAGE = 16
SUM, GRAPH = "sum of the ops", "one graph"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a round: Qwen3-4B with its published drafter."""

    requests: int
    context: int = 2048
    layers: int = 36
    drafts: int = 7
    vocab: int = 151936
    rank: int = 256
    hidden: int = 2560
    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def rows(self) -> int:
        return self.requests * (self.drafts + 1)

    def small(self) -> Sizes:
        few = dict(requests=min(self.requests, 3), context=min(self.context, 40), layers=min(self.layers, 2), drafts=3)
        return dataclasses.replace(self, **few, vocab=700, rank=16, hidden=24, query_heads=4, kv_heads=2, head_dim=32)

    def bytes(self) -> dict[str, int]:
        """op -> what must move once, all layers together; counted by the cases of bench.kernels, with all drafts verified."""
        from bench.shared.cases.accept import Accept
        from bench.shared.cases.attention import Attention
        from bench.shared.cases.draft import Draft
        from bench.shared.cases.layout import Schedule

        model = dict(drafts=self.drafts, vocab=self.vocab)
        heads = dict(query_heads=self.query_heads, kv_heads=self.kv_heads, head_dim=self.head_dim)
        layer = Attention(self.requests, self.context, self.drafts + 1, **heads).bytes
        return {
            "draft_block": Draft(self.requests, rank=self.rank, hidden=self.hidden, **model).bytes,
            "schedule_prefixes": Schedule(self.requests, "causal", self.drafts).bytes,
            "plan_attention": 4 * (2 * self.requests + 1),  # starts of rows and lengths; the table is short
            "tree_attention": self.layers * layer,
            "accept_chain": Accept(self.requests, **model).bytes,
        }

    def launches(self, op: str) -> int:
        return self.layers if op == "tree_attention" else 1


# --- a round ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Given:
    """Inputs. caches: of layers, in turn. next_anchors, next_positions: copies that acceptance moves on."""

    base_logits: Tensor
    anchors: Tensor
    positions: Tensor
    head: dk.MarkovHead
    hidden: Tensor
    confidence: dk.ConfidenceHead
    sampling: dk.SamplingTensors
    cost: dk.CostTable
    caches: list[dk.PagedKV]
    q: Tensor
    k_new: Tensor
    v_new: Tensor
    target_logits: Tensor
    next_anchors: Tensor
    next_positions: Tensor
    slots: Tensor

    def again(self) -> None:
        """Acceptance starts from the same anchors."""
        self.next_anchors.copy_(self.anchors)
        self.next_positions.copy_(self.positions)


def make(sizes: Sizes, device, l2_bytes: int = 0, seed: int = 0) -> Given:
    """Random inputs in bf16, made on the device."""
    g = torch.Generator(device).manual_seed(seed)
    requests, drafts, vocab = sizes.requests, sizes.drafts, sizes.vocab

    def normal(*shape, scale=1.0, dtype=torch.bfloat16):
        return torch.randn(*shape, generator=g, device=device, dtype=torch.float32).mul_(scale).to(dtype)

    pages = -(-(sizes.context + drafts + 1) // PAGE)
    cache = (requests * pages, PAGE, sizes.kv_heads, sizes.head_dim)
    tables = torch.randperm(requests * pages, generator=g, device=device).int().view(requests, pages)
    lengths = torch.full((requests,), sizes.context, device=device)
    cached = 2 * 2 * requests * pages * PAGE * sizes.kv_heads * sizes.head_dim
    count = min(sizes.layers, max(1, -(-timing.FLUSH * l2_bytes // cached)))
    # Costs rise so that most drafts pay and unlikely ones do not.
    seconds = 2e-3 + 2e-3 / sizes.rows * torch.arange(sizes.rows + 1.0, device=device)
    anchors = torch.randint(0, vocab, (requests,), generator=g, device=device)
    return Given(
        base_logits=normal(requests, drafts, vocab, scale=2.0),
        anchors=anchors,
        positions=lengths,
        head=dk.MarkovHead(normal(vocab, sizes.rank), normal(vocab, sizes.rank, scale=sizes.rank**-0.5)),
        hidden=normal(requests, drafts, sizes.hidden),
        confidence=dk.ConfidenceHead(normal(sizes.hidden + sizes.rank, scale=(sizes.hidden + sizes.rank) ** -0.5), normal(1) + 1.5),
        sampling=dk.SamplingTensors(
            torch.ones(requests, device=device), torch.randint(0, 2**62, (requests,), generator=g, device=device)
        ),
        cost=dk.CostTable(seconds, torch.full((requests + 1,), 5e-4, device=device)),
        caches=[dk.PagedKV(normal(*cache), normal(*cache), tables, lengths) for _ in range(count)],
        q=normal(sizes.rows, sizes.query_heads, sizes.head_dim),
        k_new=normal(sizes.rows, sizes.kv_heads, sizes.head_dim),
        v_new=normal(sizes.rows, sizes.kv_heads, sizes.head_dim),
        target_logits=normal(sizes.rows, vocab, scale=2.0),
        next_anchors=anchors.clone(),
        next_positions=lengths.clone(),
        slots=torch.arange(requests, dtype=torch.int32, device=device),
    )


class Round:
    """The ops of a round, each a method without arguments that leaves its result in `results`.

    into: results of another round to write to, None = new ones every time.
    """

    def __init__(self, ops, sizes: Sizes, given: Given, into: dict | None = None, workspace: dk.Workspace | None = None):
        self._ops, self._sizes, self._given, self._into, self._workspace = ops, sizes, given, into, workspace
        self.results: dict = {}

    def __call__(self) -> None:
        for op in OPS:
            getattr(self, op)()

    def _out(self, name: str) -> dict:
        return {} if self._into is None else dict(out=self._into[name], workspace=self._workspace)

    def draft_block(self) -> None:
        g = self._given
        self.results["draft_block"] = self._ops.draft_block(
            g.base_logits, g.anchors, g.head, anchor_positions=g.positions, sampling=g.sampling, hidden=g.hidden,
            confidence=g.confidence, state_indices=g.slots, **self._out("draft_block"),
        )  # fmt: skip

    def schedule_prefixes(self) -> None:
        g = self._given
        self.results["schedule_prefixes"] = self._ops.schedule_prefixes(
            self.results["draft_block"], g.cost, anchors=g.anchors, anchor_positions=g.positions,
            block_tables=g.caches[0].block_tables, page_size=PAGE, state_indices=g.slots, **self._out("schedule_prefixes"),
        )  # fmt: skip

    def plan_attention(self) -> None:
        g = self._given
        self.results["plan_attention"] = self._ops.plan_attention(
            self.results["schedule_prefixes"], g.caches[0], query_heads=self._sizes.query_heads, state_indices=g.slots,
            **self._out("plan_attention"),
        )  # fmt: skip

    def tree_attention(self) -> None:
        g = self._given
        for layer in range(self._sizes.layers):
            self.results["tree_attention"] = self._ops.tree_attention(
                g.q, g.caches[layer % len(g.caches)], self.results["schedule_prefixes"], k_new=g.k_new, v_new=g.v_new,
                plan=self.results["plan_attention"], state_indices=g.slots, **self._out("tree_attention"),
            )  # fmt: skip

    def accept_chain(self) -> None:
        g = self._given
        self.results["accept_chain"] = self._ops.accept_chain(
            g.target_logits, self.results["schedule_prefixes"], self.results["draft_block"].proposal, sampling=g.sampling,
            anchors=g.next_anchors, anchor_positions=g.next_positions, state_indices=g.slots, **self._out("accept_chain"),
        )  # fmt: skip


def workspace_of(sizes: Sizes, device) -> dk.Workspace:
    heads = dict(query_heads=sizes.query_heads, kv_heads=sizes.kv_heads, head_dim=sizes.head_dim)
    return dk.Workspace(sizes.requests, sizes.drafts, sizes.vocab, device, **heads)


def into_memory(ops, sizes: Sizes, given: Given) -> tuple[Round, dict]:
    """(a round that writes to memory of its own and allocates nothing, what it must write)."""
    from bench.shared.cases.tensors import mapped, poison

    given.again()
    first = Round(ops, sizes, given)
    first()
    into = {name: mapped(result, torch.clone) for name, result in first.results.items()}
    poison(into)
    return Round(ops, sizes, given, into, workspace_of(sizes, given.anchors.device)), first.results


def same(round: Round, want: dict, call: Callable, given: Given) -> None:
    """Run once more. Raises AssertionError unless every result is the wanted one's, bit by bit."""
    from bench.shared.cases.checks import require
    from bench.shared.cases.tensors import same as equal

    given.again()
    call()
    for op in OPS:
        require(equal(round.results[op], want[op]), f"{op}: a round into given memory writes something else")


def check(sizes: Sizes, device, ops=None) -> int:
    """Comparisons made: every op of a round with the reference, then a round into given memory with that one, bit by bit."""
    from bench.shared.parity import CheckedOps

    given = make(sizes, device)
    checked = CheckedOps(ops or dk)
    Round(checked, sizes, given)()
    again, want = into_memory(ops or dk, sizes, given)
    same(again, want, again, given)
    return checked.calls


# --- times ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the report. op: one of OPS, SUM or GRAPH. Times in microseconds, None where none was taken."""

    requests: int
    context: int
    layers: int
    drafts: int
    op: str
    launches: int
    bytes: int
    predicted_us: float
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    samples: int = 0
    backbone_ms: float = 0.0
    target_ms: float = 0.0
    share_of_round: float = 0.0  # of times where they were taken, else of predictions
    copy_gb_per_s: float | None = None
    gpu: str = ""
    driver: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


@dataclasses.dataclass(frozen=True)
class Engine:
    """The models' times, milliseconds or None = modelled from parameters (a number takes 2 bytes)."""

    backbone_ms: float | None
    target_ms: float | None
    backbone_parameters: float
    target_parameters: float

    def times(self, sizes: Sizes, bandwidth: float) -> tuple[float, float]:
        """(backbone, target) in milliseconds."""

        def products(parameters, rows):
            return 1e3 * max(2 * parameters / bandwidth, 2 * parameters * rows / roofline.Machine().flops)

        backbone = products(self.backbone_parameters, sizes.requests * sizes.drafts)
        target = products(self.target_parameters, sizes.rows)
        return (
            backbone if self.backbone_ms is None else self.backbone_ms,
            target if self.target_ms is None else self.target_ms,
        )

    def words(self) -> str:
        given = [name for name in ("backbone", "target") if getattr(self, f"{name}_ms") is not None]
        modelled = [
            f"{name} MODELLED from {getattr(self, f'{name}_parameters'):.3g} parameters"
            for name in ("backbone", "target")
            if name not in given
        ]
        return "models: " + ", ".join([f"{name} as given" for name in given] + modelled)


def predicted(sizes: Sizes, bandwidth: float, engine: Engine) -> list[Row]:
    """Rows without times: all ops, then their sum."""
    size = sizes.bytes()
    backbone, target = engine.times(sizes, bandwidth)
    size[SUM] = sum(size.values())
    launches = {op: sizes.launches(op) for op in OPS}
    launches[SUM] = sum(launches.values())
    whole = 1e6 * size[SUM] / bandwidth + 1e3 * (backbone + target)
    return [
        Row(
            sizes.requests, sizes.context, sizes.layers, sizes.drafts, op, launches[op], size[op], 1e6 * size[op] / bandwidth,
            backbone_ms=backbone, target_ms=target, share_of_round=1e6 * size[op] / bandwidth / whole,
        )
        for op in size
    ]  # fmt: skip


def timed(rows: Sequence[Row], taken: dict[str, timing.Timing], facts: dict) -> list[Row]:
    """The rows with times of the ops and of the graph of all; shares of the round that the graph makes."""
    total, last = sum(taken[op].p50 for op in OPS), rows[-1]
    whole = taken[GRAPH].p50 + 1e3 * (last.backbone_ms + last.target_ms)
    found = []
    for row in [*rows, dataclasses.replace(last, op=GRAPH)]:
        if row.op == SUM:
            values = dict(p50_us=total, share_of_round=total / whole)
        else:
            own = taken[row.op]
            values = dict(p20_us=own.p20, p50_us=own.p50, p80_us=own.p80, samples=own.samples, share_of_round=own.p50 / whole)
        found.append(dataclasses.replace(row, **values, **facts))
    return found


def measure(sizes: Sizes, bench: kernels.Bench) -> dict[str, timing.Timing]:
    """Every op alone and all of them in one graph, inputs cold. Raises AssertionError where results differ."""
    given = make(sizes, bench.device, bench.machine.l2_bytes)
    round, want = into_memory(dk, sizes, given)
    flush = timing.Flush(timing.FLUSH * bench.machine.l2_bytes, bench.device)
    with torch.no_grad():
        replay = bench.capture(round)
        from bench.shared.cases.tensors import poison

        poison(round.results)
        same(round, want, replay, given)
        taken = {}
        for op in (*OPS, GRAPH):
            call = replay if op == GRAPH else bench.capture(getattr(round, op))
            taken[op] = timing.measure([call], bench.clock, count=bench.samples, queued=True, before=flush)
    return taken


# --- report -----------------------------------------------------------------------------------------------------------


def _time(value: float | None) -> str:
    return "-".rjust(10) if value is None else f"{value:10.1f}"


def _faster(share: float) -> str:
    return f"{1 / max(1e-9, 1 - share):.2f}"


def lines(rows: Sequence[Row]) -> list[str]:
    """The rows of one batch size for the screen."""
    first, last = rows[0], rows[-1]
    text = [
        f"R = {first.requests}, K = {first.drafts}, {first.context} tokens of context, {first.layers} layers".ljust(44)
        + "".join(name.rjust(10) for name in ("launches", "MB", "predicted", "p20", "median", "p80", "share"))
    ]
    for row in rows:
        times = "".join(_time(value) for value in (row.predicted_us, row.p20_us, row.p50_us, row.p80_us))
        text.append(f"  {row.op.ljust(50)}{row.launches:10}{row.bytes / 1e6:10.2f}{times}{row.share_of_round:10.1%}")
    basis = "predicted" if last.p50_us is None else "measured"
    few = sum(row.share_of_round for row in rows if row.op in DECISIONS)
    text.append(
        f"  backbone {last.backbone_ms:.2f} ms, target without attention {last.target_ms:.2f} ms. Of a round ({basis}):"
        f" {last.share_of_round:.1%} all ops, {few:.1%} drafting, scheduling and acceptance;"
    )
    text.append(
        f"  the most there is to gain: {_faster(last.share_of_round)} times as fast if no op took time,"
        f" {_faster(few)} if attention alone did"
    )
    return text


def write(path: Path, rows: Sequence[Row]) -> None:
    """Replace the rows of the same sizes, keep the others."""
    done = {(str(row.requests), str(row.context), str(row.layers)) for row in rows}
    kept = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            kept = [row for row in csv.DictReader(file) if (row["requests"], row["context"], row["layers"]) not in done]
    new = [{name: kernels._cell(getattr(row, name)) for name in COLUMNS} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept + new)
    partial.replace(path)


# --- command ----------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadArgument(message)


def parser() -> argparse.ArgumentParser:
    first, rest = __doc__.split("\n", 1)
    p = _Parser(prog="python -m bench.round", description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--requests", metavar="R[,R]", default=",".join(map(str, REQUESTS)), help="default: %(default)s")
    p.add_argument("--context", type=int, metavar="TOKENS", default=2048, help="of every request (default: %(default)s)")
    p.add_argument("--layers", type=int, default=36, help="of the target (default: %(default)s)")
    p.add_argument("--backbone-ms", type=float, metavar="MS", help="measured time of the drafter's backbone")
    p.add_argument("--target-ms", type=float, metavar="MS", help="measured time of the target's pass without its attention")
    model = roofline.Decoder()
    p.add_argument(
        "--backbone-bytes", type=float, metavar="N", default=2.0 * model.draft_parameters,
        help="of its weights in bf16, where its time is not given (default: %(default)g)",
    )  # fmt: skip
    p.add_argument(
        "--target-bytes", type=float, metavar="N", default=2.0 * model.parameters,
        help="the same of the target (default: %(default)g)",
    )  # fmt: skip
    p.add_argument(
        "--bandwidth", type=float, metavar="GB/S", default=roofline.Machine().bytes_per_second / 1e9,
        help="for predictions without a GPU (default: %(default)g, a copy on an H200); with one it is measured",
    )  # fmt: skip
    p.add_argument("--quick", action="store_true", help=f"{kernels.QUICK_SAMPLES} samples instead of {kernels.SAMPLES}")
    p.add_argument("--out", metavar="FILE", help="the CSV file (default: bench/results/round-<gpu>.csv)")
    return p


def sizes_of(arguments) -> list[Sizes]:
    """Raises BadArgument."""
    try:
        requests = [int(part) for part in arguments.requests.split(",")]
    except ValueError:
        raise BadArgument(f"--requests: expected whole numbers with commas between them, got {arguments.requests!r}") from None
    if min(requests) < 1 or max(requests) > 1024:
        raise BadArgument(f"--requests: expected numbers from 1 to 1024, got {arguments.requests}")
    for option in ("context", "layers"):
        if getattr(arguments, option) < 1:
            raise BadArgument(f"--{option}: expected at least 1, got {getattr(arguments, option)}")
    for option in ("backbone_ms", "target_ms", "backbone_bytes", "target_bytes", "bandwidth"):
        value = getattr(arguments, option)
        if value is not None and not 0 < value < float("inf"):
            raise BadArgument(f"--{option.replace('_', '-')}: expected a number above 0, got {value:g}")
    return [Sizes(n, arguments.context, arguments.layers) for n in requests]


def on_host(sizes: Sequence[Sizes], engine: Engine, bandwidth: float) -> int:
    """Predictions, and small rounds against the reference."""
    print(f"MODELLED, not measured: bytes at {bandwidth / 1e9:g} GB/s, microseconds. {engine.words()}\n")
    for size in sizes:
        print("\n".join(lines(predicted(size, bandwidth, engine))) + "\n", flush=True)
    wrong, small = 0, list(dict.fromkeys(size.small() for size in sizes))
    for number, size in enumerate(small, 1):
        try:
            verdict = f"{check(size, torch.device('cpu'))} calls equal the reference, and given memory changes no bit"
        except AssertionError as error:
            verdict, wrong = "RED: " + kernels.first_line(error), wrong + 1
        print(f"[{number}/{len(small)}] small round, R = {size.requests}: {verdict}", flush=True)
    print("small rounds in Triton's interpreter; no times were taken")
    return 1 if wrong else 0


def on_gpu(sizes: Sequence[Sizes], engine: Engine, arguments) -> int:
    device = torch.device("cuda", torch.cuda.current_device())
    clock = timing.DeviceClock()
    machine, bandwidth = timing.machine(device), timing.copy_bandwidth(clock, device)
    bench = kernels.Bench(
        device=device, clock=clock, machine=machine, bandwidth=bandwidth,
        samples=kernels.QUICK_SAMPLES if arguments.quick else kernels.SAMPLES, baselines=(), small=False,
        capture=timing.graph_of, facts=dict,
    )  # fmt: skip
    path = Path(arguments.out) if arguments.out else kernels.RESULTS / kernels.file_name(machine.gpu).replace("kernels-", "round-")
    print(f"{machine.gpu}, driver {machine.driver}, {machine.commit}: a device copy moves {bandwidth / 1e9:.0f} GB/s, microseconds")
    return report(sizes, engine, bench, path)


def report(sizes: Sequence[Sizes], engine: Engine, bench: kernels.Bench, path: Path) -> int:
    """Check and time one batch size after another, each printed and written as soon as it is done."""
    wrong, machine = 0, bench.machine
    facts = {name: getattr(machine, name) for name in ("gpu", "driver", "torch", "triton", "commit")}
    print(engine.words())
    for number, size in enumerate(sizes, 1):
        print(f"[{number}/{len(sizes)}]", end=" ", flush=True)
        try:
            check(size.small(), bench.device)
            taken = measure(size, bench)
        except Exception as error:  # out of memory at one size, say, must not hide the others
            kind = "RED" if isinstance(error, AssertionError) else f"FAILED: {type(error).__name__}"
            print(f"R = {size.requests}: {kind}: {kernels.first_line(error)}", flush=True)
            wrong += 1
            continue
        copy = dict(copy_gb_per_s=bench.bandwidth / 1e9)
        rows = timed(predicted(size, bench.bandwidth, engine), taken, facts | copy)
        print("\n".join(lines(rows)) + "\n", flush=True)
        write(path, rows)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"written to {path}")
    return 1 if wrong else 0


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 1: a round is not right; 2: a bad argument."""
    try:
        arguments = parser().parse_args(argv)
        sizes = sizes_of(arguments)
        interpreted = kernels.prepare_triton()
    except BadArgument as error:
        print(f"bench.round: {error}", file=sys.stderr)
        return 2
    engine = Engine(arguments.backbone_ms, arguments.target_ms, arguments.backbone_bytes / 2, arguments.target_bytes / 2)
    if interpreted:
        return on_host(sizes, engine, 1e9 * arguments.bandwidth)
    return on_gpu(sizes, engine, arguments)


if __name__ == "__main__":
    sys.exit(main())
