"""What a step costs: measured on this CPU, read from a file, or modelled by bandwidth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from bench import assets
from bench.shared import roofline
from bench.shared.command import BadArgument, first_line
from bench.shared.progress import Progress
from dspark_kernels import cost as costs
from dspark_kernels.types import CostTable
from reference.drafters import Anchors, Committed, DSpark
from reference.loop import REFERENCE_OPS
from reference.model import Rows, Target


@dataclasses.dataclass(frozen=True)
class Costs:
    """table(N): what a step of N requests costs; lines: where that comes from."""

    table: Callable[[int], CostTable]
    lines: Sequence[str]


def measure_demo(progress: Callable[[int, int], object] | None = None, repeats: int = 15) -> CostTable:
    """Times of the embedded target's and drafter's step on this CPU: reference code, fp32, one thread.

    Two threads that wait for each other beside other processes sometimes take ten times as long.

    A step of n rows is ceil(n / 8) requests of up to 8 rows at 64 tokens of context. The reference attends request by request, so
    a row that is a request of its own costs more than the table says.
    """
    context, most = 64, 64
    target = Target(*assets.weights("target"))
    drafter = DSpark(*assets.weights("dspark"), target)
    per_request = drafter.max_drafts + 1
    cache = target.new_cache(most)
    drafter.start(most)
    ids = torch.arange(context * most) % 256
    with torch.inference_mode():
        rows = Rows.of([(slot, 0, context) for slot in range(most)], "cpu")
        output = target.forward(ids, rows, cache, drafter.feature_layers)
        drafter.commit(Committed(rows, ids, ids, output.pre_norm, output.features))
    anchors, positions = torch.arange(most), torch.full((most,), context)

    def step(n):
        with torch.inference_mode():
            full, rest = divmod(n, per_request)
            counts = [per_request] * full + [rest] * bool(rest)
            rows = Rows.of([(slot, context, count) for slot, count in enumerate(counts)], "cpu")
            target.logits(target.forward(ids[:n], rows, cache).hidden)
            for slot in range(len(counts)):
                cache.crop(slot, context)

    def draft(n):
        with torch.inference_mode():
            at = Anchors.of(anchors, positions, range(n))
            drafter.propose(at, drafts=drafter.max_drafts, sampling=None, noise="draft", ops=REFERENCE_OPS)

    sizes, draft_sizes = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512], [1, 4, 16, 64]
    rules = {"draft_step": draft, "draft_sizes": draft_sizes, "device": "cpu", "warmup": 1, "repeats": repeats}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return costs.measure(step, sizes, progress=progress, **rules)
    finally:
        torch.set_num_threads(threads)


def costs_of(arguments) -> Costs:
    """Raises BadArgument."""
    if arguments.measure_cost:
        progress = Progress(0, "call")
        progress.start("measuring")
        table = measure_demo(lambda done, total: progress(1))
        progress.close()
        if arguments.save_cost is not None:
            try:
                table.save(arguments.save_cost)
            except OSError as error:
                raise BadArgument(f"--save-cost: {arguments.save_cost}: {error.strerror}") from None
        title = f"costs: the embedded demo, measured on this machine: {table.info['device']}"
        return Costs(lambda requests: table, [title, *_drafts(table)])
    if arguments.cost is not None:
        try:
            table = CostTable.load(arguments.cost, "cpu")
        except (OSError, ValueError) as error:
            raise BadArgument(f"--cost: {first_line(error)}") from None
        device = (table.info or {}).get("device", "a device that the file does not name")
        return Costs(lambda requests: table, [f"costs: {arguments.cost}, of {device}", *_drafts(table)])
    captured = () if arguments.no_graphs else roofline.CAPTURED
    return Costs(
        lambda requests: roofline.table(requests, arguments.context, captured), roofline.lines(arguments.context, captured)
    )


def _drafts(table: CostTable) -> list[str]:
    return [] if table.draft_seconds is not None else ["  no times of drafting in this table: drafts are free here"]
