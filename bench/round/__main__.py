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
(bench/shared/roofline.py): weights over bandwidth or products over flops, whichever is longer; every draft is verified. `share` is an
op's part of that round. If all ops took no time, the round would be 1 / (1 - share) times as fast: nobody can gain more here.

Inputs are random, so fewer drafts are accepted than in practice, and acceptance draws more corrections. Layers whose caches fit
into the GPU's cache take turns over several.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench.shared import command, roofline
from bench.shared.command import BadArgument
from bench.shared.source import literal

REQUESTS = (1, 8, 64, 256)
SAMPLES, QUICK_SAMPLES = (literal("bench.shared.measure", name) for name in ("SAMPLES", "QUICK_SAMPLES"))
MODEL = roofline.Decoder()


def parser() -> command.Parser:
    p = command.Parser("bench.round", __doc__)
    p.add_argument("--requests", metavar="R[,R]", default=",".join(map(str, REQUESTS)), help="default: %(default)s")
    p.add_argument("--context", type=int, metavar="TOKENS", default=2048, help="of every request (default: %(default)s)")
    p.add_argument("--layers", type=int, default=36, help="of the target (default: %(default)s)")
    p.add_argument("--backbone-ms", type=float, metavar="MS", help="measured time of the drafter's backbone")
    p.add_argument("--target-ms", type=float, metavar="MS", help="measured time of the target's pass without its attention")
    p.add_argument(
        "--backbone-bytes", type=float, metavar="N", default=2.0 * MODEL.draft_parameters,
        help="of its weights in bf16, where its time is not given (default: %(default)g)",
    )  # fmt: skip
    p.add_argument(
        "--target-bytes", type=float, metavar="N", default=2.0 * MODEL.parameters,
        help="the same of the target (default: %(default)g)",
    )  # fmt: skip
    p.add_argument(
        "--bandwidth", type=float, metavar="GB/S", default=roofline.Machine().bytes_per_second / 1e9,
        help="for predictions without a GPU (default: %(default)g, a copy on an H200); with one it is measured",
    )  # fmt: skip
    p.add_argument("--quick", action="store_true", help=f"{QUICK_SAMPLES} samples instead of {SAMPLES}")
    p.add_argument("--out", metavar="FILE", help="the CSV file (default: bench/results/round-<gpu>.csv)")
    return p


def check(arguments) -> None:
    """Make numbers of the requests. Raises BadArgument."""
    try:
        requests = [int(part) for part in arguments.requests.split(",")]
    except ValueError:
        raise BadArgument(f"--requests: expected whole numbers with commas between them, got {arguments.requests!r}") from None
    if min(requests) < 1 or max(requests) > 1024:
        raise BadArgument(f"--requests: expected numbers from 1 to 1024, got {arguments.requests}")
    for option in ("context", "layers"):
        command.check_least(f"--{option}", getattr(arguments, option), 1)
    for option in ("backbone_ms", "target_ms", "backbone_bytes", "target_bytes", "bandwidth"):
        command.check_above_zero(f"--{option.replace('_', '-')}", getattr(arguments, option))
    command.check_file("--out", arguments.out)
    arguments.requests = requests


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 1: a round is not right; 2: a bad argument; 130: stopped."""
    return command.run(parser, check, "bench.round.work", argv)


if __name__ == "__main__":
    sys.exit(main())
