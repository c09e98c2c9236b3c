"""python -m dspark_kernels.testing module:function: a verdict per test on an acceptance function.

    python -m dspark_kernels.testing dspark_kernels.testing.ours:token                       the kernel
    python -m dspark_kernels.testing dspark_kernels.testing.chain.rules:block                plain torch
    python -m dspark_kernels.testing dspark_kernels.testing.known_wrong:block_first_reject   a known-bad rule
    python -m dspark_kernels.testing dspark_kernels.testing.ours:traversal                   the kernel on draft trees
    python -m dspark_kernels.testing my_module:my_tree_acceptance --rule recursive --drawn iid

The rule says what the function takes: a chain (token, block, coupled, greedy) or a tree (walk, recursive, traversal, greedy_tree).
What a function takes and returns: dspark_kernels/testing/suite.py. The exit status is 0 if every test passed, 1 if one
failed, 2 for a bad argument or a function that raises, 130 where the command is stopped.
"""

from __future__ import annotations

import argparse
import pkgutil
import sys
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from ..checks import check_device
from ..choices import DRAWN
from . import interpreter, suite

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class BadArgument(Exception):
    """Message of one line that names the argument."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadArgument(message)


def parser() -> argparse.ArgumentParser:
    width = max(map(len, [*suite.TESTS, *suite.TREE_TESTS]))
    lists = (("tests of chains", suite.TESTS), ("tests of trees", suite.TREE_TESTS))
    tests = "\n\n".join(
        "\n".join(
            [f"{title}:", *(f"  {name.ljust(width)}  {(test.__doc__ or '').splitlines()[0]}" for name, (test, *_) in table.items())]
        )
        for title, table in lists
    )
    p = _Parser(
        prog="python -m dspark_kernels.testing",
        description="A verdict per test on an acceptance function.",
        epilog="\n".join(__doc__.splitlines()[2:]) + "\n\n" + tests,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("function", metavar="module:function", help="the acceptance function; found from the current directory, too")
    p.add_argument("tests", nargs="*", metavar="TEST", help="names of tests (default: all that the rule has)")
    p.add_argument("--skip", metavar="TEST[,TEST]", default="", help="tests to leave out")
    p.add_argument("--rule", choices=suite.RULES, help="what the function claims to be (default: its attribute `rule`, else token)")
    p.add_argument("--quick", action="store_true", help=f"{suite.QUICK} requests per distribution instead of {suite.REQUESTS}")
    p.add_argument(
        "--requests", type=int, metavar="N", help="requests per distribution; a function's `max_requests` bounds the default"
    )
    p.add_argument("--seed", type=int, default=0, help="of all seeds (default: %(default)s)")
    p.add_argument("--device", help="default: cuda where there is one and Triton's interpreter is off, else cpu")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="of the logits (default: %(default)s)")
    p.add_argument("--draft", metavar="module:function", help="sampler of drafts to test together with it")
    p.add_argument("--drawn", metavar="WAY[,WAY]", help=f"how children of trees are made (default: {', '.join(DRAWN)})")
    p.add_argument("--schedule", metavar="module:function", help="confidences [R, K] to lengths [R], to test together with it")
    p.add_argument("--unseeded", action="store_true", help="the function's noise does not come from the seeds it is given")
    return p


def _resolve(p: argparse.ArgumentParser, option: str, name: str) -> Callable[..., Tensor]:
    if ":" not in name:
        p.error(f"{option}: expected module:function, got {name!r}")
    try:
        found = pkgutil.resolve_name(name)
    except Exception as error:  # whatever importing the module raises
        kind = "" if isinstance(error, (ImportError, AttributeError, ValueError)) else f"{type(error).__name__}: "
        p.error(f"{option}: {kind}{(str(error).splitlines() or [type(error).__name__])[0]}")
    if not callable(found):
        p.error(f"{option}: expected a function, got {type(found).__name__}")
    function: Callable[..., Tensor] = found
    return function


def main(argv: list[str] | None = None) -> int:
    """0: every test passed; 1: one failed; 2: a bad argument, or a function that raises; 130: stopped."""
    try:
        return run(argv)
    except (BadArgument, suite.FunctionError) as error:
        print(f"dspark_kernels.testing: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dspark_kernels.testing: stopped; the verdicts that are printed stand, nothing is written", file=sys.stderr)
        return 130


def run(argv: list[str] | None) -> int:
    p = parser()
    args = p.parse_intermixed_args(argv)
    if "" not in sys.path:
        sys.path.insert(0, "")
    if args.requests is not None and args.requests < suite.FEWEST_REQUESTS:
        p.error(f"--requests: expected >= {suite.FEWEST_REQUESTS}, got {args.requests}")
    if not -(1 << 31) <= args.seed < 1 << 31:
        p.error(f"--seed: expected a 32-bit integer, got {args.seed}")
    drawn = None if args.drawn is None else tuple(args.drawn.split(","))
    for way in drawn or ():
        if way not in DRAWN:
            p.error(f"--drawn: expected some of {', '.join(DRAWN)}, got {way!r}")
    function = _resolve(p, "function", args.function)
    draft = None if args.draft is None else _resolve(p, "--draft", args.draft)
    schedule = None if args.schedule is None else _resolve(p, "--schedule", args.schedule)
    skipped = [name for name in args.skip.split(",") if name]
    rule = args.rule or getattr(function, "rule", "token")
    of_form = suite.tests_of(rule)
    for name in (*args.tests, *skipped):
        if name not in of_form:
            p.error(f"tests: expected some of {', '.join(of_form)}, got {name!r}")
    if schedule is not None and rule in suite.TREE_RULES:
        p.error(f"--schedule: not for the {rule} rule")
    tests = args.tests or [name for name, (_, rules, _) in of_form.items() if rule in rules]
    compiled = torch.cuda.is_available() and not interpreter.interpreting()
    try:
        device = check_device("--device", args.device or ("cuda" if compiled else "cpu"))
    except ValueError as error:
        p.error(str(error))
    requests = args.requests or suite.default_requests(function, args.quick)
    print(
        f"{args.function}: {rule} rule, {requests} requests per distribution, seed {args.seed}, {args.dtype} on {device}",
        flush=True,
    )
    heading = None

    def told(result: suite.Result) -> None:
        nonlocal heading
        if result.heading != heading:
            heading = result.heading
            print(heading, flush=True)
        print(result, flush=True)

    report = suite.check(
        function,
        rule=rule,
        tests=[name for name in tests if name not in skipped],
        requests=requests,
        seed=args.seed,
        device=device,
        dtype=DTYPES[args.dtype],
        draft=draft,
        schedule=schedule,
        unseeded=args.unseeded,
        drawn=drawn,
        progress=told,
    )
    print(report.summary())
    return 2 if report.errors else 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
