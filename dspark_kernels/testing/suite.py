"""Whether an acceptance function emits the target's distribution: a verdict per test, and the bias it would have detected.

    check(function) -> Report

A function under test takes a padded batch, all tensors on one device,

    function(target_logits, draft_tokens, draft_logits, temperature, seeds, draft_lens, anchor_positions) -> tokens

    target_logits [R, K+1, V]  row i verifies draft i + 1, the row behind the last admitted draft gives the bonus, others: garbage
    draft_tokens  [R, K] int64 drafts (-1: none was made); draft_logits [R, K, Vd] what they were drawn from, None: one-hot
    temperature   [R] fp32     of target and draft, 0 = greedy; -inf logits have probability 0
    seeds         [R] int64    of the function's noise; a function that keeps its own generator is checked with unseeded=True
    draft_lens    [R] int32    how many drafts are admitted
    anchor_positions [R] int64 position of the last emitted token; draft i is decided for the i-th position behind it
    tokens        [R, K+1]     accepted drafts, then the correction or bonus, then -1

so a verifier that wants probabilities and packed rows is wrapped in a few lines:

    def mine(target_logits, draft_tokens, draft_logits, temperature, seeds, draft_lens, anchor_positions):
        scale = temperature.clamp(min=1e-6)[:, None, None]
        rows = torch.arange(target_logits.shape[1], device=seeds.device) <= draft_lens[:, None]
        target_probs = (target_logits / scale)[rows].softmax(-1)                 # [L, V], packed
        if draft_logits is None:
            draft_probs = torch.nn.functional.one_hot(draft_tokens.clamp(min=0), target_logits.shape[2]).float()
        else:
            draft_probs = (draft_logits / scale).softmax(-1)
        out = verify(target_probs, draft_tokens, draft_probs, draft_lens)        # tokens, and how many
        index = torch.arange(out.tokens.shape[1], device=seeds.device)
        return torch.where(index < out.count[:, None], out.tokens, -1)

A function under one of the tree rules takes draft trees, -1 as the root's parent, parents before children, elder siblings first,

    function(node_logits, tokens, parents, draft_logits, drawn, temperature, seeds, num_nodes, anchor_positions) -> tokens

    node_logits   [R, M, V]    row m verifies the children of node m, or gives the token behind it; node 0 is the last emitted token
    tokens, parents [R, M]     int64, int32; nodes num_nodes .. M - 1 do not exist: everything of theirs is garbage
    draft_logits  [R, M, Vd]   row m: what the children of node m were drawn from; None where drawn = "one_hot"
    drawn         "one_hot" (deterministic, no two siblings alike), "iid" (independent draws: siblings may be alike) or
                  "without_replacement" (from what the elder siblings leave)
    num_nodes     [R] int32    nodes of each tree, the root included; the rest as above
    tokens        [R, M]       of the accepted path from the root's child on, then one token, then -1

and is asked for all three ways, or those of its attribute `drawn`:

    def mine(node_logits, tokens, parents, draft_logits, drawn, temperature, seeds, num_nodes, anchor_positions):
        target_probs = (node_logits / temperature.clamp(min=1e-6)[:, None, None]).softmax(-1)
        out = verify_tree(target_probs, tokens, parents, num_nodes)              # token of every node's draw, path, its length
        index = torch.arange(tokens.shape[1], device=tokens.device)
        emitted = out.draws.gather(1, out.path.clamp(min=0))                     # a node's draw leads to the next, or is the last
        return torch.where(index <= out.length[:, None], emitted, -1)
    mine.rule = "walk"

The suite drafts with this package's noise (chain.rules.Noise, streams DRAFT or COUPLED). draft(draft_logits [R, V], temperature,
seeds, positions, anchor_positions) -> tokens [R] replaces that and is tested together with the function, and so is
schedule(confidence [R, K]) -> lengths [R]. For trees: tree.models.draft, child by child; there is no schedule.

False alarms: every finding is tested at LEVEL, and a run makes at most FINDINGS of them, so a correct function fails a run
with a probability of about LEVEL * FINDINGS = 1e-4 at most. Seeds are fixed: a function whose noise comes from them gets the same
verdict every time.
"""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, check_int
from ..choices import DRAWN
from . import chain, tree
from .chain.edges import Detected
from .run import FALSE_ALARM, FINDINGS as FINDINGS, LEVEL as LEVEL, Run, Settings, TreeRun
from .statistics import Finding

REQUESTS, QUICK, FEWEST_REQUESTS = 1 << 17, 1 << 13, 64
CHAIN_RULES = ("token", "block", "coupled", "greedy")
TREE_RULES = ("walk", "recursive", "traversal", "greedy_tree")
RULES = CHAIN_RULES + TREE_RULES

# Tests of what a function does with values that no distribution follows from: NaN, +inf, rows without a finite logit. A lossless
# function may have other conventions, so their results stand apart.
CONVENTIONS = ("bad_rows",)
HEADINGS = {False: "distribution:", True: "conventions for bad values (a lossless function may have others):"}

SAMPLED = ("token", "block", "coupled")
# Name -> (test, rules that it is for, whether it needs noise that comes from the seeds).
Table = dict[str, tuple[Callable[[Any], Iterable[Finding] | None], tuple[str, ...], bool]]
TESTS: Table = {
    "rows": (chain.edges.rows, CHAIN_RULES, False),
    "greedy": (chain.edges.greedy, CHAIN_RULES, False),
    "padding": (chain.edges.padding, CHAIN_RULES, False),
    "empty": (chain.edges.empty, CHAIN_RULES, False),
    "extreme": (chain.edges.extreme, CHAIN_RULES, False),
    "batch": (chain.edges.batch, CHAIN_RULES, True),
    "shared": (chain.edges.shared, ("coupled",), True),
    "one_round": (chain.distributions.one_round, SAMPLED, False),
    "rounds": (chain.distributions.rounds, SAMPLED, False),
    "prefix": (chain.distributions.prefix, SAMPLED, False),
    "noise": (chain.distributions.noise, SAMPLED, False),
    "temperature": (chain.distributions.temperature, SAMPLED, False),
    "filters": (chain.distributions.filters, SAMPLED, False),
    "residual": (chain.distributions.residual, SAMPLED, False),
    "placeholder": (chain.distributions.placeholder, SAMPLED, False),
    "widths": (chain.distributions.widths, SAMPLED, False),
    "tails": (chain.distributions.tails, SAMPLED, False),
    "accepts": (chain.distributions.accepts, SAMPLED, False),
    "bad_rows": (chain.edges.bad_rows, CHAIN_RULES, False),
}

TREES_SAMPLED, TREES_TRIED = TREE_RULES[:3], ("recursive", "traversal")
TREE_TESTS: Table = {
    "rows": (tree.edges.rows, TREE_RULES, False),
    "greedy": (tree.edges.greedy, TREE_RULES, False),
    "padding": (tree.edges.padding, TREE_RULES, False),
    "empty": (tree.edges.empty, TREE_RULES, False),
    "extreme": (tree.edges.extreme, TREE_RULES, False),
    "batch": (tree.edges.batch, TREE_RULES, True),
    "one_round": (tree.distributions.one_round, TREES_SAMPLED, False),
    "unequal": (tree.distributions.unequal, TREES_SAMPLED, False),
    "rounds": (tree.distributions.rounds, TREES_SAMPLED, False),
    "prefix": (tree.distributions.prefix, TREES_SAMPLED, False),
    "noise": (tree.distributions.noise, TREES_SAMPLED, False),
    "siblings": (tree.distributions.siblings, TREES_TRIED, False),
    "temperature": (tree.distributions.temperature, TREES_SAMPLED, False),
    "filters": (tree.distributions.filters, TREES_SAMPLED, False),
    "residual": (tree.distributions.residual, TREES_SAMPLED, False),
    "widths": (tree.distributions.widths, TREES_SAMPLED, False),
    "tails": (tree.distributions.tails, TREES_SAMPLED, False),
    "accepts": (tree.distributions.accepts, TREES_SAMPLED, False),
    "chain": (tree.distributions.chain, ("traversal",), False),
    "bad_rows": (tree.edges.bad_rows, TREE_RULES, False),
}


def tests_of(rule: str) -> Table:
    return TREE_TESTS if rule in TREE_RULES else TESTS


@dataclasses.dataclass(frozen=True)
class Result:
    """What one test of the suite found.

    name, verdict ("pass", "FAIL", "skip", or "ERROR" where the function raised), text: the line that `print` shows. p_value: of
    the most extreme finding, None if nothing was counted. sees: the total variation that every distribution of the test would have detected, None if unknown.
    findings: how many statistics were computed. seconds: run time.
    """

    name: str
    verdict: str
    text: str
    p_value: float | None = None
    sees: float | None = None
    findings: int = 0
    seconds: float = 0.0

    @property
    def heading(self) -> str:
        """What it is a result about: the distribution, or conventions for bad values."""
        return HEADINGS[self.name in CONVENTIONS]

    def __str__(self) -> str:
        return f"{self.name:<12} {self.verdict}  {self.text}"


@dataclasses.dataclass(frozen=True)
class Report:
    """The results of a run of the suite; `print` shows a line per test and a summary.

    rule: the rule that was tested. requests: samples of each distribution.
    """

    results: tuple[Result, ...]
    rule: str
    requests: int

    @property
    def passed(self) -> bool:
        """Whether no test failed, the function raised nothing, and at least one test passed."""
        return not self.detected_by and not self.errors and any(result.verdict == "pass" for result in self.results)

    @property
    def detected_by(self) -> tuple[str, ...]:
        """Names of the tests that failed."""
        return tuple(result.name for result in self.results if result.verdict == "FAIL")

    @property
    def errors(self) -> tuple[str, ...]:
        """Names of the tests in which the function raised."""
        return tuple(result.name for result in self.results if result.verdict == "ERROR")

    def __str__(self) -> str:
        lines = []
        for heading in HEADINGS.values():
            own = [str(result) for result in self.results if result.heading == heading]
            lines += [heading, *own] if own else []
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """The last line of the printed report."""
        done = [result for result in self.results if result.verdict != "skip"]
        good = sum(result.verdict == "pass" for result in done)
        seconds = sum(result.seconds for result in done)
        text = f"{good} of {len(done)} tests passed in {seconds:.0f} s"
        distribution = [name for name in self.detected_by if name not in CONVENTIONS]
        conventions = [name for name in self.detected_by if name in CONVENTIONS]
        for found, names in (("detected by", distribution), ("other conventions for bad values:", conventions)):
            text += f"; {found} {', '.join(names)}" if names else ""
        if self.errors:
            text += f"; the function raised in {', '.join(self.errors)}"
        if self.detected_by or self.errors:
            return text
        return f"{text}; a correct function fails with a probability of at most {FALSE_ALARM:.0e}"


def default_requests(function: Callable[..., Tensor], quick: bool = False) -> int:
    most: int = getattr(function, "max_requests", REQUESTS)
    return min(QUICK if quick else REQUESTS, most)


def check(
    function: Callable[..., Tensor],
    *,
    rule: str | None = None,
    tests: Iterable[str] | None = None,
    requests: int | None = None,
    quick: bool = False,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    draft: Callable[..., Tensor] | None = None,
    schedule: Callable[[Tensor], Tensor] | None = None,
    unseeded: bool = False,
    drawn: Iterable[str] | None = None,
    progress: Callable[[Result], None] | None = None,
) -> Report:
    """Test whether an acceptance function emits the target's distribution.

    Args:
        function: the acceptance function; its arguments and result are described at the head of this module.
        rule: "token", "block", "coupled" (draft and target share their noise) or "greedy"; of functions on trees "walk",
            "recursive", "traversal" or "greedy_tree"; default: function.rule, else "token".
        tests: names from TESTS (trees: TREE_TESTS); default: all that the rule has.
        requests: samples of each distribution; default: REQUESTS (with quick: QUICK), at most function.max_requests.
        quick: take fewer samples, which detects only larger biases.
        seed: chooses all seeds of the run.
        device: where the tensors of the calls are.
        dtype: of the logits; the model tables are exact in bf16, fp16 and fp32.
        draft, schedule: a sampler and a scheduler to be tested together with the function; default: the suite's own.
        unseeded: the function's noise does not come from `seeds`; tests that call twice with the same seeds are skipped.
        drawn: the ways of making the children of trees to test; default: function.drawn, else all of choices.DRAWN.
        progress: called with each Result.

    Returns:
        Report.

    Raises:
        ValueError, TypeError: an argument that is none of these.
        FunctionError: the function, called once before the tests on an ordinary batch, raised; its cause is what it raised. Where
            it raises in a test later on, that test has no verdict on it but "ERROR".
    """
    rule = check_choice("rule", getattr(function, "rule", "token") if rule is None else rule, RULES)
    of_form = tests_of(rule)
    if tests is None:
        tests = [name for name, (_, rules, _) in of_form.items() if rule in rules]
    tests = [check_choice("tests", name, tuple(of_form)) for name in tests]
    requests = default_requests(function, quick) if requests is None else requests
    check_int("requests", requests, low=FEWEST_REQUESTS)
    settings = Settings(requests, seed, device, draft, schedule, dtype)
    run: Run | TreeRun
    if rule in TREE_RULES:
        if schedule is not None:
            raise ValueError(f"schedule: expected None with the {rule} rule, got {schedule!r}")
        ways: Iterable[str] = getattr(function, "drawn", DRAWN) if drawn is None else drawn
        run = TreeRun(function, rule, settings, tuple(check_choice("drawn", way, DRAWN) for way in ways))
    else:
        run = Run(function, rule, settings)
    try:
        run.probe()
    except Exception as error:
        raise FunctionError(f"the function raised on an ordinary batch: {_shown(error)}") from error
    results: list[Result] = []
    raised: dict[str, str] = {}
    for name in sorted(tests, key=CONVENTIONS.__contains__):  # what stands apart comes last
        test, rules, seeded = of_form[name]
        if rule not in rules:
            result = Result(name, "skip", f"not for the {rule} rule")
        elif unseeded and seeded:
            result = Result(name, "skip", "the function's noise does not come from the seeds")
        else:
            result = _run_test(name, test, run, raised)
        results.append(result)
        if progress is not None:
            progress(result)
    return Report(tuple(results), rule, requests)


class FunctionError(RuntimeError):
    """The function under test raised on an ordinary batch, so that there is nothing to test. Its message is one line."""


def _shown(error: Exception) -> str:
    """Type and first line of an error, and where it was raised."""
    lines = str(error).strip().splitlines() or [""]
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {lines[0]} ({last.filename}:{last.lineno})"


def _run_test(name: str, test: Callable[[Any], Iterable[Finding] | None], run: Run | TreeRun, raised: dict[str, str]) -> Result:
    """raised: of every error so far the test that it happened in first; one is printed once."""
    start = time.perf_counter()

    def result(verdict: str, text: str, p_value: float | None = None, sees: float | None = None, findings: int = 0) -> Result:
        return Result(name, verdict, text, p_value, sees, findings, time.perf_counter() - start)

    findings: list[Finding] = []
    try:
        findings += test(run) or ()
    except Detected as error:
        return result("FAIL", str(error))
    except Exception as error:  # a function that breaks on one test is still tested by the others
        first = raised.setdefault(_shown(error), name)
        return result("ERROR", _shown(error) if first == name else f"raised as in {first}")
    if not findings:
        return result("pass", "as known in advance")
    worst = min(findings, key=lambda finding: finding.p_value)
    seen = [finding.sees for finding in findings if finding.sees is not None]
    sees = max(seen) if seen else None
    power = "" if sees is None else f"; sees a total variation of {sees:.2g}"
    if worst.p_value < run.level:
        return result("FAIL", f"{worst.what}, p-value {worst.p_value:.0e}", worst.p_value, sees, len(findings))
    text = f"{len(findings)} findings, least p-value {worst.p_value:.2g}{power}"
    return result("pass", text, worst.p_value, sees, len(findings))
