"""The conformance suite on draft trees: its parts against the reference, what passes, the known-bad rules it detects."""

import math
import textwrap

import pytest
import torch

from dspark_kernels import testing
from dspark_kernels.choices import DRAWN
from dspark_kernels.testing import __main__ as command, chain, interpreter, ours, run, statistics, suite
from dspark_kernels.testing.tree import distributions, known_wrong, models, rules
from dspark_kernels.types import SamplingTensors, Stream
from reference import accept, layout as layouts, philox, tree as reference
from reference.cases import accept_tree_case
from reference.enumeration import EnumeratingSource, emitted_distribution
from reference.tree_enumeration import TreeDecoder

QUICK = 4096  # requests per distribution
SAMPLED = ("walk", "recursive", "traversal")
RULES = (*SAMPLED, "greedy_tree")


def plain(rule):
    return rules.greedy if rule == "greedy_tree" else getattr(rules, rule)


# ---- parts against the reference


def test_noise_is_the_reference_s():
    seeds = torch.tensor([0, 1, -1, 1 << 40, -(1 << 63), 987654321987654321])
    anchors, depths = torch.tensor([0, 5, 2**31, 7, 8, 9]), torch.tensor([[0, 1, 1, 2]]).repeat(6, 1)
    noise = rules.Noise(seeds, anchors)
    uniforms, nodes = noise.node_uniforms(depths), torch.tensor([0, 1, 2, 3, 62, 63])
    words = noise.at(nodes).words(Stream.CORRECT, anchors + 3, 7)
    for r, seed in enumerate(seeds.tolist()):
        anchor = int(anchors[r])
        assert torch.equal(words[r], philox.words(seed, torch.arange(7), anchor + 3, anchor, Stream.CORRECT, int(nodes[r])))
        for node in range(4):
            lane = torch.zeros(1, dtype=torch.int64)
            word = philox.words(seed, lane, anchor + int(depths[r, node]), anchor, Stream.ACCEPT, node)
            assert uniforms[r, node] == philox.uniform(word)[0]


def padded(case):
    """The arguments of a tree acceptance function from a packed case; rows of nodes that do not exist are NaN."""
    layout, tree = case.layout, case.tree
    requests, nodes = tree.tokens.shape
    target = torch.full((requests, nodes, case.target_logits.shape[1]), math.nan, dtype=case.target_logits.dtype)
    tokens, counts, positions = tree.tokens.clone(), layout.draft_lens + 1, torch.zeros(requests, dtype=torch.int64)
    for r in range(requests):
        first, start, count = int(layout.cu_num_logits[r]), int(layout.query_start_loc[r]), int(counts[r])
        target[r, :count] = case.target_logits[first : first + count]
        tokens[r, :count] = layout.token_ids[start : start + count]
        positions[r] = layout.positions[start]
    draft_logits = getattr(tree.proposal, "logits", None)
    sampling = case.sampling
    return target, tokens, tree.parents, draft_logits, tree.drawn, sampling.temperature, sampling.seed, counts, positions


@pytest.mark.parametrize("drawn", DRAWN)
@pytest.mark.parametrize("rule", SAMPLED)
def test_rules_are_the_reference_s(rule, drawn):
    lengths = set()
    for seed, vocab, closeness, wide in ((1, 5, 0.9, 9), (2, 40, 0.4, None), (3, 1500, 0.8, None)):
        case = accept_tree_case(
            seed, 24, 7, vocab, drawn, rule, closeness=closeness, draft_vocab=wide, sharpness=1.5, reach=3,
            temperatures=(1.0, 1.0, 0.0, 0.5, 1.5),
        )  # fmt: skip
        starts = case.layout.query_start_loc.tolist()
        if wide:
            for r in range(3, 24, 2):  # tokens that the drafter alone has
                case.layout.token_ids[starts[r] + 1 : starts[r + 1] : 2] = vocab + 1
            for r in range(14, 24, 2):  # nothing is known of the root's distribution, and a child is what is emitted then
                case.target_logits[int(case.layout.cu_num_logits[r])] = math.nan
                case.layout.token_ids[starts[r] + 1 : starts[r + 1]] = 0
        for r, ids, value in ((9, slice(None), math.nan), (11, slice(0, None, 2), -math.inf), (13, 3, math.inf)):
            case.target_logits[int(case.layout.cu_num_logits[r]), ids] = value
        want = reference.accept_tree(**case.arguments()).tokens
        assert torch.equal(plain(rule)(*padded(case)), want)
        lengths |= set((want >= 0).sum(1).tolist())
    assert len(lengths) > (1 if rule == "walk" or drawn == "one_hot" else 2)  # deterministic trees are walked


@pytest.mark.parametrize("rule", ["recursive", "traversal"])
def test_siblings_of_a_wider_draft_distribution(rule):
    """What the elder ones leave is a share of all of the drafter's ids, those that the target does not have among them."""
    both = []

    def play(node_logits, tokens, parents, draft_logits, drawn, heat, seeds, counts, positions):
        plain_tokens = plain(rule)(node_logits, tokens, parents, draft_logits, drawn, heat, seeds, counts, positions)
        tree = ours._tree(tokens, parents, draft_logits, drawn, counts)
        layout = layouts.tree_layout(tree, anchor_positions=positions)
        packed = node_logits[torch.arange(tokens.shape[1]) < counts[:, None]]
        want = reference.accept_tree(packed, layout, tree, sampling=SamplingTensors(heat, seeds), rule=rule).tokens
        both.append((plain_tokens, want))
        return want

    seeds, shape = torch.arange(120) * 7919, (-1, 0, 0, 0, 1)
    for kind in ("iid", "without_replacement"):
        toy = models.TreePlay.of(play, chain.distributions.WIDTHS["wider"], (shape,), kind=kind)
        toy.round(torch.zeros_like(seeds), seeds, torch.full_like(seeds, 7))
    assert all(torch.equal(have, want) for have, want in both)


@pytest.mark.parametrize("drawn", DRAWN)
@pytest.mark.parametrize("shape", [distributions.SECOND, distributions.ODD[:5]])
def test_what_is_accepted_is_the_reference_s(shape, drawn):
    model = chain.models.random_model(5, 3, 1.5)
    target_probs, draft_probs = model.target_probs(), model.draft_probs()
    for rule in SAMPLED:
        toy = TreeDecoder(
            lambda c: target_probs[c[-1]], lambda c: draft_probs[c[-1]], reference.RULES[rule], shape, (drawn,) * len(shape)
        )
        emitted = emitted_distribution(toy, (chain.models.PROMPT,))
        mean = sum(probability * (len(tokens) - 1) for tokens, probability in emitted.items())
        square = sum(probability * (len(tokens) - 1) ** 2 for tokens, probability in emitted.items())
        want = (mean, math.sqrt(square - mean**2))
        assert models.mean_accepted(rule, model, shape, drawn) == pytest.approx(want, abs=1e-12), rule
        assert mean == pytest.approx(toy.mean_accepted((chain.models.PROMPT,), EnumeratingSource), abs=1e-12)


def test_the_distribution_of_block_verification_is_the_reference_s():
    target_probs, draft_probs = distributions.BLOCK.target_probs(), distributions.BLOCK.draft_probs()

    def block(target_probs, draft_probs, tree, source, anchor_position):
        verdict = accept.block_rule(torch.stack(target_probs), draft_probs[1:], tree.tokens[1:], source, anchor_position)
        return reference.TreeVerdict(tuple(range(verdict.num_accepted + 1)), verdict.token)

    toy = TreeDecoder(lambda c: target_probs[c[-1]], lambda c: draft_probs[c[-1]], block, distributions.CHAIN, ("iid",) * 3)
    want = emitted_distribution(toy, (chain.models.PROMPT,))
    probabilities, outcomes = models.block_probs(distributions.BLOCK, 2)
    have = {outcome: probability for outcome, probability in zip(outcomes, probabilities.tolist(), strict=True) if probability > 0}
    assert have == pytest.approx({outcome: probability for outcome, probability in want.items() if probability > 0}, abs=1e-12)


def test_trees_are_drawn_from_the_distributions_that_are_handed_over():
    """Pairs of siblings against q q' and q q' / (1 - q); subtrees where the confidence says so, the others at the end."""
    model, seeds = chain.models.random_model(5, 3, 1.0), torch.arange(20000) * 7919
    q = model.draft_probs()[chain.models.PROMPT]
    zero, heat = torch.zeros_like(seeds), torch.ones(len(seeds))
    for kind in ("iid", "without_replacement"):
        play = models.TreePlay.of(None, model, (distributions.PAIR,), kind=kind)
        tokens, _, there = play.grow(zero, seeds, zero + 3, heat)
        probs = q[:, None] * q if kind == "iid" else (q[:, None] * q / (1 - q[:, None])).fill_diagonal_(0)
        counts = torch.bincount(tokens[:, 1] * 3 + tokens[:, 2], minlength=9)
        assert there.all() and all(f.p_value > 1e-4 for f in statistics.compare("", counts, probs, suite.LEVEL))
    seen = []
    cut = models.TreePlay.of(lambda *a: seen.append(a) or a[1] * 0, distributions.PREFIX, (distributions.DEEP,), cut=True)
    cut.round(zero, seeds, zero + 3)
    _, tokens, parents, _, _, _, _, counts, _ = seen[0]
    keeps = (distributions.PREFIX.confidence >= 0.5)[tokens]
    for r in range(300):
        want = [-1, 0, 0, *(node for node in (1, 2) if keeps[r, node])]
        if keeps[r, 2] and keeps[r, len(want) - 1]:
            want.append(len(want) - 1)
        assert parents[r, : counts[r]].tolist() == want
    assert set(counts[:300].tolist()) == {3, 4, 5, 6}


# ---- what passes


@pytest.mark.parametrize("rule", RULES)
def test_plain_rules_pass(rule):
    report = testing.check(plain(rule), requests=1024)
    assert report.passed, str(report)
    assert [r.name for r in report.results] == [name for name, (_, of, _) in suite.TREE_TESTS.items() if rule in of]
    assert sum(result.findings for result in report.results) <= suite.FINDINGS


def test_ours_pass():
    """The kernel in the interpreter, on what takes it seconds; all of the suite takes minutes there."""
    pytest.importorskip("triton")
    report = testing.check(ours.greedy_tree, tests=["greedy"], drawn=("without_replacement",))
    assert report.passed, str(report)


def test_our_adapter_hands_everything_over():
    """Trees of several shapes and sizes, rows of a wider buffer, ids that the drafter alone has: the plain rules, draw by draw."""
    pytest.importorskip("triton")
    calls = []

    def both(*arguments):
        node_logits, tokens, parents, draft_logits, drawn, temperature, *rest = arguments
        wide = torch.cat([node_logits, node_logits], 2)[..., : node_logits.shape[2]]
        heat = torch.where(torch.arange(len(tokens)) % 4 == 3, 0.0, temperature)
        rule = SAMPLED[len(calls) % 3]
        want = plain(rule)(wide, tokens, parents, draft_logits, drawn, heat, *rest)
        assert torch.equal(getattr(ours, rule)(wide, tokens, parents, draft_logits, drawn, heat, *rest), want)
        calls.append((want >= 0).sum(1))
        return want

    seeds = torch.arange(8) * 31
    for drawn in DRAWN:
        play = models.TreePlay.of(both, chain.distributions.WIDTHS["wider"], distributions.MIXED, kind=drawn, temperature=0.8)
        play.round(torch.zeros_like(seeds), seeds, torch.full_like(seeds, 7))
    assert len(set(torch.cat(calls).tolist())) >= 3
    assert suite.default_requests(ours.walk) == (ours.INTERPRETED_REQUESTS if interpreter.interpreting() else suite.REQUESTS)


def test_links_of_our_adapter_are_a_tree_s():
    case = accept_tree_case(4, 6, 9, 30, "iid", "recursive", temperatures=(1.0,))
    want, _, parents, draft_logits, drawn, _, _, counts, _ = case.tree, *padded(case)[1:]
    parents = torch.where(torch.arange(9) < counts[:, None], parents, 0)  # garbage behind
    have = ours._tree(want.tokens, parents, draft_logits, drawn, counts)
    inside = torch.arange(9) < counts[:, None]
    for name in ("parents", "depths", "first_child", "next_sibling", "ancestors"):
        assert torch.equal(getattr(have, name)[inside], getattr(want, name)[inside]), name


# ---- what it detects

# Known-bad rule -> tests that must each detect it, and requests where QUICK shows too little.
DETECTED_BY = {
    "draw_with_draft_noise": ("noise",),
    "position_only_noise": ("rounds",),
    "one_uniform_for_siblings": ("siblings",),
    "one_uniform_per_depth": ("siblings",),
    "one_uniform_per_tree": ("chain",),
    "noise_by_row": ("batch",),
    "low_word_of_seed": ("noise",),
    "gumbel_floor": ("tails",),
    "equality_passes": ("tails",),
    "drawn_sibling_stays": ("one_round", "siblings"),
    "drawn_sibling_stays_in_traversal": ("one_round", "filters"),
    "sibling_distribution_not_normalised": ("one_round", "filters"),
    "independent_taken_for_distinct": ("one_round", "unequal"),
    "nothing_taken_out": ("one_round", "accepts"),
    "draft_cut_to_the_targets_ids": ("widths",),
    "distribution_of_the_childs_row": ("one_round", "chain"),
    "distribution_ignored": ("accepts",),
    "duplicates_merged": ("siblings",),
    "residual_not_normalised": ("one_round", "siblings"),
    "siblings_against_the_whole_target": ("one_round", "siblings"),
    "youngest_sibling_first": ("one_round", "siblings"),
    "walk_to_the_first_child": ("rows", "unequal"),
    "token_from_the_parents_row": ("rows", "unequal"),
    "token_from_the_targets_distribution": ("one_round", "prefix"),
    "traversal_divided_by_the_child": ("one_round", "chain"),
    "traversal_restarts": ("unequal", "chain"),
    "traversal_without_prefix_probability": ("one_round", "chain"),
    "traversal_of_first_children": ("accepts",),
    "traversal_draws_from_the_target": ("prefix", "chain"),
    "recursive_for_traversal": ("accepts", "chain"),
    "always_rejects": ("rows", "accepts"),
    "last_id_without_residual": ("residual",),
    "all_nodes_verified": ("empty", "prefix"),
    "at_least_one_child": ("empty", "unequal"),
    "one_shape_for_all": ("rows", "batch", "unequal"),
    "temperature_on_target_only": ("temperature",),
    "draft_distribution_rounded": ("temperature",),
    "nan_wins": ("bad_rows",),
    "masked_tokens_drawn": ("filters", "tails"),
    "strides_ignored": ("padding",),
    "scaled_in_half": ("extreme",),
    "greedy_rows_sampled": ("greedy",),
    "greedy_highest_tie": ("greedy",),
    "one_noise_for_siblings": ("siblings", "accepts"),
    "drawn_again": ("one_round", "siblings"),
    "draft_position_only": ("rounds",),
    "best_of_what_is_left": ("rounds", "siblings"),
}
REQUESTS = {"draw_with_draft_noise": 1 << 13, "draft_position_only": 1 << 13, "gumbel_floor": 1 << 13}


@pytest.mark.parametrize("name", DETECTED_BY)
def test_a_known_bad_rule_is_detected(name):
    function, how = known_wrong.KNOWN_BAD.get(name, rules.traversal), {}
    if name in known_wrong.DRAFTS:
        how = dict(draft=known_wrong.DRAFTS[name])
    report = testing.check(function, tests=DETECTED_BY[name], requests=REQUESTS.get(name, QUICK), **how)
    assert report.detected_by == tuple(DETECTED_BY[name]) and not report.passed, str(report)


def test_every_known_bad_rule_is_tried_and_every_test_detects_one():
    assert DETECTED_BY.keys() == known_wrong.KNOWN_BAD.keys() | known_wrong.DRAFTS.keys()
    assert {test for tests in DETECTED_BY.values() for test in tests} == suite.TREE_TESTS.keys()


# ---- what it says about functions that break


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda *a: None, "expected tokens in int64 or int32, got NoneType"),
        (lambda *a: rules.walk(*a)[:, :-1], "expected tokens [30, 6], got [30, 5]"),
        (lambda *a: rules.walk(*a) * 0 - 1, "no token: 30 of 30 requests"),
        (lambda *a: rules.walk(*a).clamp(min=-1) + 20, "an id beyond the vocabulary"),
        (lambda *a: rules.walk(*a).flip(1), "something else than -1 behind the tokens"),
        (lambda *a: rules.walk(*a).sort(1, descending=True).values, "a path that is none of the tree's"),
        (lambda *a: a[1] + 0 * a[1][:, :1], "a path that is none of the tree's"),
    ],
)
def test_output_that_is_none(function, message):
    report = testing.check(function, rule="walk", tests=["rows"], requests=64)
    assert report.detected_by == ("rows",) and message in report.results[0].text, str(report)


def test_paths_through_siblings_that_are_alike():
    tree = run.TreeRun(None, "walk", run.Settings(64, 0, "cpu", None, None, torch.float32), drawn=("iid",))
    tokens, parents = torch.tensor([[9, 4, 4, 5, 6]]), torch.tensor([[-1, 0, 0, 2, 1]])
    for out, count, good in (([4, 5, 0], 5, True), ([4, 6, 0], 5, True), ([4, 6, 0], 4, False), ([4, 5, 6, 0], 5, False)):
        padded_out = torch.tensor([out + [-1] * (5 - len(out))])
        found = tree._is_path(padded_out, torch.tensor([len(out)]), tokens, parents, torch.tensor([count]))
        assert bool(found[0]) is good


def example():
    """The wrapper in the suite's documentation, over a verifier of probabilities with a generator of its own."""
    text = suite.__doc__.split("    def mine")[2].split("\n\n", 1)[0]
    generator = torch.Generator().manual_seed(6)

    def verify_tree(target_probs, tokens, parents, num_nodes):
        requests, nodes, vocab = target_probs.shape
        draws = torch.multinomial(target_probs.flatten(0, 1), 1, generator=generator).view(requests, nodes)
        path, length = torch.full_like(tokens, -1), torch.zeros_like(tokens[:, 0])
        path[:, 0] = 0
        for child in range(1, nodes):
            node = chain.rules.at(path, length)
            goes = (child < num_nodes) & (parents[:, child] == node) & (tokens[:, child] == chain.rules.at(draws, node))
            length = length + goes
            path[torch.arange(requests), length] = torch.where(goes, child, chain.rules.at(path, length))
        return type("Out", (), dict(draws=draws, path=path, length=length))

    space = dict(torch=torch, verify_tree=verify_tree)
    exec(textwrap.dedent("    def mine" + text), space)
    return space["mine"]


def test_the_documented_wrapper_with_a_generator_of_its_own():
    report = testing.check(example(), tests=["rows", "batch", "unequal", "temperature"], requests=QUICK, unseeded=True)
    assert report.passed, str(report)
    assert report.rule == "walk" and [result.verdict for result in report.results] == ["pass", "skip", "pass", "pass"]


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(tests=["shared"]), ValueError, "tests: expected one of"),
        (dict(tests=["chain"], rule="token"), ValueError, "tests: expected one of"),
        (dict(drawn=["top_k"]), ValueError, "drawn: expected one of"),
        (dict(schedule=chain.models.schedule), ValueError, "schedule: expected None"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        testing.check(rules.walk, **change)


def test_only_the_ways_that_a_function_is_for():
    seen = set()

    def sampled_only(*arguments):
        seen.add(arguments[4])
        return rules.recursive(*arguments)

    sampled_only.rule, sampled_only.drawn = "recursive", ("iid",)
    report = testing.check(sampled_only, requests=64)
    assert report.passed and seen == {"iid"}, str(report)
    assert testing.check(sampled_only, requests=64, drawn=("one_hot",)).passed and seen == {"iid", "one_hot"}


# ---- the command


def test_command(capsys):
    assert command.main(["dspark_kernels.testing.tree.rules:greedy"]) == 0
    out = capsys.readouterr().out
    assert "greedy_tree rule, 131072 requests per distribution" in out and "7 of 7 tests passed" in out
    wrong = "dspark_kernels.testing.known_wrong_tree:traversal_divided_by_the_child"
    assert command.main([wrong, "--requests", str(QUICK), "chain", "--drawn", "iid"]) == 1
    assert "chain        FAIL" in capsys.readouterr().out
    right = "dspark_kernels.testing.tree.rules:walk"
    assert command.main([right, "--requests", "256", "--dtype", "bfloat16", "widths", "chain"]) == 0
    assert "chain        skip" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["shared"], "tests: expected some of rows, greedy"),
        (["--drawn", "iid,top_k"], "--drawn: expected some of one_hot, iid, without_replacement, got 'top_k'"),
        (["--schedule", "dspark_kernels.testing.chain.models:schedule"], "--schedule: not for the walk rule"),
    ],
)
def test_command_with_bad_arguments(arguments, message, capsys):
    assert command.main(["dspark_kernels.testing.tree.rules:walk", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_function_that_raises_is_called_once():
    calls = []
    with pytest.raises(suite.FunctionError, match="the function raised on an ordinary batch: TypeError"):
        testing.check(lambda *a: calls.append(a) or None + 1, rule="walk", drawn=("one_hot",), requests=64)
    assert len(calls) == 1 and calls[0][3] is None
