"""The checks of `python -m bench.decode`: they pass for right systems and detect wrong ones; and the embedded models."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from bench import assets
from bench.assets.build_plan import LIMIT
from bench.decode import lossless
from bench.shared import summary
from bench.shared.parity import CheckedOps
from reference import attention, compact, loop
from reference.drafters import Autoregressive, DSpark, TreeShape
from reference.model import Rows, Target

# --- the checks -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models():
    config, tensors = assets.weights("target")
    target = Target(config, tensors)
    exact = Target(config, tensors, dtype=torch.float64)
    prompts = [assets.tokenizer().encode(text) for text in assets.prompts()[:8]]
    return SimpleNamespace(target=target, exact=exact, prompts=prompts, drafter=DSpark(*assets.weights("dspark"), target))


def _decode(models, drafter, temperature, **options):
    requests = [loop.Request(p, 48, temperature, seed=i) for i, p in enumerate(models.prompts)]
    return loop.decode(models.target, drafter, requests, **options)


def test_sampled_check_detects_biased_acceptance(models):
    """Every draft accepted: what comes out is the drafter's text."""
    greedy_gift = loop.REFERENCE_OPS.accept_chain

    def accept_all(target_logits, layout, proposal, **options):
        liked = target_logits.clone()
        for row, forward in enumerate(layout.logits_indices[: len(liked)].tolist()):
            following = forward + 1
            same = following < int(layout.num_rows) and layout.batch_indices[following] == layout.batch_indices[forward]
            if same and layout.positions[following] > 64:
                liked[row, layout.token_ids[following]] += 50.0
        return greedy_gift(liked, layout, proposal, **options)

    ops = SimpleNamespace(**{**vars(loop.REFERENCE_OPS), "accept_chain": accept_all})
    plain = _decode(models, Autoregressive(), 1.0)
    assert lossless.sampled(_decode(models, models.drafter, 1.0), plain).passed
    assert not lossless.sampled(_decode(models, models.drafter, 1.0, ops=ops), plain).passed


def test_greedy_check_detects_a_second_best_token(models):
    plain = _decode(models, Autoregressive(), 0.0)
    same = lossless.greedy(plain, plain, models.target, models.exact)
    assert same.passed and same.text.startswith("8 of 8 texts identical")
    changed = _decode(models, Autoregressive(), 0.0)
    at = len(models.prompts[3]) + 5
    row = lossless._last_logits(models.exact, changed[3].output_ids[:at])
    changed[3].output_ids[at] = int(row.topk(2).indices[1])
    verdict = lossless.greedy(changed, plain, models.target, models.exact)
    assert not verdict.passed and f"prompt 3 differs at token {at}" in verdict.text
    short = _decode(models, Autoregressive(), 0.0)
    short[0].output_ids.pop()
    assert not lossless.greedy(short, plain, models.target, models.exact).passed


def test_greedy_check_counts_ties_of_rounding(models):
    """Two equal columns of the head: which of them wins is a matter of rounding, and is counted as such."""
    plain = _decode(models, Autoregressive(), 0.0)
    at, token = len(models.prompts[2]), plain[2].output_ids[len(models.prompts[2])]
    twin = (token + 1) % 1024
    config, tensors = assets.weights("target")
    head = tensors["model.embed_tokens.weight"].clone()
    head[twin] = head[token]
    config = config | {"tie_word_embeddings": False}
    tensors = tensors | {"lm_head.weight": head}
    target, exact = Target(config, tensors), Target(config, tensors, dtype=torch.float64)
    changed = _decode(models, Autoregressive(), 0.0)
    changed[2].output_ids[at] = twin
    verdict = lossless.greedy(changed, plain, target, exact)
    assert verdict.passed and "7 of 8 texts identical to plain decoding, 1 part at a tie" in verdict.text


def test_summary_by_hand():
    generation = loop.Generation(
        [], acceptance_lengths=[3, 1, 2, 4], proposal_lengths=[3, 3, 1, 3], draft_passes=4, target_passes=4,
        draft_seconds=0.4, verify_seconds=0.6,
    )  # fmt: skip
    have = summary.Summary.of([generation])
    assert have.tokens_per_round == 2.5 and math.isclose(have.standard_error, math.sqrt((0.25 + 2.25 + 0.25 + 2.25) / 3 / 4))
    assert have.acceptance == [3 / 4, 2 / 2, 1 / 2]  # the third round verified one draft: it says nothing of the second
    generation.proposal_lengths, generation.proposal_depths = [6, 6, 6, 6], [3, 3, 1, 3]  # trees of six drafts
    assert summary.Summary.of([generation]).acceptance == have.acceptance
    assert have.target_passes_per_token == 0.4 and have.draft_passes_per_round == 1 and have.verified_per_round == 2.5
    assert math.isclose(have.draft_ms, 100) and math.isclose(have.verify_ms, 150) and math.isclose(have.tokens_per_second, 10)


# --- the embedded models ----------------------------------------------------------------------------------------------


def test_weights_are_small_and_int8():
    files = list(assets.FOLDER.glob("*.npz"))
    one_backbone = {"dspark_gated", "dspark_rnn"}  # heads on the backbone of dspark
    assert {file.stem for file in files} - one_backbone == {"target", "draft_model", "mtp", "block", "dspark"}
    assert sum(file.stat().st_size for file in files) <= LIMIT


def test_quantised_rows_are_within_half_a_step():
    from bench.assets.quantise import quantise

    torch.manual_seed(0)
    tensor = torch.randn(40, 70) * torch.logspace(-6, 3, 40)[:, None]
    tensor[7] = 0
    values, scale = quantise(tensor)
    back = torch.from_numpy(values).float() * torch.from_numpy(scale)[:, None]
    assert ((back - tensor).abs() <= tensor.abs().amax(1, keepdim=True) / 254 * 1.0001).all() and (back[7] == 0).all()


def test_the_target_was_trained_on_such_text(models):
    """The nats per token that were measured on held-out text before quantisation; a uniform guess is 6.93."""
    record = assets.FOLDER.parent / "results" / "build.json"
    measured = 2.78  # of the models that were trained before there was a record
    if record.is_file():
        measured = json.loads(record.read_text())["stages"]["target"]["held_out_nats_of_64_tokens"]["code"]
    losses = []
    for text in assets.prompts():
        token_ids = torch.tensor(assets.tokenizer().encode(text))
        rows = Rows.of([(0, 0, len(token_ids))], "cpu")
        logits = models.target.logits(models.target.forward(token_ids, rows, models.target.new_cache(1)).hidden)
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], token_ids[1:]).item())
    mean = sum(losses) / len(losses)
    error = torch.tensor(losses).std().item() / math.sqrt(len(losses))
    assert mean - measured <= 4 * error, f"{mean:.2f} ±{error:.2f} nats"


def test_tokenizer_gives_the_text_back():
    tokenizer = assets.tokenizer()
    assert tokenizer.vocab == 1024
    for text in [*assets.prompts(), "", "né ☃ \t\r\n  x  1234 __init__ != ::=\n\n", "def f():\n    return None\n"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # Merges are applied in order: four spaces are one token, and "def" with its space too.
    assert len(tokenizer.encode("    return self")) <= 4
    assert len(assets.prompts()) == 32 and all(len(tokenizer.encode(text)) == 64 for text in assets.prompts())


@pytest.mark.parametrize("fault", ["none", "a child", "a row", "a path", "a cache"])
def test_wrong_trees_are_seen(models, fault):
    """Every call of the tree ops is held to the reference."""
    ops = SimpleNamespace(**vars(loop.REFERENCE_OPS))

    def draft_tree(*arguments, **options):
        tree = loop.REFERENCE_OPS.draft_tree(*arguments, **options)
        if fault == "a child":
            tree.tokens[options["state_indices"][0], 2] += 1
        return tree

    def tree_layout(*arguments, **options):
        layout = loop.REFERENCE_OPS.tree_layout(*arguments, **options)
        if fault == "a row":
            layout.positions[int(layout.num_rows) - 1] += 1
        return layout

    def accept_tree(*arguments, **options):
        acceptance = loop.REFERENCE_OPS.accept_tree(*arguments, **options)
        if fault == "a path" and int(acceptance.num_accepted[0]):
            acceptance.path[0, 1] += 1
        return acceptance

    def compact_kv(layers, acceptance, layout):
        compact.compact_kv(layers.caches, acceptance, layout)
        if fault == "a cache":
            layers.caches[1][0, 0] += 1.0

    def tree_attention(q, *arguments, plan, **options):
        return attention.tree_attention(q, *arguments, **options).to(q.dtype)

    ops.draft_tree, ops.tree_layout, ops.accept_tree, ops.compact_kv = draft_tree, tree_layout, accept_tree, compact_kv
    ops.plan_attention, ops.tree_attention = lambda *arguments, **options: None, tree_attention
    checked, requests = CheckedOps(ops), [loop.Request(p, 6, 0.0) for p in models.prompts[:2]]

    def run():
        loop.decode(models.target, models.drafter, requests, tree=TreeShape(5), ops=checked)
        assert checked.calls > 20

    if fault == "none":
        run()
    else:
        with pytest.raises(AssertionError):
            run()
