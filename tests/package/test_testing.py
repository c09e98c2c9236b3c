"""The conformance suite: its parts against the reference, what passes, the known-bad rules it detects, its command."""

import functools
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from dspark_kernels import testing
from dspark_kernels.testing import __main__ as command, interpreter, ours, statistics, suite
from dspark_kernels.testing.chain import distributions, known_wrong, models, rules
from dspark_kernels.types import Stream
from reference import accept as reference, cases, philox
from reference.distributions import distribution_of
from reference.enumeration import CrowdSource, Decoder, emitted_distribution, explore, target_distribution
from reference.logits import read_logits

QUICK = 4096  # requests per distribution
RULES = ("token", "block", "coupled", "greedy")


# ---- parts against the reference


@pytest.mark.parametrize("stream", list(Stream))
def test_noise_is_the_reference_s(stream):
    seeds = torch.tensor([0, 1, -1, 1 << 40, -(1 << 63), 987654321987654321])
    anchors, positions = torch.tensor([0, 5, 2**31, 7, 8, 9]), torch.tensor([1, 6, 2**31 + 4, 8, 19, 12])
    noise = rules.Noise(seeds, anchors)
    for first in (0, 1024):
        words = noise.words(stream, positions, 7, first)
        for r, seed in enumerate(seeds.tolist()):
            anchor = 0 if stream == Stream.COUPLED else int(anchors[r])
            want = philox.words(seed, torch.arange(first, first + 7), int(positions[r]), anchor, stream)
            assert torch.equal(words[r], want)
            assert torch.equal(noise.exponential(words)[r], philox.exponential(want))
    uniforms = noise.uniforms(3)
    for r, seed in enumerate(seeds.tolist()):
        for i in range(3):
            word = philox.words(seed, torch.zeros(1, dtype=torch.int64), int(anchors[r]) + i + 1, int(anchors[r]), Stream.ACCEPT)
            assert uniforms[r, i] == philox.uniform(word)[0]


def padded(case):
    """The arguments of an acceptance function from a packed case; rows that are not verified are NaN."""
    layout, slots = case.layout, torch.arange(case.layout.draft_lens.shape[0])
    lens, width, vocab = layout.draft_lens.long(), layout.max_drafts, case.target_logits.shape[1]
    target = torch.full((len(slots), width + 1, vocab), math.nan, dtype=case.target_logits.dtype)
    drafts = torch.zeros(len(slots), width, dtype=torch.int64)
    positions = torch.zeros(len(slots), dtype=torch.int64)
    for r in slots.tolist():
        first, start = int(layout.cu_num_logits[r]), int(layout.query_start_loc[r])
        target[r, : lens[r] + 1] = case.target_logits[first : first + int(lens[r]) + 1]
        drafts[r, : lens[r]] = layout.token_ids[start + 1 : start + 1 + int(lens[r])]
        positions[r] = layout.positions[start]
    draft_logits = getattr(case.proposal, "logits", None)
    return target, drafts, draft_logits, case.sampling.temperature, case.sampling.seed, lens.int(), positions


@pytest.mark.parametrize("vocab", [5, 40, 2500])
@pytest.mark.parametrize("rule", ["token", "block", "coupled"])
@pytest.mark.parametrize("proposal", ["dense", "one_hot"])
def test_rules_are_the_reference_s(rule, proposal, vocab):
    lengths = set()
    for seed, closeness in ((1, 0.95), (2, 0.4)):
        case = cases.accept_case(
            seed=seed, requests=20, drafts=3, vocab=vocab, proposal=proposal, closeness=closeness, dtype=torch.float32,
            temperatures=(1.0, 0.0, 0.5, 1.5), draft_vocab=vocab + 2 if seed == 1 else None,
        )  # fmt: skip
        for r, i, token in ((3, 1, -1), (5, 2, vocab + 1), (7, 1, vocab + 5)):
            if int(case.layout.draft_lens[r]) >= i:
                case.layout.token_ids[int(case.layout.query_start_loc[r]) + i] = token
        case.target_logits[int(case.layout.cu_num_logits[9])] = math.nan
        case.target_logits[int(case.layout.cu_num_logits[11]), ::2] = -math.inf
        case.target_logits[int(case.layout.cu_num_logits[13]), 3] = math.inf
        want = reference.accept_chain(**case.arguments() | dict(rule=rule)).tokens
        have = getattr(rules, rule)(*padded(case))
        assert torch.equal(have, want)
        lengths |= set((want >= 0).sum(1).tolist())
    assert len(lengths) > 1


def test_distributions_and_what_is_accepted_are_the_reference_s():
    model = distributions.ROUNDS
    target_probs, draft_probs = model.target_probs(), model.draft_probs()

    def decoder(rule):
        return Decoder(
            lambda c: target_probs[c[-1]], lambda c: draft_probs[c[-1]], reference.RULES[rule], 2, coupled=rule == "coupled"
        )

    exact = models.sequence_probs(target_probs, 4)
    want = target_distribution(decoder("token"), (models.PROMPT,), 4)
    assert all(float(exact[tokens]) == pytest.approx(probability, rel=1e-12) for tokens, probability in want.items())
    for first in (0, 1, 2):
        window = models.window_probs(target_probs, first, 4 - first)
        assert torch.allclose(window, exact.sum(tuple(range(first))) if first else exact, rtol=1e-12)
    for rule, compare in (("token", math.isclose), ("coupled", math.isclose), ("block", lambda have, exact: have <= exact)):
        emitted = emitted_distribution(decoder(rule), (models.PROMPT,))
        mean = sum(probability * (len(tokens) - 1) for tokens, probability in emitted.items())
        square = sum(probability * (len(tokens) - 1) ** 2 for tokens, probability in emitted.items())
        have, deviation = models.mean_accepted(rule, model, 2)
        assert compare(have, mean), rule
        assert rule == "block" or math.isclose(deviation, math.sqrt(square - mean**2))


# ---- what passes


@pytest.mark.parametrize("rule", RULES)
def test_plain_rules_pass(rule):
    report = testing.check(getattr(rules, rule), requests=2048)
    assert report.passed, str(report)
    assert [r.name for r in report.results] == [name for name, (_, of, _) in suite.TESTS.items() if rule in of]
    assert sum(result.findings for result in report.results) <= suite.FINDINGS


def by_reference(rule, target_logits, draft_tokens, draft_logits, temperature, seeds, draft_lens, anchor_positions):
    """reference/accept.py as an acceptance function: every distinct batch row once, for all its seeds (V <= 1024)."""
    out = torch.full((len(seeds), draft_tokens.shape[1] + 1), -1)
    given = target_logits[:, :0] if draft_logits is None else draft_logits
    facts = [x.double().flatten(1) for x in (target_logits, draft_tokens, given, temperature[:, None], draft_lens[:, None])]
    key = torch.cat([*facts, anchor_positions[:, None].double()], 1).nan_to_num(nan=-777.0)
    _, group = key.unique(dim=0, return_inverse=True)
    for members in (torch.nonzero(group == g)[:, 0] for g in range(int(group.max()) + 1 if len(group) else 0)):
        r, length = members[0], int(draft_lens[members[0]])
        drafts, heat = draft_tokens[r, :length].tolist(), float(temperature[r])
        target = [distribution_of(read_logits(row)[0], 1 / heat if heat > 0 else 1.0) for row in target_logits[r, : length + 1]]
        told = []
        for i, token in enumerate(drafts):
            drawn = None if draft_logits is None else distribution_of(read_logits(draft_logits[r, i])[0], 1 / (heat or 1.0))
            point = torch.nn.functional.one_hot(torch.tensor(max(token, 0)), target_logits.shape[2]).double()
            padding = (0, target_logits.shape[2] - (0 if drawn is None else len(drawn)))
            told.append(None if token == -1 else point if drawn is None else torch.nn.functional.pad(drawn, padding))
        verify = reference.RULES[rule if heat > 0 else "greedy"]
        anchor = int(anchor_positions[r])
        noise: dict = {}
        make = functools.partial(CrowdSource, anchor, seeds, members, noise)
        for who, verdict in explore(lambda at, j=verify, t=target, q=told, d=drafts, a=anchor: j(t, q, d, at, a), make):
            n = verdict.num_accepted
            out[who, :n], out[who, n] = torch.tensor(drafts[:n], dtype=torch.int64), verdict.token
    return out


@pytest.mark.parametrize("rule", RULES)
def test_the_reference_passes(rule):
    function = functools.partial(by_reference, rule)
    more = dict(token=("noise", "filters", "residual"), block=("rounds", "accepts"), coupled=("placeholder", "shared"), greedy=())
    report = testing.check(function, rule=rule, tests=["rows", "greedy", *more[rule]], requests=512)
    assert report.passed, str(report)


@pytest.mark.parametrize("rule", ["token", "block", "coupled", "greedy"])
def test_ours_pass(rule):
    """The kernel in the interpreter, on what takes it seconds; all of the suite takes minutes there."""
    pytest.importorskip("triton")
    tests = ["greedy"] if rule == "greedy" else ["rows"]
    report = testing.check(getattr(ours, rule), tests=tests, requests=64)
    if any("NotImplementedError" in result.text for result in report.results):
        pytest.skip(f"{rule} rule: not in this version")
    assert report.passed, str(report)


def test_our_adapter_hands_everything_over():
    """Missing drafts, trimmed requests, rows of a wider buffer: what rules.token says, draw by draw."""
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(5)
    target = (torch.randn(8, 3, 9, generator=generator) * 2)[..., :5]
    draft_logits = target[:, :2] + torch.randn(8, 2, 5, generator=generator)
    drafts = draft_logits.argmax(2)
    drafts[[1, 4], [1, 0]] = -1
    rest = (
        torch.tensor([1.0, 1, 0.5, 0, 1, 1, 2, 1]),
        torch.arange(8) * 31,
        torch.tensor([2, 2, 1, 2, 2, 0, 2, 2]).int(),
        torch.arange(8),
    )
    for proposal in (draft_logits, None):
        want = rules.token(target, drafts, proposal, *rest)
        assert torch.equal(ours.token(target, drafts, proposal, *rest), want)
        assert len(set((want >= 0).sum(1).tolist())) == 3
    assert suite.default_requests(ours.token) == (ours.INTERPRETED_REQUESTS if interpreter.interpreting() else suite.REQUESTS)
    assert (suite.default_requests(rules.token), suite.default_requests(rules.token, quick=True)) == (suite.REQUESTS, suite.QUICK)


def test_our_drafts_and_schedule_are_what_the_suite_takes():
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(4)
    logits, heat = torch.randn(6, 5, generator=generator), torch.tensor([1.0, 0.5, 2.0, 1.0, 0.7, 1.0])
    seeds, anchors = torch.arange(6) * 77, torch.arange(6) + 3
    for have, want in ((ours.draft, models.draft), (ours.draft_coupled, models.draft_coupled)):
        for k in (1, 3):
            assert torch.equal(have(logits, heat, seeds, anchors + k, anchors), want(logits, heat, seeds, anchors + k, anchors))
    confidence = torch.tensor([[0.9, 0.9, 0.9], [0.9, 0.9, 0.9], [0.01, 0.9, 0.9], [0.9, 0.01, 0.9]])
    lengths = ours.causal(confidence)
    assert lengths[0] == lengths[1] == 3 and lengths[2] == 0 and lengths[3] == 1


# ---- what it detects

# Known-bad rule -> tests that must each detect it, and requests where QUICK shows too little.
DETECTED_BY = {
    "correction_with_draft_noise": ("noise",),
    "position_only_noise": ("rounds",),
    "one_uniform_per_round": ("one_round", "temperature"),
    "one_uniform_per_batch": ("batch", "noise"),
    "noise_by_row": ("batch",),
    "low_word_of_seed": ("noise",),
    "seed_plus_position": ("noise",),
    "gumbel_floor": ("tails",),
    "equality_passes": ("tails",),
    "block_first_reject": ("one_round", "rounds", "accepts"),
    "block_unverified_row": ("prefix",),
    "block_without_prefix_probability": ("filters",),
    "correction_from_target": ("one_round", "placeholder"),
    "correction_without_draft": ("one_round", "noise"),
    "bonus_at_row_k": ("rows", "prefix"),
    "bonus_one_row_early": ("rows", "one_round"),
    "all_drafts_verified": ("empty", "prefix"),
    "at_least_one_draft": ("greedy", "empty"),
    "last_id_without_residual": ("residual",),
    "always_rejects": ("rows", "accepts"),
    "coupled_without_sharing": ("accepts",),
    "coupled_with_anchor": ("shared",),
    "temperature_on_target_only": ("temperature",),
    "draft_distribution_cut": ("widths", "noise"),
    "draft_distribution_rounded": ("temperature",),
    "distribution_ignored": ("accepts",),
    "one_hot_for_granted": ("one_round", "tails"),
    "placeholder_is_the_last_id": ("placeholder",),
    "nan_passes": ("bad_rows",),
    "masked_columns_win": ("one_round", "bad_rows"),
    "strides_ignored": ("padding",),
    "scaled_in_half": ("extreme",),
    "greedy_highest_tie": ("greedy",),
    "greedy_rows_sampled": ("greedy",),
    "draft_rounded": ("temperature",),
    "draft_hot": ("one_round", "noise"),
    "draft_position_only": ("rounds",),
    "global_maximum": ("prefix",),
    "retrospective": ("prefix",),
}
REQUESTS = {"gumbel_floor": 1 << 13, "draft_position_only": 1 << 13, "block_without_prefix_probability": 1 << 13}


@pytest.mark.parametrize("name", DETECTED_BY)
def test_a_known_bad_rule_is_detected(name):
    function, how = known_wrong.KNOWN_BAD.get(name), {}
    if name in known_wrong.DRAFTS:
        function, how = rules.block, dict(draft=known_wrong.DRAFTS[name])
    if name in known_wrong.SCHEDULES:
        function, how = rules.token, dict(schedule=known_wrong.SCHEDULES[name])
    report = testing.check(function, tests=DETECTED_BY[name], requests=REQUESTS.get(name, QUICK), **how)
    assert report.detected_by == tuple(DETECTED_BY[name]) and not report.passed, str(report)


def test_every_known_bad_rule_is_tried_and_every_test_detects_one():
    assert DETECTED_BY.keys() == known_wrong.KNOWN_BAD.keys() | known_wrong.DRAFTS.keys() | known_wrong.SCHEDULES.keys()
    assert {test for tests in DETECTED_BY.values() for test in tests} == suite.TESTS.keys()


def test_a_bias_of_the_stated_size_is_seen():
    """A share of requests says token 0 and nothing else: 12 choices of seeds, every one detected; a fifth of it, none."""
    model = next(m for vocab, count, _, m in distributions.ROUND if (vocab, count) == (2, 1))

    def biased(share, *arguments):
        out = rules.token(*arguments)
        hit = rules.Noise(arguments[4] ^ 0x77777777, arguments[6]).uniforms(1)[:, 0] < share
        return torch.where(hit[:, None], torch.tensor([0, -1]), out)

    sees = statistics.smallest_bias(3, QUICK, suite.LEVEL)
    share = sees / (1 - float(model.target_probs()[models.PROMPT, 0]))
    for size, expected in ((1.0, 12), (0.2, 0)):
        seen = 0
        for seed in range(12):
            settings = suite.Settings(QUICK, seed, "cpu", None, None, torch.float32)
            run = suite.Run(functools.partial(biased, size * share), "token", settings)
            findings = list(distributions._round(run, "", model, 1))
            assert findings[0].sees == pytest.approx(sees)
            seen += findings[0].p_value < suite.LEVEL
        assert seen == expected


# ---- what it says about functions that break


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda *a: None, "expected tokens in int64 or int32, got NoneType"),
        (lambda *a: rules.token(*a).float(), "expected tokens in int64 or int32, got torch.float32"),
        (lambda *a: rules.token(*a)[:, :-1], "expected tokens [15, 5], got [15, 4]"),
        (lambda *a: rules.token(*a) * 0 - 1, "no token: 15 of 15 requests"),
        (lambda *a: rules.token(*a).clamp(min=-1) + 20, "an id beyond the vocabulary"),
        (lambda *a: torch.where(rules.token(*a) < 0, -2, rules.token(*a)), "something else than -1 behind the tokens"),
        (lambda *a: rules.token(*a).flip(1), "something else than -1 behind the tokens"),
        (lambda *a: rules.token(a[0], a[0].argmax(2)[:, :-1], *a[2:]), "a token that is not the draft before the last"),
    ],
)
def test_output_that_is_none(function, message):
    report = testing.check(function, tests=["rows"], requests=64)
    assert report.detected_by == ("rows",) and message in report.results[0].text, str(report)


def _raises(*arguments):
    raise KeyError("no such table")


def _raises_on_nan(*arguments):
    if arguments[0].isnan().any():
        raise ValueError("NaN")
    return rules.token(*arguments)


def test_a_function_that_raises_is_called_once():
    calls = []
    with pytest.raises(
        suite.FunctionError, match=r"the function raised on an ordinary batch: KeyError: 'no such table' \(.*:\d+\)"
    ):
        testing.check(lambda *a: calls.append(a) or _raises(*a), requests=64)
    assert len(calls) == 1


def test_what_a_test_raises_is_an_error_and_no_failure():
    """Printed where it happened first; of an error in two tests the second names the first."""
    report = testing.check(_raises_on_nan, tests=["bad_rows", "rows", "one_round"], requests=64)
    assert [(r.name, r.verdict) for r in report.results] == [("rows", "pass"), ("one_round", "pass"), ("bad_rows", "ERROR")]
    assert report.errors == ("bad_rows",) and report.detected_by == () and not report.passed
    assert "ValueError: NaN (" in report.results[-1].text and "the function raised in bad_rows" in report.summary()

    def larger_batches(*arguments):
        if len(arguments[0]) > 2:
            raise ValueError("three are too many")
        return rules.token(*arguments)

    report = testing.check(larger_batches, tests=["rows", "greedy"], requests=64)
    assert report.errors == ("rows", "greedy") and [r.text.startswith("raised as in rows") for r in report.results] == [False, True]


def test_conventions_for_bad_values_stand_apart():
    nan_passes = known_wrong.KNOWN_BAD["nan_passes"]
    report = testing.check(nan_passes, tests=["bad_rows", "rows"], requests=64)
    lines = str(report).splitlines()
    assert lines[0] == "distribution:" and lines[1].startswith("rows         pass")
    assert lines[2].startswith("conventions for bad values") and lines[3].startswith("bad_rows     FAIL")
    assert lines[4].endswith("other conventions for bad values: bad_rows") and "detected by" not in lines[4]


def test_the_command_on_functions_that_raise(tmp_path, monkeypatch, capsys):
    (tmp_path / "functions_that_raise.py").write_text(
        "from dspark_kernels.testing.chain.rules import token\n"
        "def always(*a):\n    raise KeyError('no such table')\n"
        "def on_nan(*a):\n    if a[0].isnan().any():\n        raise ValueError('NaN')\n    return token(*a)\n"
        "def stopped(*a):\n    raise KeyboardInterrupt\n"
    )
    (tmp_path / "broken_module.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert command.main(["functions_that_raise:always", "--quick"]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "KeyError: 'no such table'" in err and "KeyError" not in out and "FAIL" not in out
    assert command.main(["functions_that_raise:on_nan", "--requests", "64", "rows", "bad_rows"]) == 2
    assert capsys.readouterr().out.count("ValueError: NaN") == 1
    assert command.main(["functions_that_raise:stopped", "--quick"]) == 130
    assert capsys.readouterr().err == ("dspark_kernels.testing: stopped; the verdicts that are printed stand, nothing is written\n")
    assert command.main(["broken_module:f"]) == 2
    assert capsys.readouterr().err == "dspark_kernels.testing: function: ZeroDivisionError: division by zero\n"


def example():
    """The wrapper in the suite's documentation, over a verifier of probabilities with a generator of its own."""
    text = suite.__doc__.split("    def mine", 1)[1].split("\n\n", 1)[0]
    generator = torch.Generator().manual_seed(6)

    def verify(packed, draft_tokens, draft_probs, draft_lens):
        count = draft_lens.long() + 1
        first = count.cumsum(0) - count
        index = torch.arange(draft_tokens.shape[1] + 1)
        rows = (first[:, None] + index).clamp(max=len(packed) - 1)
        own = _Own(generator, draft_lens)
        batch = rules.Batch(packed[rows].double(), draft_probs.double(), draft_tokens, draft_lens.long(), own)
        accepted, token = rules.token_rule(batch)
        out = rules.emitted(draft_tokens, accepted, token)
        return type("Out", (), dict(tokens=torch.where(out < 0, 123, out), count=accepted + 1))

    space = dict(torch=torch, verify=verify)
    exec(textwrap.dedent("    def mine" + text), space)
    return space["mine"]


class _Own:
    def __init__(self, generator, lens):
        self.generator, self.count, self.anchor_positions = generator, len(lens), torch.zeros(len(lens), dtype=torch.int64)

    def uniforms(self, count):
        return torch.rand(self.count, count, generator=self.generator, dtype=torch.float64)

    def draw(self, positions, weights):
        return torch.multinomial(weights, 1, generator=self.generator)[:, 0]


def test_the_documented_wrapper_with_a_generator_of_its_own():
    report = testing.check(example(), tests=["rows", "batch", "rounds", "temperature", "noise"], requests=QUICK, unseeded=True)
    assert report.passed, str(report)
    assert [result.verdict for result in report.results] == ["pass", "skip", "pass", "pass", "pass"]


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(rule="fair"), ValueError, "rule: expected one of"),
        (dict(tests=["row"]), ValueError, "tests: expected one of"),
        (dict(requests=10), ValueError, "requests: expected >= 64"),
        (dict(requests=1e4), TypeError, "requests: expected an int"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        testing.check(rules.token, **change)


# ---- the command


def test_command(capsys):
    assert command.main(["dspark_kernels.testing.chain.rules:greedy"]) == 0
    out = capsys.readouterr().out
    assert "greedy rule, 131072 requests per distribution" in out and "7 of 7 tests passed" in out
    wrong = "dspark_kernels.testing.known_wrong:block_first_reject"
    assert command.main([wrong, "--requests", str(QUICK), "one_round", "rows", "--skip", "rows"]) == 1
    out = capsys.readouterr().out
    assert "one_round    FAIL" in out and "detected by one_round" in out and "rows " not in out
    right = "dspark_kernels.testing.chain.rules:token"
    assert command.main([right, "--schedule", "dspark_kernels.testing.known_wrong:retrospective", "prefix", "--quick"]) == 1
    assert command.main([right, "--dtype", "bfloat16", "--requests", "512", "--unseeded", "batch", "widths"]) == 0
    assert "batch        skip" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: module:function"),
        (["rules"], "function: expected module:function, got 'rules'"),
        (["no_such_module:f"], "No module named 'no_such_module'"),
        (["dspark_kernels.testing.chain.rules:no_such"], "no attribute 'no_such'"),
        (["dspark_kernels.testing.chain.rules:VOCAB_BLOCK"], "expected a function, got int"),
        (["dspark_kernels.testing.chain.rules:token", "row"], "tests: expected some of rows, greedy"),
        (["dspark_kernels.testing.chain.rules:token", "--requests", "3"], "--requests: expected >= 64, got 3"),
        (["dspark_kernels.testing.chain.rules:token", "--device", "gpu"], "--device: expected a device that torch has here"),
        (["dspark_kernels.testing.chain.rules:token", "--seed", str(1 << 40)], "--seed: expected a 32-bit integer"),
    ],
)
def test_command_with_bad_arguments(arguments, message, capsys):
    assert command.main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and err.startswith("dspark_kernels.testing: ")


def test_command_without_triton(tmp_path):
    """In a fresh process, on a function of the current directory."""
    (tmp_path / "mine.py").write_text("from dspark_kernels.testing.chain.rules import greedy as verify\n")
    code = "import sys, runpy; sys.modules['triton'] = None; sys.argv[1:] = ['mine:verify', 'rows']\n"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code + "runpy.run_module('dspark_kernels.testing', run_name='__main__')"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "1 of 1 tests passed" in done.stdout, done.stdout + done.stderr
