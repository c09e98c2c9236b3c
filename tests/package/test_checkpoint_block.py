"""Keys that change what a block drafter computes: read wherever they stand, or refused with the key, its place and its value."""

from __future__ import annotations

import pytest
import torch

from bench.inspect import __main__ as inspect_job
from dspark_kernels import checkpoint
from reference.drafters import Anchors, Block, Committed, DSpark
from reference.model import Rows, Target
from tests import directories as made

pytest.importorskip("safetensors.torch")
# made.dspark: block_size 4, mask token 40, layers [-1, 1] of 3; made.dflash: block_size 5 (four drafts), layers [0, 1].
OWN = {"target_layer_ids": [0, 1], "mask_token_id": 40}
DROPPED = object()


def proposal(**changes):
    """A speculators_config as that library writes it, for four drafts."""
    method = {"proposal_type": "greedy", "speculative_tokens": 4, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    verifier = {"name_or_path": "Qwen/Qwen3-4B", "architectures": ["Qwen3ForCausalLM"]}
    return {
        "algorithm": "dspark",
        "proposal_methods": [{**method, **changes}],
        "default_proposal_method": "greedy",
        "verifier": verifier,
    }


def changed(config, change):
    """change: keys to set, DROPPED to take one away."""
    return {key: value for key, value in {**config, **change}.items() if value is not DROPPED}


# What a config says -> some of the words it is read in, or what the refusal names.
DSPARK = {
    "as published": ({}, dict(block_size=4, mask_token_id=40, target_layer_ids=[-1, 1], markov_rank=5)),
    "everything twice": (
        dict(dspark_config=dict(block_size=4, mask_token_id=40, target_layer_ids=[-1, 1], markov_rank=5, num_target_layers=3)),
        dict(block_size=4),
    ),
    "only in dspark_config": (
        dict(
            block_size=DROPPED,
            mask_token_id=DROPPED,
            target_layer_ids=DROPPED,
            markov_rank=DROPPED,
            markov_head_type=DROPPED,
            dspark_config=dict(block_size=4, mask_token_id=7, target_layer_ids=[1, 2], markov_rank=5, markov_head_type="vanilla"),
        ),
        dict(block_size=4, mask_token_id=7, target_layer_ids=[1, 2], markov_rank=5),
    ),
    "only behind dspark_": (
        dict(block_size=DROPPED, mask_token_id=DROPPED, dspark_block_size=6, dspark_noise_token_id=3),
        dict(block_size=6, mask_token_id=3),
    ),
    "a null says nothing": (dict(dspark_config=dict(block_size=None, mask_token_id=None)), dict(block_size=4)),
    "layers counted from one more": (
        dict(target_layer_ids=DROPPED, aux_hidden_state_layer_ids=[0, 2]),
        dict(target_layer_ids=[-1, 1]),
    ),
    "layers said in both counts": (dict(dspark_config=dict(aux_hidden_state_layer_ids=[0, 2])), dict(target_layer_ids=[-1, 1])),
    "rows that see each other": (dict(dspark_config=dict(causal=False), is_causal=False), dict(block_size=4)),
    "the anchor predicts": (dict(sample_from_anchor=True), dict(block_size=4, anchor_first=True)),
    "the anchor does not predict": (dict(sample_from_anchor=False), dict(block_size=3, anchor_first=False)),
    "anchor_first counts drafts": (dict(anchor_first=False), dict(block_size=4, anchor_first=False)),
    "no windows": (dict(dspark_config=dict(use_swa=False, swa_window_size=2048), sliding_window=4096), dict(block_size=4)),
    "its vocabulary and its target's width": (dict(draft_vocab_size=41, target_hidden_size=24), dict(block_size=4)),
    "no vocabulary of its own": (dict(draft_vocab_size=None), dict(block_size=4)),
    "four drafts in speculators_config": (dict(speculators_config=proposal()), dict(block_size=4)),
    "sizes of its layers again": (dict(dspark_config=dict(hidden_size=24, num_hidden_layers=2, vocab_size=41)), dict(block_size=4)),
    "four drafts, said again": (dict(num_speculative_tokens=4), dict(block_size=4)),
    "other sizes of its layers": (dict(dspark_config=dict(num_hidden_layers=3)), ("dspark_config.num_hidden_layers 2", "got 3")),
    "another vocabulary in a block": (
        dict(dflash_config=dict(vocab_size=50)),
        ("dflash_config.vocab_size 41 (vocab_size), got 50",),
    ),
    "three drafts, said again": (dict(num_speculative_tokens=3), ("num_speculative_tokens 4 (the drafts of block_size), got 3",)),
    "two block sizes": (dict(dspark_config=dict(block_size=5)), ("4 (block_size)", "5 (dspark_config.block_size)")),
    "two block sizes in two blocks": (
        dict(block_size=DROPPED, dspark_config=dict(block_size=5), dflash_config=dict(block_size=6)),
        ("6 (dflash_config.block_size)", "5 (dspark_config.block_size)"),
    ),
    "another block size behind dspark_": (dict(dspark_block_size=7), ("4 (block_size)", "7 (dspark_block_size)")),
    "two mask tokens": (dict(dflash_config=dict(mask_token_id=39)), ("40 (mask_token_id)", "39 (dflash_config.mask_token_id)")),
    "another noise token": (dict(dspark_noise_token_id=39), ("40 (mask_token_id)", "39 (dspark_noise_token_id)")),
    "two lists of layers": (
        dict(dspark_config=dict(target_layer_ids=[0, 1])),
        ("[-1, 1] (target_layer_ids)", "[0, 1] (dspark_config.target_layer_ids)"),
    ),
    "layers in another order": (dict(dspark_config=dict(target_layer_ids=[1, -1])), ("[-1, 1]", "[1, -1] (dspark_config.")),
    "the same ids in the other count": (
        dict(aux_hidden_state_layer_ids=[-1, 1]),
        ("[-1, 1] (target_layer_ids)", "[-2, 0] (aux_hidden_state_layer_ids, one higher there)"),
    ),
    "two ranks": (dict(dspark_config=dict(markov_rank=8)), ("5 (markov_rank)", "8 (dspark_config.markov_rank)")),
    "two kinds of head": (
        dict(dspark_config=dict(markov_head_type="rnn")),
        ("'vanilla' (markov_head_type)", "'rnn' (dspark_config."),
    ),
    "two words on confidence": (
        dict(speculators_config=dict(enable_confidence_head=False)),
        ("True (enable_confidence_head)", "False (speculators_config.enable_confidence_head)"),
    ),
    "a causal block": (dict(dspark_config=dict(causal=True)), ("dspark_config.causal False", "got True")),
    "a causal block at the top": (dict(is_causal=True), ("is_causal False", "got True")),
    "causal 0": (dict(dspark_config=dict(causal=0)), ("dspark_config.causal False", "got 0")),
    "an anchor that does and does not": (
        dict(sample_from_anchor=True, dspark_config=dict(sample_from_anchor=False)),
        ("True (sample_from_anchor)", "False (dspark_config.sample_from_anchor)"),
    ),
    "anchor_first against sample_from_anchor": (
        dict(anchor_first=True, sample_from_anchor=False),
        ("True (anchor_first)", "False (sample_from_anchor)"),
    ),
    "an anchor that predicts by 1": (dict(sample_from_anchor=1), ("sample_from_anchor true or false, got 1",)),
    "no drafts beside the anchor": (dict(sample_from_anchor=False, block_size=1), ("integer block_size >= 2, got 1",)),
    "windows": (dict(dspark_config=dict(use_swa=True, swa_window_size=2048)), ("full attention", "dspark_config.use_swa True")),
    "a window size in a block": (
        dict(dflash_config=dict(sliding_window=512)),
        ("full attention", "dflash_config.sliding_window 512"),
    ),
    "a window size of its own": (
        dict(use_sliding_window=DROPPED, swa_window_size=64),
        ("full attention", "swa_window_size 64"),
    ),
    "layer types in a block": (
        dict(layer_types=DROPPED, dspark_config=dict(layer_types=["full_attention", "sliding_attention"])),
        ("full attention in every layer", "dspark_config.layer_types ['full_attention', 'sliding_attention']"),
    ),
    "two lists of layer types": (
        dict(dspark_config=dict(layer_types=["sliding_attention"] * 2)),
        (
            "['full_attention', 'full_attention'] (layer_types)",
            "['sliding_attention', 'sliding_attention'] (dspark_config.layer_types)",
        ),
    ),
    "fewer layer types than layers": (dict(layer_types=["full_attention"]), ("2 layer_types", "got ['full_attention']")),
    "sinks": (dict(dspark_config=dict(attention_sink_bias=True)), ("no dspark_config.attention_sink_bias, got True",)),
    "no context": (dict(dflash_config=dict(use_aux_hidden_state=False)), ("dflash_config.use_aux_hidden_state True, got False",)),
    "a vocabulary of its own": (dict(draft_vocab_size=11), ("draft_vocab_size 41 (vocab_size), got 11",)),
    "a target of another width": (
        dict(dspark_config=dict(target_hidden_size=32)),
        ("target_hidden_size 24 (hidden_size), got 32",),
    ),
    "capped logits of Qwen3 layers": (dict(final_logit_softcapping=30.0), ("no final_logit_softcapping", "got 30.0")),
    "an unknown key in dspark_config": (
        dict(dspark_config=dict(projector="mlp")),
        ("a dspark_config of known keys alone, got projector",),
    ),
    "an unknown key in speculators_config": (dict(speculators_config=dict(tree=3)), ("a speculators_config of known keys", "tree")),
    "an unknown key behind dspark_": (dict(dspark_stages=3), ("dspark_* to be known keys, got stages",)),
    "a block that is no object": (dict(dspark_config=[4]), ("dspark_config to be an object, got [4]",)),
    "a block in quotes": (dict(dflash_config="{}"), ("dflash_config to be an object, got '{}'",)),
    "three drafts in speculators_config": (
        dict(speculators_config=proposal(speculative_tokens=3)),
        ("proposal_methods[0].speculative_tokens 4", "got 3"),
    ),
    "acceptance of the top 3": (dict(speculators_config=proposal(verifier_accept_k=3)), ("verifier_accept_k 1, got 3",)),
    "acceptance with a tolerance": (dict(speculators_config=proposal(accept_tolerance=2.0)), ("accept_tolerance 0, got 2.0",)),
    "a tree of proposals": (dict(speculators_config=proposal(proposal_type="tree")), ("proposal_type 'greedy', got 'tree'",)),
    "an unknown key of a proposal": (dict(speculators_config=proposal(beams=2)), ("proposal_methods[0] of known keys", "beams")),
    "another algorithm": (dict(speculators_config={"algorithm": "eagle3"}), ("speculators_config.algorithm in", "got 'eagle3'")),
    "confidence in quotes": (dict(enable_confidence_head="false"), ("enable_confidence_head true or false, got 'false'",)),
}
DFLASH = {
    "as published": ({}, dict(block_size=4, anchor_first=False, mask_token_id=40, target_layer_ids=[0, 1], markov_rank=0)),
    "a bidirectional block": (dict(dflash_config={**OWN, "causal": False}), dict(block_size=4)),
    "block_size in its block": (dict(block_size=DROPPED, dflash_config={**OWN, "block_size": 8}), dict(block_size=7)),
    "block_size twice": (dict(dflash_config={**OWN, "block_size": 5}), dict(block_size=4)),
    "keys at the top": (dict(dflash_config=DROPPED, **OWN), dict(mask_token_id=40, target_layer_ids=[0, 1])),
    "keys at the top and a block without them": (
        dict(dflash_config={"use_swa": False}, **OWN),
        dict(mask_token_id=40, target_layer_ids=[0, 1]),
    ),
    "the anchor does not predict": (
        dict(dflash_config={**OWN, "sample_from_anchor": False}),
        dict(block_size=4, anchor_first=False),
    ),
    "not in our word either": (dict(anchor_first=False), dict(block_size=4, anchor_first=False)),
    "the anchor predicts": (dict(sample_from_anchor=True), dict(block_size=5, anchor_first=True)),
    "layers counted from one more": (
        dict(dflash_config={"mask_token_id": 40}, aux_hidden_state_layer_ids=[1, 3]),
        dict(target_layer_ids=[0, 2]),
    ),
    "no heads": (dict(markov_rank=0, enable_confidence_head=False), dict(markov_rank=0)),
    "four drafts in speculators_config": (dict(speculators_config={**proposal(), "algorithm": "dflash"}), dict(block_size=4)),
    "a causal block": (dict(dflash_config={**OWN, "causal": True}), ("dflash_config.causal False", "got True")),
    "two block sizes": (dict(dflash_config={**OWN, "block_size": 4}), ("5 (block_size)", "4 (dflash_config.block_size)")),
    "two mask tokens": (dict(mask_token_id=39), ("39 (mask_token_id)", "40 (dflash_config.mask_token_id)")),
    "two lists of layers": (
        dict(target_layer_ids=[0, 2]),
        ("[0, 2] (target_layer_ids)", "[0, 1] (dflash_config.target_layer_ids)"),
    ),
    "windows": (dict(dflash_config={**OWN, "use_swa": True}), ("full attention", "dflash_config.use_swa True")),
    "a window size": (dict(dflash_config={**OWN, "swa_window_size": 2048}), ("dflash_config.swa_window_size 2048",)),
    "an unknown key": (dict(dflash_config={**OWN, "fc_layernorm": True}), ("a dflash_config of known keys", "fc_layernorm")),
    "a head": (dict(markov_rank=5, markov_head_type="vanilla"), ("no markov_rank in a DFlash drafter", "got 5")),
    "a head in its block": (dict(dflash_config={**OWN, "markov_rank": 5}), ("no markov_rank in a DFlash drafter", "got 5")),
    "confidence": (dict(enable_confidence_head=True), ("no enable_confidence_head in a DFlash drafter", "got True")),
    "five drafts in speculators_config": (
        dict(speculators_config={**proposal(speculative_tokens=5), "algorithm": "dflash"}),
        ("proposal_methods[0].speculative_tokens 4", "got 5"),
    ),
    "another algorithm": (dict(speculators_config=proposal()), ("speculators_config.algorithm in ('dflash',), got 'dspark'",)),
    "no mask token": (dict(dflash_config={"target_layer_ids": [0, 1]}), ("a dflash_config with the keys mask_token_id",)),
}


def outcome_of(directory, config, shapes, outcome):
    width = 24 * len(outcome.get("target_layer_ids", [0, 0]) if isinstance(outcome, dict) else [0, 0])
    tensors = made.tensors({**shapes, "fc.weight": [24, width]})
    made.write(directory, config, tensors)
    if isinstance(outcome, dict):
        loaded = checkpoint.load_drafter(directory)
        assert {key: loaded.config.get(key) for key in outcome} == outcome
        return loaded
    for read in (checkpoint.load_drafter, checkpoint.check):
        with pytest.raises(ValueError) as refusal:
            read(directory)
        assert str(refusal.value).startswith(f"{directory / 'config.json'}: ")
        assert all(part in str(refusal.value) for part in outcome), refusal.value
    return None


@pytest.mark.parametrize("said", DSPARK)
def test_dspark(tmp_path, said):
    change, outcome = DSPARK[said]
    config, shapes = made.dspark()
    outcome_of(tmp_path / "d", changed(config, change), shapes, outcome)


@pytest.mark.parametrize("said", DFLASH)
def test_dflash(tmp_path, said):
    change, outcome = DFLASH[said]
    config, shapes = made.dflash()
    outcome_of(tmp_path / "d", changed(config, change), shapes, outcome)


@pytest.mark.parametrize("said", ["everything twice", "a causal block", "windows", "an unknown key in dspark_config"])
def test_gemma4_layers_are_no_exception(tmp_path, said):
    change, outcome = DSPARK[said]
    config, shapes = made.dspark("gemma4")
    outcome_of(tmp_path / "d", changed(config, change), shapes, outcome)


@pytest.mark.parametrize(
    "build, change, rows, drafts",
    [
        (made.dspark, {}, 4, 4),
        (made.dspark, dict(sample_from_anchor=False), 4, 3),
        (made.dspark, dict(anchor_first=False), 5, 4),
        (made.dflash, {}, 5, 4),
        (made.dflash, dict(block_size=DROPPED, dflash_config={**OWN, "block_size": 8}), 8, 7),
        (made.dflash, dict(sample_from_anchor=True), 5, 5),
    ],
)
def test_the_reference_drafts_what_the_words_say(tmp_path, monkeypatch, build, change, rows, drafts):
    """The block's rows: the anchor and masks; of them, the last `drafts` predict."""
    config, shapes = build()
    loaded = checkpoint.load_drafter(made.write(tmp_path / "d", changed(config, change), made.tensors(shapes)))
    config, shapes = made.target()
    drafter = (Block if loaded.head is None else DSpark)(loaded.config, loaded.tensors, Target(config, made.tensors(shapes)))
    drafter.start(1)
    drafter.commit(Committed(Rows.of([(0, 0, 2)], "cpu"), None, None, None, made.tensors({"x": [2, 48]})["x"]))
    seen = []
    embedding = torch.nn.functional.embedding
    monkeypatch.setattr(
        "reference.drafters.block.F.embedding", lambda ids, table: seen.append(ids.tolist()) or embedding(ids, table)
    )
    hidden = drafter.block_hidden(Anchors.of(torch.tensor([9]), torch.tensor([2]), [0]))
    assert seen == [[9] + [40] * (rows - 1)] and hidden.shape[1] == drafts


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, outcome",
    [
        (dict(is_causal=True), None),
        (dict(text_config={"hidden_size": 24, "model_type": "qwen3_text", "tie_word_embeddings": False}), None),
        (dict(sliding_window=4096, max_window_layers=1), None),
        (dict(is_causal=False), ("is_causal True", "got False")),
        (dict(use_bidirectional_attention=True), ("use_bidirectional_attention False", "got True")),
        (dict(text_config={"use_sliding_window": True}), ("False (use_sliding_window)", "True (text_config.use_sliding_window)")),
        (dict(use_sliding_window=True, sliding_window=8), ("full attention in every layer, got use_sliding_window True",)),
        (dict(text_config={"hidden_size": 32}), ("24 (hidden_size)", "32 (text_config.hidden_size)")),
        (
            dict(text_config={"tie_word_embeddings": True}),
            ("False (tie_word_embeddings)", "True (text_config.tie_word_embeddings)"),
        ),
        (
            dict(layer_types=["full_attention"] * 2 + ["sliding_attention"]),
            ("full attention in every layer", "'sliding_attention'"),
        ),
        (dict(attention_bias=True), ("no attention_bias, got True",)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_targets(tmp_path, change, outcome):
    config, shapes = made.target(**change)
    directory = made.write(tmp_path / "d", config, made.tensors(shapes))
    if outcome is None:
        assert checkpoint.load_target(directory).config == config
        return
    with pytest.raises(ValueError) as refusal:
        checkpoint.load_target(directory)
    assert all(part in str(refusal.value) for part in ("config.json", *outcome)), refusal.value


def test_what_only_text_config_says_is_taken(tmp_path):
    config, shapes = made.target()
    nested = {key: config.pop(key) for key in ("head_dim", "vocab_size", "tie_word_embeddings")}
    loaded = checkpoint.load_target(made.write(tmp_path / "d", {**config, "text_config": nested}, made.tensors(shapes)))
    assert {key: loaded.config[key] for key in nested} == nested
    Target(loaded.config, loaded.tensors)


# --- names ------------------------------------------------------------------------------------------------------------

SPECULATORS = {
    "a kind of later versions": {"architectures": ["DFlash2DraftModel"], "speculators_model_type": "dflash2"},
    "eagle3": {"architectures": ["Eagle3Speculator"], "speculators_model_type": "peagle", "draft_vocab_size": 32000},
    "eagle3 of its class's name": {"architectures": ["Eagle3DraftModel"], "speculators_config": {"algorithm": "eagle3"}},
    "a language model's name": {"architectures": ["Qwen3ForCausalLM"], "speculators_config": {}, "draft_vocab_size": 32000},
}


@pytest.mark.parametrize("kind", SPECULATORS)
def test_a_drafter_of_the_speculators_library_is_called_that(tmp_path, capsys, kind):
    config = SPECULATORS[kind]
    directory = made.write(tmp_path / "d", config, made.tensors({"fc.weight": [4, 4]}))
    for read in (checkpoint.load_drafter, checkpoint.load_target, checkpoint.check):
        with pytest.raises(ValueError, match="a drafter in the layout of the speculators library") as refusal:
            read(directory)
        assert "EAGLE-3" not in str(refusal.value) and config["architectures"][0] in str(refusal.value)
    assert inspect_job.main([str(directory)]) == 2
    error = capsys.readouterr().err
    assert "layout of the speculators library" in error and "got EAGLE" not in error and "an EAGLE-3 drafter:" not in error


@pytest.mark.parametrize("change", [dict(transformer_layer_config={"hidden_size": 24}), dict(speculators_model_type="dspark")])
def test_the_published_layout_called_theirs_is_read_as_theirs(tmp_path, change):
    config, shapes = made.dspark(**change)
    with pytest.raises(ValueError, match="transformer_layer_config|of the kind None"):
        checkpoint.load_drafter(made.write(tmp_path / "d", config, made.tensors(shapes)))


@pytest.mark.parametrize(
    "config, eagle3",
    [
        (made.eagle3()[0], True),
        (made.eagle3(architectures=["LlamaForCausalLM"])[0], True),
        ({**made.QWEN3, "architectures": ["Qwen3Eagle3Model"]}, True),
        (made.target(draft_vocab_size=None)[0], False),
        (made.dspark(draft_vocab_size=41)[0], False),
        (made.dflash(draft_vocab_size=11)[0], False),
        ({"architectures": ["DSparkDraftModel"], "draft_vocab_size": 11}, False),
    ],
    ids=lambda value: value["architectures"][0] if isinstance(value, dict) else "",
)
def test_what_is_called_eagle3(config, eagle3):
    assert checkpoint.formats.is_eagle3(config) == eagle3
