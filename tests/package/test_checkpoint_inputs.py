"""Checkpoint directories that go wrong elsewhere: what is given, and what comes of it.

Each case is a directory of a known format with one thing changed, in its config or in its files. It loads with the words that the
format gives it, or it is refused by a message with the file, the key or tensor, and what stands there.
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from dspark_kernels import checkpoint
from dspark_kernels.checkpoint import attention, block, formats
from reference.model import Shape
from tests import directories as made

save_file = pytest.importorskip("safetensors.torch").save_file
BUILDS = {
    "dspark": made.dspark,
    "gated": lambda: made.dspark(kind="gated"),
    "headless": lambda: made.dspark(kind=None, confidence=None),
    "gemma4": lambda: made.dspark("gemma4"),
    "dflash": made.dflash,
    "speculators": lambda: made.speculators(layers=made.SLIDING),
    "target": made.target,
}
DROPPED = object()
INDEX = "model.safetensors.index.json"


class Case(NamedTuple):
    """build: of BUILDS. outcome: words of the loaded config, or parts of the message. config: keys that differ. shapes, tensors:
    tensors that differ, a shape or what becomes of the made tensor. then: what is done to the written directory. shards: of how
    many files."""

    build: str
    outcome: dict | tuple
    config: dict = {}
    shapes: dict = {}
    tensors: dict = {}
    then: Callable = lambda directory: None
    shards: int = 1


def text(name, change):
    """Rewrite a file of the directory."""
    return lambda directory: (directory / name).write_text(change((directory / name).read_text()))


def indexed(change):
    """Change the weight_map of the index."""

    def write(content):
        index = json.loads(content)
        return json.dumps({**index, "weight_map": change(index["weight_map"])})

    return text(INDEX, write)


def beside(name, tensors):
    return lambda directory: save_file(tensors, directory / name)


METHOD = {"proposal_type": "greedy", "speculative_tokens": 4}
CASES = {
    # --- config.json as a file
    "a byte order mark": Case("dspark", ("config.json", "does not parse"), then=text("config.json", lambda t: "\ufeff" + t)),
    "a key twice with two values": Case(
        "dspark",
        ("config.json", "one value of block_size", "4", "5"),
        then=text("config.json", lambda t: t.replace('"block_size": 4', '"block_size": 4, "block_size": 5')),
    ),
    "a key twice with one value": Case(
        "dspark",
        dict(block_size=4),
        then=text("config.json", lambda t: t.replace('"block_size": 4', '"block_size": 4, "block_size": 4')),
    ),
    "a nested key twice with two values": Case(
        "dflash",
        ("config.json", "one value of mask_token_id", "40", "3"),
        then=text("config.json", lambda t: t.replace('"mask_token_id": 40', '"mask_token_id": 40, "mask_token_id": 3')),
    ),
    "a block twice with two contents": Case(
        "dflash",
        ("config.json", "one value of dflash_config"),
        then=text("config.json", lambda t: t.rstrip()[:-1] + ', "dflash_config": {"mask_token_id": 3}}'),
    ),
    "true beside 1": Case(
        "dspark",
        ("one value of enable_confidence_head", "True", "1"),
        then=text("config.json", lambda t: t.rstrip()[:-1] + ', "enable_confidence_head": 1}'),
    ),
    "a theta too large for a float": Case(
        "target",
        ("a positive rope_theta", "inf"),
        then=text("config.json", lambda t: t.replace("10000.0", "1e999")),
    ),
    "an epsilon that is NaN": Case("target", ("a positive rms_norm_eps", "nan"), dict(rms_norm_eps=float("nan"))),
    "an epsilon in quotes": Case("gemma4", ("a positive rms_norm_eps", "'1e-6'"), dict(rms_norm_eps="1e-6")),
    "two architectures": Case("dspark", ("Qwen3DSparkModel", "Other"), dict(architectures=["Qwen3DSparkModel", "Other"])),
    "an architecture outside a list": Case(
        "target", ("expected architectures", '"Qwen3ForCausalLM"'), dict(architectures="Qwen3ForCausalLM")
    ),
    # --- files of tensors
    "shards without an index": Case("target", (INDEX, "model-00001-of-00002"), then=lambda d: (d / INDEX).unlink(), shards=2),
    "an index of nothing": Case("target", ("model.embed_tokens.weight", "found none"), then=indexed(lambda m: {}), shards=2),
    "an index in a list": Case("target", (INDEX, "got list"), then=text(INDEX, lambda t: "[]"), shards=2),
    "an index that is cut off": Case("target", (INDEX, "does not parse"), then=text(INDEX, lambda t: t[:40]), shards=2),
    "an index with a null": Case(
        "target",
        (INDEX, "weight_map"),
        then=indexed(lambda m: {**m, "model.norm.weight": None}),
        shards=2,
    ),
    "an index that leads out of the directory": Case(
        "target",
        (INDEX, "expected file names", "'../a.safetensors'"),
        then=indexed(lambda m: {**m, "model.norm.weight": "../a.safetensors"}),
        shards=2,
    ),
    "an index of one tensor more than the config has": Case(
        "target",
        ("expected no tensor model.old.weight", "config.json"),
        shapes={"model.old.weight": [3]},
        shards=3,
    ),
    "a whole file of old values beside shards": Case(
        "target",
        {},
        then=beside("model.safetensors", {"model.norm.weight": torch.zeros(7)}),
        shards=2,
    ),
    "an adapter's file beside the whole one": Case("dspark", {}, then=beside("adapter_model.safetensors", {"x": torch.zeros(1)})),
    "shards of the same tensors in another order": Case(
        "dspark",
        dict(block_size=4),
        then=indexed(lambda m: dict(sorted(m.items(), reverse=True))),
        shards=3,
    ),
    "a drafter's gate that the index forgot": Case(
        "gated",
        ("markov_head.gate_proj.weight [5, 29]", "does not name it"),
        then=indexed(lambda m: {k: v for k, v in m.items() if k != "markov_head.gate_proj.weight"}),
        shards=2,
    ),
    "a drafter's norm in int8": Case("dspark", ("norm.weight in BF16", "I8"), tensors={"norm.weight": lambda t: t.to(torch.int8)}),
    "an fc of one layer fewer": Case("dspark", ("fc.weight of shape [24, 48]", "[24, 24]"), shapes={"fc.weight": [24, 24]}),
    # --- heads
    "a tied head in another dtype with the same values": Case(
        "target",
        dict(tie_word_embeddings=True),
        dict(tie_word_embeddings=True),
        tensors={"model.embed_tokens.weight": lambda t: t.bfloat16(), "lm_head.weight": lambda t: t.new_zeros(0)},
        then=lambda d: retie(d),
    ),
    "a tied head that is transposed": Case(
        "target",
        ("lm_head.weight of shape [41, 24]", "[24, 41]"),
        dict(tie_word_embeddings=True),
        shapes={"lm_head.weight": [24, 41]},
    ),
    "a tied DFlash drafter, which has no tables": Case("dflash", dict(tie_word_embeddings=True), dict(tie_word_embeddings=True)),
    "a DFlash drafter with a head": Case("dflash", ("expected no tensor lm_head.weight",), shapes={"lm_head.weight": [41, 24]}),
    # --- RoPE
    "an empty scaling": Case("target", dict(theta=1e4), dict(rope_scaling={})),
    "a scaling of nulls": Case("dspark", dict(theta=1e4), dict(rope_scaling={"type": None, "factor": None})),
    "a theta of the drafter's own block": Case("dspark", dict(theta=1e4), dict(dspark_config={"rope_theta": 10000})),
    "another theta in the drafter's own block": Case(
        "dspark",
        ("10000.0 (rope_parameters.rope_theta)", "5000.0 (dspark_config.rope_theta)"),
        dict(dspark_config={"rope_theta": 5e3}),
    ),
    "a factor in dflash_config": Case(
        "dflash",
        ("dflash_config.rope_scaling.factor 1", "2.0"),
        dict(dflash_config={"mask_token_id": 40, "target_layer_ids": [0, 1], "rope_scaling": {"factor": 2.0}}),
    ),
    "a kind that is a number": Case(
        "target", ("rope_type of 'default'", "1"), dict(rope_parameters={"rope_type": 1, "rope_theta": 1e4})
    ),
    "no size of heads": Case("target", ("integer head_dim >= 1", "None"), dict(head_dim=None)),
    "heads of one": Case("target", ("an even head_dim", "1"), dict(head_dim=1)),
    # --- the block
    "a block size that is no integer": Case("dspark", ("integer block_size", "4.0"), dict(block_size=4.0)),
    "a mask token in quotes": Case("dspark", ("mask_token_id from 0 to 40", "'40'"), dict(mask_token_id="40")),
    "a mask token that is true": Case(
        "dflash", ("mask_token_id from 0 to 40", "True"), dict(dflash_config={"mask_token_id": True})
    ),
    "a mask token below 0": Case(
        "dspark", ("mask_token_id", "-1"), dict(dspark_config={"mask_token_id": -1}, mask_token_id=DROPPED)
    ),
    "layers that are true": Case(
        "dspark", ("target_layer_ids from -1 to 2", "[True, False]"), dict(target_layer_ids=[True, False])
    ),
    "a layer twice": Case("dspark", dict(target_layer_ids=[1, 1]), dict(target_layer_ids=[1, 1])),
    "a layer behind the last": Case(
        "dflash",
        ("target_layer_ids from -1 to 2", "[0, 3]"),
        dict(dflash_config={"mask_token_id": 40}, aux_hidden_state_layer_ids=[1, 4]),
    ),
    "layers in a text": Case(
        "dspark", ("aux_hidden_state_layer_ids to be layer ids", "'0,2'"), dict(aux_hidden_state_layer_ids="0,2")
    ),
    "two counts of target layers": Case(
        "dspark",
        ("3 (num_target_layers)", "36 (dspark_config.num_target_layers)"),
        dict(dspark_config={"num_target_layers": 36}),
    ),
    "temperatures in a block": Case(
        "dspark",
        dict(sts_temperatures=[1, 0.5, 2, 1]),
        dict(dspark_config={"sts_temperatures": [1, 0.5, 2, 1]}),
    ),
    "temperatures for the anchor too": Case(
        "dspark",
        ("3 positive sts_temperatures", "[1, 1, 1, 1]"),
        dict(sts_temperatures=[1, 1, 1, 1], sample_from_anchor=False),
    ),
    "a temperature that is true": Case("dspark", ("4 positive sts_temperatures", "True"), dict(sts_temperatures=[1, True, 1, 1])),
    "an infinite temperature": Case(
        "dspark", ("4 positive sts_temperatures", "inf"), dict(sts_temperatures=[1, 1, 1, float("inf")])
    ),
    "blocks that say nothing": Case(
        "headless",
        dict(block_size=4, markov_rank=0),
        dict(dspark_config={}, dflash_config=None, speculators_config=None, text_config=None),
    ),
    "a rank of 0 in its block": Case(
        "headless",
        dict(markov_rank=0),
        dict(markov_rank=DROPPED, dspark_config={"markov_rank": 0}),
    ),
    "a rank of the block without tables": Case(
        "headless",
        ("markov_head.markov_w1.weight [41, 8]",),
        dict(markov_rank=DROPPED, dspark_config={"markov_rank": 8, "markov_head_type": "vanilla"}),
    ),
    "a block size in text_config": Case(
        "dspark", ("4 (block_size)", "5 (text_config.block_size)"), dict(text_config={"block_size": 5})
    ),
    "proposals of none": Case("dspark", dict(block_size=4), dict(speculators_config={"proposal_methods": []})),
    "a proposal that is null": Case(
        "dspark", ("proposal_methods to be objects", "[None]"), dict(speculators_config={"proposal_methods": [None]})
    ),
    "two proposals of two lengths": Case(
        "dspark",
        ("proposal_methods[1].speculative_tokens 4", "got 2"),
        dict(speculators_config={"proposal_methods": [METHOD, {**METHOD, "speculative_tokens": 2}]}),
    ),
    "a layout without its kind": Case("dspark", dict(block_size=4), dict(speculators_model_type=None)),
    "an anchor in quotes": Case("dflash", ("sample_from_anchor true or false", "'false'"), dict(sample_from_anchor="false")),
    "a null for causal": Case(
        "dflash", dict(block_size=4), dict(dflash_config={"mask_token_id": 40, "target_layer_ids": [0, 1], "causal": None})
    ),
    "windows in quotes": Case("dspark", ("full attention", "use_sliding_window 'false'"), dict(use_sliding_window="false")),
    "no word on biases": Case("target", {}, dict(attention_bias=None, layer_types=None)),
    "an unknown type of layer": Case(
        "gemma4", ("full attention", "'chunked_attention'"), dict(layer_types=["full_attention", "chunked_attention"])
    ),
    "layer types in a word": Case("target", ("3 layer_types", "'full_attention'"), dict(layer_types="full_attention")),
    "a cap that is true": Case("gemma4", ("a positive final_logit_softcapping", "True"), dict(final_logit_softcapping=True)),
    "no cap": Case("gemma4", dict(final_logit_softcapping=None), dict(final_logit_softcapping=None)),
    # --- names
    "a target with a draft vocabulary": Case("target", ("an EAGLE-3 drafter", "over 11 ids"), dict(draft_vocab_size=11)),
    "a DFlash drafter with a draft vocabulary": Case(
        "dflash", ("draft_vocab_size 41 (vocab_size)", "11"), dict(draft_vocab_size=11)
    ),
    "a drafter that EAGLE's engines named": Case("dspark", ("an EAGLE-3 drafter",), dict(architectures=["Qwen3DSparkEagle3"])),
}


def retie(directory):
    """A head in fp32 with the values of the embedding in bf16."""
    from safetensors.torch import load_file

    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].float()}, directory / "model.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_what_comes_of_it(tmp_path, name):
    case = CASES[name]
    config, shapes = BUILDS[case.build]()
    config = {key: value for key, value in {**config, **case.config}.items() if value is not DROPPED}
    tensors = made.tensors({**shapes, **case.shapes})
    tensors |= {tensor: change(tensors[tensor]) for tensor, change in case.tensors.items()}
    directory = made.write(tmp_path / "d", config, tensors, case.shards)
    case.then(directory)
    load = checkpoint.load_target if case.build == "target" else checkpoint.load_drafter
    if isinstance(case.outcome, tuple):
        with pytest.raises((ValueError, FileNotFoundError)) as refusal:
            load(directory)
        assert str(refusal.value).startswith(str(directory))
        assert all(part in str(refusal.value) for part in case.outcome), refusal.value
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load(directory)
    words = {**loaded.config, "theta": None if case.build == "gemma4" else Shape.from_config(loaded.config).rope_theta}
    assert {key: words.get(key) for key in case.outcome} == case.outcome
    for tensor, value in loaded.tensors.items():
        assert torch.equal(value, tensors[tensor]), tensor


ODD = (None, True, 0, -1, 1.5, 10**400, float("nan"), "x", "", [], [1], ["x"], [None], [[1]], {}, {"x": 1}, {"full_attention": []})
PLACES = (
    "",
    "text_config",
    "transformer_layer_config",
    "dflash_config",
    "dspark_config",
    "speculators_config",
    "rope_parameters",
    "rope_scaling",
)


@pytest.mark.parametrize("build", BUILDS)
def test_no_value_of_any_key_leads_to_another_error(build):
    """Every key that is read, with every odd value, in every place: it is read, or refused with the file's name."""
    config, _ = BUILDS[build]()
    keys = {*block._KNOWN, *block._SPECULATORS, *attention.KEYS, *config, *PLACES[1:], "final_logit_softcapping", "type", "factor"}
    keys |= {"full_attention", "dspark_block_size", "speculators_model_type", "transformer_layer_config", "model_type"}
    keys |= {"sliding_window_non_causal", "sample_from_anchor", "beta_fast", "truncate", "original_max_position_embeddings"}
    form = formats.of(config, formats.DRAFTERS | formats.TARGETS)
    refused = 0
    for place, key, value in itertools.product(PLACES, sorted(keys), ODD):
        nested = config.get(place)
        inner = {**(nested if isinstance(nested, dict) else {}), key: value}
        given = {**config, place: inner} if place else {**config, key: value}
        formats.described(given)
        try:
            form.shapes(form.read(given, "config.json"))
        except ValueError as refusal:
            assert str(refusal).startswith("config.json: "), (place, key, value)
            refused += 1
    assert refused > 1000
