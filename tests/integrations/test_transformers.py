"""dspark_kernels.integrations.transformers against plain generate: the same greedy texts, the same distribution of sampled ones.

Targets are tiny random models of transformers' own classes. Their drafter's sequential head is the target's table of next tokens by
the last one, so that drafts are accepted, corrected and refused. Where the ops are not what is tested, the reference's do their work:
they take a tenth of the time in Triton's interpreter, and draw the same tokens (`test_kernels_draw_as_the_reference_does`, and the
tests of the ops). Skipped where transformers is not installed; nothing is fetched.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import assets
from tests import directories as made

transformers = pytest.importorskip("transformers", reason="needs transformers, which is not installed")
pytest.importorskip("safetensors.torch", reason="needs safetensors, which is not installed")

from dspark_kernels.checkpoint import load_drafter  # noqa: E402
from dspark_kernels.integrations.transformers import DSpark, captured, rounds, settings  # noqa: E402
from dspark_kernels.integrations.transformers.backbone import Backbone  # noqa: E402
from dspark_kernels.integrations.transformers.cache import PositionCache  # noqa: E402
from dspark_kernels.testing import statistics  # noqa: E402
from reference.drafters import Anchors, Block, Committed, DSpark as ReferenceDSpark  # noqa: E402
from reference.huggingface import HuggingFaceTarget  # noqa: E402
from reference.loop import REFERENCE_OPS, Request, decode  # noqa: E402
from reference.model import Rows, Target  # noqa: E402
from tests.integrations import recorded  # noqa: E402

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT.parent / "shared" / "golden" / "qwen3_tiny"
VOCAB, RANK = made.VOCAB, 24
SIZES = dict(
    hidden_size=24,
    intermediate_size=36,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_hidden_layers=2,
    max_position_embeddings=64,
)
SPECIAL = dict(vocab_size=VOCAB, bos_token_id=None, eos_token_id=None, pad_token_id=0)
# Texts are longer than the windows, and Gemma's two layers are of two kinds.
FAMILIES = {
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        dict(sliding_window=5, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8),
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", dict(sliding_window=5)),
    # Positions are embedded, and there is none past the end of the longest text of the test.
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", dict(n_embd=24, n_layer=2, n_head=4, n_positions=8 + 14, tie_word_embeddings=False)),
}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1], [18, 28, 18, 2, 11], [31]]


def target_of(family, attention="sdpa"):
    name, config, more = FAMILIES[family]
    torch.manual_seed(5)
    own = getattr(transformers, config)(**({} if family == "gpt2" else SIZES), **SPECIAL, **more, attn_implementation=attention)
    model = getattr(transformers, name)(own).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Gemma's norms add one to their weights.
            near = 0.0 if family == "gemma3" else 1.0
            parameter.copy_(0.4 * torch.randn_like(parameter) if parameter.ndim > 1 else near + 0.1 * torch.randn_like(parameter))
        # The last token says most of what follows, and attention the rest. Gemma scales its embedding itself.
        model.get_input_embeddings().weight *= 1 if family == "gemma3" else 8
        for name, parameter in model.named_parameters():
            if name.endswith("o_proj.weight"):
                parameter *= 0.3
    return model


def drafter_of(model, directory, **changes):
    """A directory with a drafter for the model; its backbone's own say is small."""
    config, shapes = made.dspark(num_target_layers=2, target_layer_ids=[-1, 1], markov_rank=RANK, **changes)
    shapes |= {name: [VOCAB, RANK] for name in made.TABLES} | {"confidence_head.proj.weight": [1, 24 + RANK]}
    weights = made.tensors(shapes, seed=2)
    with torch.no_grad():
        left, sizes, right = torch.linalg.svd(model(input_ids=torch.arange(VOCAB)[:, None]).logits[:, -1], full_matrices=False)
    weights["markov_head.markov_w1.weight"] = (left * sizes)[:, :RANK].contiguous()
    weights["markov_head.markov_w2.weight"] = right[:RANK].T.contiguous()
    weights["lm_head.weight"] *= 0.3
    return made.write(directory, config, weights)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    model = target_of("qwen3")
    return model, DSpark.from_pretrained(drafter_of(model, tmp_path_factory.mktemp("drafter")), model)


def overwrite(old, new):
    for name, value in vars(new).items():
        if isinstance(value, torch.Tensor):
            getattr(old, name).copy_(value)
        elif dataclasses.is_dataclass(value):
            overwrite(getattr(old, name), value)


def prepare(op, **example):
    """Of the reference's ops; as those of dk.prepare, a call overwrites the results of the last."""
    kept = []

    def call(**given):
        kept.append(op(**{**example, **given}))
        overwrite(kept[0], kept[-1])
        return kept[0]

    return call


@pytest.fixture
def reference(monkeypatch):
    """Rounds call the reference's ops."""
    own = {name: getattr(REFERENCE_OPS, name) for name in ("draft_block", "accept_chain")}
    monkeypatch.setattr(rounds, "dk", SimpleNamespace(**{**vars(rounds.dk), **own, "prepare": prepare}))


def batch(prompts=PROMPTS):
    """Ids and mask, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return dict(input_ids=ids, attention_mask=mask)


def check_same(model, dspark, inputs, **options):
    """Greedy texts of plain generate and of rounds; returns them."""
    plain = model.generate(**inputs, do_sample=False, **options)
    drafted = model.generate(**inputs, do_sample=False, custom_generate=dspark, **options)
    assert torch.equal(plain, drafted)
    return plain


@pytest.mark.parametrize(
    "family, attention", [("qwen3", "eager"), ("llama", "sdpa"), ("gemma3", "sdpa"), ("mistral", "eager"), ("gpt2", "sdpa")]
)
def test_greedy_batches_of_every_family(tmp_path, family, attention, reference):
    """Four rows of unequal lengths; one of them ends at a stop token."""
    model = target_of(family, attention)
    dspark = DSpark.from_pretrained(drafter_of(model, tmp_path / "d"), model)
    texts = check_same(model, dspark, batch(), max_new_tokens=14)
    seen = dspark.statistics
    assert 0 < sum(seen.accepted) < seen.row_rounds * len(seen.accepted), "nothing accepted, or nothing refused"
    assert seen.new_tokens == 4 * 14 and seen.flags == 0 and seen.tokens_per_round > 1
    stop = int(texts[1, 8 + 5])
    stopped = check_same(model, dspark, batch(), max_new_tokens=14, eos_token_id=[stop, 40])
    assert (stopped == 0).any(1).sum() > 0 and not torch.equal(stopped, texts[:, : stopped.shape[1]])


def test_lengths_of_one_to_nine_tokens(tmp_path, reference):
    """With one draft a round, so that bonus tokens are frequent."""
    model = target_of("gemma3")
    dspark = DSpark.from_pretrained(drafter_of(model, tmp_path / "d"), model, drafts=1)
    for new in range(1, 10):
        assert check_same(model, dspark, batch([PROMPTS[0]]), max_new_tokens=new).shape[1] == 8 + new
    assert sum(dspark.statistics.accepted) > 1


def test_caches_chunks_and_results(qwen3, reference):
    model, dspark = qwen3
    plain = check_same(model, dspark, batch(), max_new_tokens=6)
    for options in (dict(cache_implementation="static"), dict(prefill_chunk_size=3), dict(return_dict_in_generate=True)):
        result = model.generate(**batch(), do_sample=False, max_new_tokens=6, custom_generate=dspark, **options)
        assert torch.equal(plain, result if isinstance(result, torch.Tensor) else result.sequences), options


def test_logits_processors(qwen3, reference):
    """Mapped ones, those on the logits, those that look at lengths and at a row's place in the batch."""
    model, dspark = qwen3
    inputs = batch(PROMPTS[:2])
    free = check_same(model, dspark, inputs, max_new_tokens=8)
    stop = int(free[1, 8 + 1])

    def by_place(row, text):
        return [t for t in range(VOCAB) if (t + row + len(text) + int(text[-1])) % 3]

    for options in (
        dict(repetition_penalty=1.7),
        dict(repetition_penalty=1.7, no_repeat_ngram_size=2, suppress_tokens=[int(free[0, 9])]),
        dict(min_new_tokens=5, eos_token_id=stop),
        dict(prefix_allowed_tokens_fn=by_place),
    ):
        # Long enough for tokens to come again.
        assert not torch.equal(check_same(model, dspark, inputs, max_new_tokens=24, **options)[:, : 8 + 8], free), options


def test_stopping_criteria(qwen3, reference):
    model, dspark = qwen3
    texts = check_same(model, dspark, batch(PROMPTS[:2]), max_new_tokens=9)
    wanted = texts[1, 8 + 3 : 8 + 5]

    class Pair(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return (input_ids[:, -2:] == wanted).all(1)

    inputs = batch(PROMPTS[1:2])
    assert check_same(model, dspark, inputs, max_new_tokens=9, stopping_criteria=[Pair()]).shape[1] <= 3 + 5
    # In a batch a row ends by itself.
    both = model.generate(
        **batch(PROMPTS[:2]), do_sample=False, max_new_tokens=9, stopping_criteria=[Pair()], custom_generate=dspark
    )
    assert both.shape == texts.shape and torch.equal(both[0], texts[0]) and both[1, -1] == 0


@pytest.mark.parametrize("do_sample", [True, False])
def test_the_end_of_the_processors_becomes_settings(do_sample):
    from transformers.generation import logits_process as theirs

    ngrams, penalty = theirs.NoRepeatNGramLogitsProcessor(2), theirs.RepetitionPenaltyLogitsProcessor(1.25)
    warpers = [theirs.TemperatureLogitsWarper(0.75), theirs.TopKLogitsWarper(5), theirs.TopPLogitsWarper(0.5)]
    warpers.append(theirs.MinPLogitsWarper(0.125))
    typical = theirs.TypicalLogitsWarper(0.5)
    seeds = torch.tensor([4, 5])

    def read(*processors):
        return settings.read(processors, do_sample, seeds, 9)

    own, before, _ = read(ngrams, penalty, *warpers)
    assert before == [ngrams] and torch.equal(own.seed, seeds) and own.penalties.repetition.tolist() == [1.25] * 2
    assert own.temperature.tolist() == [0.75 if do_sample else 0] * 2
    filters = [None if value is None else value.tolist() for value in (own.top_k, own.top_p, own.min_p)]
    assert filters == ([[5] * 2, [0.5] * 2, [0.125] * 2] if do_sample else [None] * 3)
    assert read(penalty, ngrams, *warpers).before == [penalty, ngrams]
    assert read(warpers[0], typical, warpers[1]).before == [warpers[0], typical]
    assert read(warpers[1], warpers[0]).before == [warpers[1]]
    two = theirs.TopPLogitsWarper(0.5, min_tokens_to_keep=2)
    assert read(two).before == [two]


def test_padding_is_in_no_column_that_is_seen():
    columns = PositionCache(6).columns(torch.tensor([[0, 0, 1], [5, 6, 9]]), torch.tensor([[False, True, True], [True] * 3]))
    assert columns.tolist() == [[6, 0, 1], [5, 6, 6]]


class Streamer:
    def __init__(self):
        self.got, self.ended = [], 0

    def put(self, tokens):
        self.got.append(tokens.tolist())

    def end(self):
        self.ended += 1


def test_streamer(qwen3):
    model, dspark = qwen3
    plain, drafted = Streamer(), Streamer()
    inputs = batch([PROMPTS[0]])
    model.generate(**inputs, do_sample=False, max_new_tokens=7, streamer=plain)
    model.generate(**inputs, do_sample=False, max_new_tokens=7, custom_generate=dspark, token_streamer=drafted)
    assert drafted.got == plain.got and drafted.ended == plain.ended == 1


def test_seeds(qwen3, reference):
    """A row's tokens depend on its seed, not on the batch; without seeds on torch's generator."""
    model, dspark = qwen3
    options = dict(do_sample=True, temperature=2.0, top_k=0, max_new_tokens=6, custom_generate=dspark)
    first = model.generate(**batch(), **options, seeds=[7, 8, 9, 10])
    turned = model.generate(**batch(PROMPTS[::-1]), **options, seeds=torch.tensor([10, 9, 8, 7]))
    alone = model.generate(**batch(PROMPTS[1:2]), **options, seeds=8)
    assert torch.equal(first, turned.flip(0)) and torch.equal(first[1, 8:], alone[0, 3:])
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model.generate(**batch(), **options))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_coupled_rule(tmp_path, reference):
    """The text does not depend on the drafts, and noise that both share has many of them accepted."""
    model, texts = target_of("qwen3"), []
    directory = drafter_of(model, tmp_path / "d")
    for drafts in (1, 4):
        dspark = DSpark.from_pretrained(directory, model, rule="coupled", drafts=drafts)
        texts.append(
            model.generate(**batch(), do_sample=True, temperature=1.5, top_k=0, max_new_tokens=12, custom_generate=dspark, seeds=1)
        )
        assert dspark.statistics.acceptance_by_position[0] > 0.25
    assert torch.equal(*texts)


def test_kernels_draw_as_the_reference_does(tmp_path, request):
    """A sampled batch with every setting that is mapped."""
    model = target_of("qwen3")
    dspark = DSpark.from_pretrained(drafter_of(model, tmp_path / "d"), model, drafts=2)
    options = dict(do_sample=True, temperature=1.5, top_k=9, top_p=0.9, min_p=0.02, repetition_penalty=1.2, seeds=3)
    drawn = []
    for _ in ("kernels", "reference"):
        texts = model.generate(**batch(PROMPTS[:2]), max_new_tokens=4, custom_generate=dspark, **options)
        drawn.append((texts.tolist(), dspark.statistics))
        request.getfixturevalue("reference")
    assert drawn[0] == drawn[1]


def test_example(monkeypatch, capsys):
    """Run with the embedded models: greedy texts are those of plain generate, and as many drafts of trained models are accepted in
    as many rounds as by the reference's loop."""
    path = ROOT / "examples" / "transformers_generate.py"
    spec = importlib.util.spec_from_file_location("transformers_example", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    seen = {}

    def generate(model, drafter, inputs, **options):
        seen["plain"] = model.generate(**inputs, **options)
        seen["drafted"], seen["statistics"] = result = own(model, drafter, inputs, **options)
        return result

    own, _ = example.generate, monkeypatch.setattr(example, "generate", generate)
    texts = example.main([], 10)
    assert torch.equal(seen["plain"], seen["drafted"]) and texts[0] in capsys.readouterr().out
    target = Target(*assets.weights("target"))
    requests = [Request(assets.tokenizer().encode(prompt), 10) for prompt in example.PROMPTS]
    lengths = []  # of rounds, up to the one that ends a text; its first token is the prompt's
    for result in decode(target, ReferenceDSpark(*assets.weights("dspark"), target), requests):
        sums = itertools.accumulate(result.acceptance_lengths, initial=1)
        lengths.append([length for length, before in zip(result.acceptance_lengths, sums, strict=False) if before < 10])
    rows, found = [len(row) for row in lengths], seen["statistics"]
    assert rows[0] != rows[1] and (found.rounds, found.row_rounds) == (max(rows), sum(rows))
    assert found.accepted == tuple(sum(length > k for row in lengths for length in row) for k in range(1, 8))
    shown = (
        path.read_text().split("# docs/engine-transformers.md: begin\n")[1].split("# docs/engine-transformers.md: end")[0].strip()
    )
    assert shown in (ROOT / "docs" / "engine-transformers.md").read_text(), (
        "docs/engine-transformers.md does not show the call of the example"
    )


@pytest.mark.parametrize(
    "build", [made.dspark, lambda **more: made.dspark("gemma4", "rnn", **more), made.dflash], ids=["dspark", "gemma4", "dflash"]
)
def test_backbones_compute_what_the_references_do(tmp_path, build):
    """Hidden states and base logits of a block, for rows with contexts of 5 and 2 tokens; then one token more."""
    model = target_of("qwen3")
    config, shapes = build(num_target_layers=2)
    loaded = load_drafter(made.write(tmp_path / "d", config, made.tensors(shapes, seed=2)))
    own = Backbone(loaded, model.get_input_embeddings().weight, model.lm_head.weight)
    theirs = Block(loaded.config, loaded.tensors, HuggingFaceTarget(model))
    own.start(12)
    theirs.start(2)
    features, ids = torch.randn(2, 6, 48), torch.tensor([7, 9])
    real = torch.tensor([[True] * 5, [False] * 3 + [True] * 2])
    for columns, starts, lengths in ((slice(0, 5), (0, 0), (5, 2)), (slice(5, 6), (5, 2), (6, 3))):
        part, kept = features[:, columns], real if columns.start == 0 else torch.ones(2, 1, dtype=torch.bool)
        at = torch.tensor(starts)[:, None] + (kept.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            own.inject(part, at, kept)
            hidden = own.hidden(ids, torch.tensor(lengths), max(lengths) + own.block_rows)
            segments = [(row, start, end - start) for row, (start, end) in enumerate(zip(starts, lengths, strict=True))]
            theirs.commit(Committed(Rows.of(segments, "cpu"), None, None, None, part[kept]))
            want = theirs.block_hidden(Anchors.of(ids, torch.tensor(lengths), [0, 1]))
            torch.testing.assert_close(hidden, want, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(own.base_logits(hidden), theirs.base_logits(want), rtol=1e-4, atol=1e-5)


LEVEL, ROWS, TOP = 1e-4, 1000, 2


@pytest.mark.parametrize("rule", ["token", "block"])
def test_sampled_distribution(tmp_path, monkeypatch, reference, rule):
    """The first three tokens of many rows, of the two best each, against exact probabilities: 8 cells of similar size."""
    model = target_of("llama")
    dspark = DSpark.from_pretrained(drafter_of(model, tmp_path / "d"), model, rule=rule, drafts=2)
    options = dict(do_sample=True, temperature=8.0, top_k=TOP)
    prompt = torch.tensor([PROMPTS[0]])
    ids, exact = prompt, torch.ones(1)
    for _ in range(3):  # all paths, and their probabilities
        with torch.no_grad():
            logits = model(input_ids=ids).logits[:, -1] / options["temperature"]
        best = logits.topk(TOP).indices
        ids = torch.cat([ids.repeat_interleave(TOP, 0), best.view(-1, 1)], 1)
        exact = (exact[:, None] * logits.gather(1, best).softmax(-1)).flatten()
    paths = ids[:, prompt.shape[1] :]

    proposals = []
    accept = rounds.Rounds.accept
    monkeypatch.setattr(rounds.Rounds, "accept", lambda *of: (proposals.append(of[2].proposal.logits.clone()), accept(*of))[1])
    texts = model.generate(prompt.expand(ROWS, -1), **options, max_new_tokens=3, custom_generate=dspark, seeds=1, pad_token_id=0)
    own = texts[:, prompt.shape[1] :]
    hits = (own[:, None] == paths).all(-1)
    assert hits.any(1).all(), "a token that top-k removes"
    for found in statistics.compare("three tokens", hits.sum(0), exact, LEVEL):
        # Power: a bias of 0.15 in total variation would be found with probability 0.999.
        assert found.p_value > LEVEL and found.sees < 0.15, found
    assert 0.1 < dspark.statistics.acceptance_by_position[0] < 0.95
    # So would a rule that draws corrections from the target's own distribution: the second token would be this.
    target = exact.view(TOP, TOP, TOP).sum(2)  # [first, second]
    wrong = []
    for first, second, probs in zip(paths[:: TOP * TOP, 0], paths[::TOP, 1].view(TOP, TOP), target, strict=True):
        row = int((own[:, 0] == first).nonzero()[0])
        drawn = (proposals[0][row, 0].float() / options["temperature"]).softmax(-1)[second]
        accepted = torch.minimum(probs / probs.sum(), drawn)
        wrong.append(probs.sum() * (accepted + (1 - accepted.sum()) * probs / probs.sum()))
    shift = float(ROWS * ((torch.stack(wrong) - target).square() / target).sum())
    assert statistics.power(len(exact) - 1, shift, statistics.threshold(len(exact) - 1, LEVEL)) > 0.999


def test_what_is_refused(qwen3, tmp_path):
    model, dspark = qwen3
    ask = dict(do_sample=False, max_new_tokens=3, custom_generate=dspark)
    for message, options in {
        "expected greedy search or sampling, got beam": dict(num_beams=2),
        "output_logits: expected False": dict(return_dict_in_generate=True, output_logits=True),
        "expected no guidance_scale": dict(guidance_scale=1.5, negative_prompt_ids=torch.tensor([[1]])),
        "expected a prompt|expected padding on the left": dict(attention_mask=torch.tensor([[1] * 7 + [0]])),
        "seeds: expected an integer or 1": dict(seeds=[1, 2]),
    }.items():
        with pytest.raises(ValueError, match=message):
            model.generate(**{**batch(PROMPTS[:1]), **ask, **options})
    with pytest.raises(ValueError, match="token_streamer: expected a batch of 1"):
        model.generate(**batch(), **ask, token_streamer=Streamer())
    cache = transformers.DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    name = "cache" if "cache" in type(model).forward.__annotations__ else "past_key_values"
    with pytest.raises(ValueError, match="which the drafter|because the drafter has not seen"):
        model.generate(**batch(PROMPTS[:1]), **ask, **{name: cache})
    other = target_of("qwen3")
    with pytest.raises(ValueError, match="expected the model that this DSpark was made for"):
        other.generate(**batch(), **ask)
    with pytest.raises(ValueError, match="drafts: expected 1 to 4"):
        DSpark.from_pretrained(drafter_of(model, tmp_path / "a"), model, drafts=5)
    for message, changes in {
        "num_target_layers 2, as Qwen3ForCausalLM has it, got 3": dict(num_target_layers=3),
    }.items():
        config, shapes = made.dspark(**{"num_target_layers": 2, **changes})
        with pytest.raises(ValueError, match=message):
            DSpark.from_pretrained(made.write(tmp_path / "b", config, made.tensors(shapes)), model)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attn_implementation eager or sdpa"):
        DSpark.from_pretrained(tmp_path / "a", model)
    model.config._attn_implementation = "sdpa"
    model.model.config.sliding_window, model.model.config.layer_types = 2, ["sliding_attention"] * 2  # which its layers do not do
    with pytest.raises(ValueError, match="gives without a cache|does not run"):
        DSpark.from_pretrained(tmp_path / "a", model)
    model.model.config.sliding_window, model.model.config.layer_types = None, ["full_attention"] * 2


def test_a_drafter_that_does_not_fit_is_told_of(qwen3, tmp_path, monkeypatch):
    from dspark_kernels.integrations.transformers import dspark as module

    monkeypatch.setattr(module, "_ROUNDS_TO_TELL", 10)
    monkeypatch.setattr(module, "_COLLAPSED", 0.5)
    model, _ = qwen3
    config, shapes = made.dspark(num_target_layers=2)
    stranger = DSpark.from_pretrained(made.write(tmp_path / "d", config, made.tensors(shapes)), model)
    with pytest.warns(UserWarning, match="of first drafts were accepted in .* was the drafter trained for this target"):
        model.generate(**batch(), do_sample=False, max_new_tokens=8, custom_generate=stranger)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden data is not beside this checkout")
def test_the_research_codes_rounds(reference):
    """The golden drafter: texts and, round by round, as many drafts accepted as the research code had."""
    model = transformers.Qwen3ForCausalLM.from_pretrained(GOLDEN / "target", dtype=torch.float32).eval()
    dspark = DSpark.from_pretrained(GOLDEN / "draft", model)
    cases = [case for case in json.loads((GOLDEN / "greedy_cases.json").read_text()) if case["confidence_threshold"] == 0][:2]
    for case in cases:
        inputs = batch([case["prompt"]])
        text = model.generate(
            **inputs, do_sample=False, max_new_tokens=case["max_new_tokens"], eos_token_id=None, custom_generate=dspark
        )
        assert text[0].tolist() == case["output_ids"]
        seen = dspark.statistics
        assert 1 + sum(case["acceptance_lengths"][: seen.rounds - 1]) < case["max_new_tokens"]
        assert sum(seen.accepted) == sum(case["acceptance_lengths"][: seen.rounds]) - seen.rounds


# --- CUDA graphs, recorded and replayed on the CPU ----------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch):
    """How often something was captured."""
    made = []
    monkeypatch.setattr(captured, "possible", lambda device: True)
    monkeypatch.setattr(captured, "capture", lambda call: made.append(call) or recorded.capture(call))
    return made


@pytest.mark.parametrize(
    "family, options",
    [("qwen3", {}), ("qwen3", dict(repetition_penalty=1.7, no_repeat_ngram_size=2)), ("gemma3", {})],
    ids=["qwen3", "processors", "gemma3"],
)
def test_captured_rounds(tmp_path, graphs, family, options):
    """With a static cache; with logits processors, which run between the two graphs."""
    model = target_of(family)
    dspark = DSpark.from_pretrained(drafter_of(model, tmp_path / "d"), model)
    inputs = batch(PROMPTS[:2])
    plain = model.generate(**inputs, do_sample=False, max_new_tokens=12, **options)
    given = dict(do_sample=False, max_new_tokens=12, custom_generate=dspark, cache_implementation="static", **options)
    assert torch.equal(plain, model.generate(**inputs, **given))
    assert len(graphs) == 2 and dspark.statistics.rounds > 2, "too few rounds to replay one"
    graphs.clear()
    assert torch.equal(plain, model.generate(**inputs, **given | dict(cache_implementation="dynamic")))
    assert not graphs, "widths change from round to round"


def test_captured_rounds_draw_the_same_tokens(qwen3, graphs):
    model, dspark = qwen3
    given = dict(do_sample=True, temperature=0.8, max_new_tokens=8, custom_generate=dspark, seeds=4)
    drawn = model.generate(**batch(PROMPTS[:2]), **given)
    assert torch.equal(drawn, model.generate(**batch(PROMPTS[:2]), **given, cache_implementation="static")) and len(graphs) == 2


def test_a_round_that_cannot_be_captured_goes_on_as_it_is(qwen3, graphs, reference):
    """Of the reference's ops, which read values on the host; the second part must not be captured alone."""
    model, dspark = qwen3
    plain = model.generate(**batch(), do_sample=False, max_new_tokens=8)
    with pytest.warns(UserWarning, match="dspark: a round is not captured in a CUDA graph: a value is read on the host"):
        drafted = model.generate(
            **batch(), do_sample=False, max_new_tokens=8, custom_generate=dspark, cache_implementation="static"
        )
    assert torch.equal(plain, drafted) and len(graphs) == 1
