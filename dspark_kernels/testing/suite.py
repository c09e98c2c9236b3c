"""Whether an acceptance function emits the target's law: a verdict per test, with the bias that each test would have seen.

    check(function) -> Report

A function under test takes a padded batch, all tensors on one device,

    function(target_logits, draft_tokens, draft_logits, temperature, seeds, draft_lens, anchor_positions) -> tokens

    target_logits [R, K+1, V]  row i judges draft i + 1, the row behind the last admitted draft gives the bonus, the rest is garbage
    draft_tokens  [R, K] int64 drafts (-1: none was made); draft_logits [R, K, Vd] the law they were drawn from, None: one-hot
    temperature   [R] fp32     of both laws, 0 = greedy; -inf logits have no mass
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

The suite drafts with this package's noise (rules.Noise, streams DRAFT or COUPLED). draft(draft_logits [R, V], temperature, seeds,
positions, anchor_positions) -> tokens [R] replaces that and is tested together with the function, and so is
schedule(confidence [R, K]) -> lengths [R].

False alarms: every finding is judged at LEVEL, and a run makes at most FINDINGS of them, so a right function is convicted with a
chance of about LEVEL * FINDINGS = 1e-4 a run at most. Seeds are fixed: a function whose noise comes from them gets the same verdict
every time.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..checks import check_choice, check_int
from . import edges, laws, models
from .edges import Convicted
from .statistics import Finding

FALSE_ALARM = 1e-4
FINDINGS = 100
LEVEL = FALSE_ALARM / FINDINGS
REQUESTS, QUICK, FEWEST_REQUESTS = 1 << 17, 1 << 13, 64
RULES = ("token", "block", "coupled", "greedy")
_MIX = -7046029254386353131  # 2^64 / golden ratio

SAMPLED = ("token", "block", "coupled")
# Name -> (test, rules that it is for, whether it needs noise that comes from the seeds).
TESTS = {
    "rows": (edges.rows, RULES, False),
    "greedy": (edges.greedy, RULES, False),
    "padding": (edges.padding, RULES, False),
    "empty": (edges.empty, RULES, False),
    "bad_rows": (edges.bad_rows, RULES, False),
    "extreme": (edges.extreme, RULES, False),
    "batch": (edges.batch, RULES, True),
    "shared": (edges.shared, ("coupled",), True),
    "one_round": (laws.one_round, SAMPLED, False),
    "rounds": (laws.rounds, SAMPLED, False),
    "prefix": (laws.prefix, SAMPLED, False),
    "noise": (laws.noise, SAMPLED, False),
    "temperature": (laws.temperature, SAMPLED, False),
    "filters": (laws.filters, SAMPLED, False),
    "residual": (laws.residual, SAMPLED, False),
    "placeholder": (laws.placeholder, SAMPLED, False),
    "widths": (laws.widths, SAMPLED, False),
    "tails": (laws.tails, SAMPLED, False),
    "accepts": (laws.accepts, SAMPLED, False),
}


@dataclasses.dataclass(frozen=True)
class Result:
    """Verdict of a test: "pass", "FAIL" or "skip"; what it found; chance of its most extreme finding; bias it would have seen."""

    name: str
    verdict: str
    text: str
    chance: float | None = None
    sees: float | None = None
    findings: int = 0
    seconds: float = 0.0

    def __str__(self):
        return f"{self.name:<12} {self.verdict}  {self.text}"


@dataclasses.dataclass(frozen=True)
class Report:
    results: tuple[Result, ...]
    rule: str
    requests: int

    @property
    def passed(self) -> bool:
        return not self.convicted and any(result.verdict == "pass" for result in self.results)

    @property
    def convicted(self) -> tuple[str, ...]:
        """Names of the tests that failed."""
        return tuple(result.name for result in self.results if result.verdict == "FAIL")

    def __str__(self):
        return "\n".join([*map(str, self.results), self.summary()])

    def summary(self) -> str:
        done = [result for result in self.results if result.verdict != "skip"]
        good = sum(result.verdict == "pass" for result in done)
        seconds = sum(result.seconds for result in done)
        text = f"{good} of {len(done)} tests passed in {seconds:.0f} s"
        if self.convicted:
            return f"{text}; convicted by {', '.join(self.convicted)}"
        return f"{text}; a right function fails with a chance of at most {FALSE_ALARM:.0e}"


class Run:
    """What tests use: the function behind checks of its output, seeds, sizes."""

    def __init__(self, function, rule, requests, seed, device, draft, schedule, dtype):
        self.function, self.rule, self.requests, self.seed = function, rule, requests, seed
        self.device, self.dtype, self.level = torch.device(device), dtype, LEVEL
        self.draft = draft or (models.draft_coupled if rule == "coupled" else models.draft)
        self.schedule = schedule or models.schedule
        self._plays: dict = {}

    def seeds(self, purpose: str, count: int | None = None) -> Tensor:
        """Seeds [count], others for every purpose; neighbours are far apart."""
        first = sum(ord(letter) * 131**i for i, letter in enumerate(purpose)) % (1 << 40) + self.seed * 1000003
        index = torch.arange(self.requests if count is None else count, device=self.device)
        return (index + first) * _MIX

    def model(self, model: models.Model) -> models.Model:
        tables = (table.to(self.device, self.dtype).float() for table in (model.target, model.draft))
        return models.Model(*tables, model.confidence.to(self.device))

    def play(self, model: models.Model, num_drafts: int, **options) -> models.Play:
        return models.Play(
            self.call, model, num_drafts, draft=self.draft, schedule=self.schedule, dtype=self.dtype, **options
        )  # fmt: skip

    def decode(self, purpose: str, model: models.Model, num_drafts: int, tokens: int, rounds: int | None, **options):
        """(model, history [R, tokens], drafts accepted in the first round [R])."""
        if purpose not in self._plays:
            model = self.model(model)
            seeds = self.seeds(purpose)
            self._plays[purpose] = (
                model, *self.play(model, num_drafts, **options).decode(seeds, tokens, rounds, 3, salt=len(purpose))
            )  # fmt: skip
        return self._plays[purpose]

    def call_rows(self, target, drafts, law, seeds=None, *, lens=None, temperature=1.0, anchor_position=7) -> Tensor:
        """Tokens [R, K+1], on the CPU, of one call with these rows (moved to the device)."""
        requests, num_drafts = drafts.shape
        move = lambda x: None if x is None else x if x.device == self.device else x.to(self.device)  # noqa: E731
        whole = lambda x, dtype: torch.as_tensor(x, dtype=dtype).expand(requests).contiguous()  # noqa: E731
        if self.rule == "greedy":
            temperature = 0.0
        seeds = self.seeds("rows", requests) if seeds is None else seeds
        out = self.call(
            move(target),
            move(drafts),
            move(law),
            move(whole(temperature, torch.float32)),
            move(seeds),
            move(whole(num_drafts if lens is None else lens, torch.int32)),
            move(whole(anchor_position, torch.int64)),
        )
        return out.cpu()

    def call(self, target_logits, draft_tokens, draft_logits, temperature, seeds, draft_lens, anchor_positions) -> Tensor:
        """The function's tokens, int64, once their form is right."""
        drafts, lens = draft_tokens.clone(), draft_lens.to(torch.int64)
        out = self.function(target_logits, draft_tokens, draft_logits, temperature, seeds, draft_lens, anchor_positions)
        if not isinstance(out, Tensor) or out.dtype not in (torch.int64, torch.int32):
            kind = out.dtype if isinstance(out, Tensor) else type(out).__name__
            raise Convicted(f"expected tokens in int64 or int32, got {kind}")
        requests, num_drafts = drafts.shape
        if tuple(out.shape) != (requests, num_drafts + 1):
            raise Convicted(f"expected tokens [{requests}, {num_drafts + 1}], got {list(out.shape)}")
        out = out.to(device=self.device, dtype=torch.int64)
        count = (out >= 0).sum(1)
        index = torch.arange(num_drafts + 1, device=out.device)
        padded = torch.nn.functional.pad(drafts, (0, 1), value=-1)
        # In order of what a request can be told first.
        self._form("an id beyond the vocabulary", (out >= target_logits.shape[2]).any(1), out)
        self._form("no token", count < 1, out)
        self._form("something else than -1 behind the tokens", (torch.where(index < count[:, None], -1, out) != -1).any(1), out)
        self._form("more than the admitted drafts and one token", count > lens + 1, out)
        self._form("a token that is not the draft before the last", ((index < count[:, None] - 1) & (out != padded)).any(1), out)
        return out

    def _form(self, what: str, wrong: Tensor, out: Tensor):
        if bool(wrong.any()):
            r = int(wrong.long().argmax())
            raise Convicted(f"{what}: {int(wrong.sum())} of {len(wrong)} requests, request {r} got {out[r].tolist()}")


def default_requests(function, quick: bool = False) -> int:
    return min(QUICK if quick else REQUESTS, getattr(function, "max_requests", REQUESTS))


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
    progress: Callable[[Result], None] | None = None,
) -> Report:
    """Test an acceptance function.

    Args:
        function: see the head of this module.
        rule: "token", "block", "coupled" (draft and target share their noise) or "greedy"; default: function.rule, else "token".
        tests: names from TESTS; default: all that the rule has.
        requests: samples of each law; default: function.max_requests where that is less, else REQUESTS (quick: QUICK).
        quick: fewer samples, so only larger biases are seen.
        seed: another choice of all seeds.
        dtype: of the logits: the model tables are exact in it.
        draft, schedule: the drafter's sampler and the scheduler, where they are to be tested too.
        unseeded: the function's noise does not come from `seeds`: tests that call twice with the same seeds are left out.
        progress: called with each result.

    Raises:
        ValueError, TypeError: an argument that is none of these. Errors of the function fail the test they happen in.
    """
    rule = check_choice("rule", getattr(function, "rule", "token") if rule is None else rule, RULES)
    if tests is None:
        tests = [name for name, (_, rules, _) in TESTS.items() if rule in rules]
    tests = [check_choice("tests", name, tuple(TESTS)) for name in tests]
    requests = default_requests(function, quick) if requests is None else requests
    check_int("requests", requests, low=FEWEST_REQUESTS)
    run = Run(function, rule, requests, seed, device, draft, schedule, dtype)
    results = []
    for name in tests:
        test, rules, seeded = TESTS[name]
        if rule not in rules:
            result = Result(name, "skip", f"not for the {rule} rule")
        elif unseeded and seeded:
            result = Result(name, "skip", "the function's noise does not come from the seeds")
        else:
            result = _judge(name, test, run)
        results.append(result)
        if progress is not None:
            progress(result)
    return Report(tuple(results), rule, requests)


def _judge(name: str, test, run: Run) -> Result:
    start = time.perf_counter()

    def result(verdict, text, *rest):
        return Result(name, verdict, text, *rest, seconds=time.perf_counter() - start)

    findings: list[Finding] = []
    try:
        findings += test(run) or ()
    except Convicted as error:
        return result("FAIL", str(error))
    except Exception as error:  # a function that breaks on one test is still judged by the others
        lines = str(error).strip().splitlines() or [""]
        return result("FAIL", f"{type(error).__name__}: {lines[0]}")
    if not findings:
        return result("pass", "as known in advance")
    worst = min(findings, key=lambda finding: finding.chance)
    seen = [finding.sees for finding in findings if finding.sees is not None]
    sees = max(seen) if seen else None
    power = "" if sees is None else f"; sees a total variation of {sees:.2g}"
    if worst.chance < run.level:
        return result("FAIL", f"{worst.what}, chance {worst.chance:.0e}", worst.chance, sees, len(findings))
    text = f"{len(findings)} findings, least chance {worst.chance:.2g}{power}"
    return result("pass", text, worst.chance, sees, len(findings))
