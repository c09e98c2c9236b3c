"""RoPE is what the whole config says: every place is read, the places agree, everything else is refused by name."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from dspark_kernels import checkpoint
from dspark_kernels.checkpoint import rope
from dspark_kernels.integrations.transformers import layers
from reference import gemma4
from reference.model import Rotation, Shape
from tests import directories as made

pytest.importorskip("safetensors.torch")
PLAIN = {"rope_type": "default", "rope_theta": 5e5}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
FULL = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}

# What a config says -> the theta of it, or what the refusal names: keys with their places, and values.
SAID = {
    "rope_parameters": (dict(rope_parameters=PLAIN), 5e5),
    "rope_parameters without a type": (dict(rope_parameters={"rope_theta": 5e5}), 5e5),
    "theta alone": (dict(rope_theta=5e5), 5e5),
    "an integer theta": (dict(rope_theta=500000), 5e5),
    "theta beside parameters without one": (dict(rope_parameters={"rope_type": "default"}, rope_theta=5e5), 5e5),
    "theta beside parameters whose theta is null": (dict(rope_parameters={**PLAIN, "rope_theta": None}, rope_theta=5e5), 5e5),
    "theta said twice": (dict(rope_parameters=PLAIN, rope_theta=500000), 5e5),
    "theta said three times": (
        dict(rope_parameters=PLAIN, rope_scaling={"type": "default", "rope_theta": 5e5}, rope_theta=5e5),
        5e5,
    ),
    "theta in rope_scaling alone": (dict(rope_scaling=PLAIN), 5e5),
    "no scaling": (dict(rope_scaling=None, rope_theta=5e5), 5e5),
    "a scaling of 1": (dict(rope_scaling={"factor": 1.0}, rope_theta=5e5), 5e5),
    "all pairs turn": (dict(rope_parameters={**PLAIN, "partial_rotary_factor": 1.0}, partial_rotary_factor=1), 5e5),
    "text_config alone": (dict(text_config={"rope_theta": 5e5}), 5e5),
    "text_config says the same": (dict(text_config={"rope_parameters": PLAIN}, rope_theta=5e5), 5e5),
    "an entry for full attention": (dict(rope_parameters={"full_attention": PLAIN}), 5e5),
    "an entry for layers that are not there": (
        dict(rope_parameters={"full_attention": PLAIN, "sliding_attention": {**PLAIN, "rope_theta": 1e4}}),
        5e5,
    ),
    "pairs in halves": (dict(rope_theta=5e5, is_neox_style=True, dspark_config={"is_neox_style": True}), 5e5),
    "two thetas": (
        dict(rope_parameters=PLAIN, rope_theta=1e6),
        ("500000.0 (rope_parameters.rope_theta)", "1000000.0 (rope_theta)"),
    ),
    "a theta of rope_scaling": (
        dict(rope_parameters=PLAIN, rope_scaling={**PLAIN, "rope_theta": 1e4}),
        ("500000.0 (rope_parameters.rope_theta)", "10000.0 (rope_scaling.rope_theta)"),
    ),
    "a theta of text_config": (
        dict(rope_parameters=PLAIN, text_config={"rope_theta": 1e4}),
        ("10000.0 (text_config.rope_theta)", "500000.0 (rope_parameters.rope_theta)"),
    ),
    "an entry against the rest": (
        dict(rope_parameters={"full_attention": PLAIN}, rope_theta=1e4),
        ("500000.0 (rope_parameters.full_attention.rope_theta)", "10000.0 (rope_theta)"),
    ),
    "two kinds": (
        dict(rope_parameters=PLAIN, rope_scaling=YARN),
        ("'default' (rope_parameters.rope_type)", "'yarn' (rope_scaling.rope_type)"),
    ),
    "two spellings of the kind": (
        dict(rope_scaling={"type": "linear", "rope_type": "default"}, rope_theta=5e5),
        ("'linear' (rope_scaling.type)", "'default' (rope_scaling.rope_type)"),
    ),
    "yarn without its context": (
        dict(rope_parameters={"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0}),
        ("the key 'original_max_position_embeddings'", "'yarn'"),
    ),
    "yarn without a factor": (dict(rope_scaling={**YARN, "factor": None}, rope_theta=5e5), ("the key 'factor'", "'yarn'")),
    "yarn that shrinks": (dict(rope_scaling={**YARN, "factor": 0.5}, rope_theta=5e5), ("a factor of at least 1",)),
    "yarn with two contexts": (
        dict(rope_scaling=YARN, rope_theta=5e5, original_max_position_embeddings=2048),
        ("2048 (original_max_position_embeddings)", "4096 (rope_scaling.original_max_position_embeddings)"),
    ),
    "yarn with a factor in quotes": (dict(rope_scaling={**YARN, "factor": "4"}, rope_theta=5e5), ("rope_scaling.factor", "'4'")),
    "yarn with DeepSeek's factors": (
        dict(rope_scaling={**YARN, "mscale_all_dim": 1.0}, rope_theta=5e5),
        ("no rope_scaling.mscale_all_dim, which nothing here reads",),
    ),
    "yarn cut in a word": (dict(rope_scaling={**YARN, "truncate": "no"}, rope_theta=5e5), ("truncate true or false", "'no'")),
    "llama3 without its context": (dict(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5}), ("the key 'factor'",)),
    "llama3 upside down": (
        dict(rope_parameters={**LLAMA3, "low_freq_factor": 4.0, "rope_theta": 5e5}),
        ("low_freq_factor below high_freq_factor",),
    ),
    **{
        kind: (dict(rope_parameters={"rope_type": kind, "rope_theta": 5e5}), (f"got '{kind}'",))
        for kind in ("linear", "dynamic", "longrope", "proportional")
    },
    "an older name of longrope": (dict(rope_scaling={"type": "su"}, rope_theta=5e5), ("got 'longrope' (rope_scaling.type)",)),
    "a factor without a kind": (dict(rope_scaling={"factor": 4.0}, rope_theta=5e5), ("rope_scaling.factor 1, got 4.0",)),
    "a factor that is true": (dict(rope_scaling={"factor": True}, rope_theta=5e5), ("rope_scaling.factor 1, got True",)),
    "half of the pairs": (dict(rope_theta=5e5, partial_rotary_factor=0.5), ("partial_rotary_factor 1, got 0.5",)),
    "sections": (
        dict(rope_scaling={"type": "mrope", "mrope_section": [2, 1, 1]}, rope_theta=5e5),
        ("rope_scaling.mrope_section", "[2, 1, 1]"),
    ),
    "pairs side by side": (dict(rope_theta=5e5, is_neox_style=False), ("is_neox_style True, got False",)),
    "no theta": ({}, ("rope_theta itself, got neither",)),
    "a kind without a theta": (dict(rope_parameters={"rope_type": "default"}), ("got neither",)),
    "theta 0": (dict(rope_theta=0), ("a positive rope_theta, got 0 (rope_theta)",)),
    "a negative theta": (dict(rope_parameters={"rope_theta": -1e4}), ("got -10000.0 (rope_parameters.rope_theta)",)),
    "theta true": (dict(rope_theta=True), ("a positive rope_theta, got True",)),
    "theta true beside 1": (dict(rope_theta=True, rope_parameters={"rope_theta": 1}), ("True (rope_theta)", "1 (rope_parameters")),
    "a theta in quotes": (dict(rope_theta="1e6"), ("a positive rope_theta, got '1e6'",)),
    "a theta beyond all floats": (dict(rope_theta=10**400), ("a positive rope_theta, got 1000",)),
    "theta infinite": (dict(rope_theta=math.inf), ("a positive rope_theta, got inf",)),
    "theta not a number": (dict(rope_theta=math.nan), ("a positive rope_theta, got nan",)),
    "parameters in a list": (dict(rope_parameters=[PLAIN]), ("rope_parameters to be an object",)),
    "scaling in a word": (dict(rope_scaling="yarn", rope_theta=5e5), ("rope_scaling to be an object, got 'yarn'",)),
    "an odd head size": (dict(rope_theta=5e5, head_dim=7), ("an even head_dim", "got 7")),
}
BUILDS = {"target": made.target, "dspark": made.dspark, "dflash": made.dflash}


def without_rope(build):
    config, shapes = build()
    return {key: value for key, value in config.items() if key != "rope_parameters"}, shapes


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("said", SAID)
def test_targets_and_drafters(tmp_path, build, said):
    change, outcome = SAID[said]
    config, shapes = without_rope(BUILDS[build])
    config |= change
    directory = made.write(tmp_path / "d", config, made.tensors(shapes))
    load = checkpoint.load_target if build == "target" else checkpoint.load_drafter
    if isinstance(outcome, float):
        assert Shape.from_config(load(directory).config).rope_theta == outcome
        assert Shape.from_config(config).rope_theta == outcome
        return
    with pytest.raises(ValueError) as refusal:
        load(directory)
    assert str(refusal.value).startswith(f"{directory / 'config.json'}: ")
    assert all(part in str(refusal.value) for part in outcome), refusal.value
    with pytest.raises(ValueError) as refusal:  # the reference by itself
        Shape.from_config(config)
    assert all(part in str(refusal.value) for part in outcome), refusal.value


@pytest.mark.parametrize("said", [name for name, (_, outcome) in SAID.items() if isinstance(outcome, float)])
def test_rows_are_turned_by_that_theta(tmp_path, said):
    config, shapes = without_rope(made.target)
    config |= SAID[said][0]
    loaded = checkpoint.load_target(made.write(tmp_path / "d", config, made.tensors(shapes)))
    rotation = Rotation.at(torch.tensor([0, 1, 7]), Shape.from_config(loaded.config), torch.float64)
    for row, position in enumerate((0, 1, 7)):
        for i in range(4):  # heads of 8: 4 pairs
            angle = position / 5e5 ** (2 * i / 8)
            for half in (i, i + 4):
                assert rotation.cos[row, 0, half] == pytest.approx(math.cos(angle), abs=1e-12)
                assert rotation.sin[row, 0, half] == pytest.approx(math.sin(angle), abs=1e-12)


# Qwen3Config knows neither text_config nor entries for types of layers, and keeps a null theta, with which it cannot turn anything.
QWEN3_READS = [
    name
    for name, (change, outcome) in SAID.items()
    if isinstance(outcome, float) and "null" not in name and "entry" not in name and "text_config" not in name
]


@pytest.mark.parametrize("said", QWEN3_READS)
def test_transformers_reads_the_same_theta(said):
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(**copy.deepcopy({**without_rope(made.target)[0], **SAID[said][0]}))
    assert config.rope_parameters["rope_theta"] == 5e5 and config.rope_parameters["rope_type"] == "default"


# --- kinds that stretch the context -----------------------------------------------------------------------------------

SCALED = {
    "yarn": dict(rope_parameters={**YARN, "rope_theta": 5e5}),
    "yarn in rope_scaling": dict(rope_scaling={**YARN, "type": "yarn"}, rope_theta=5e5),
    "yarn beside a theta in rope_parameters": dict(rope_scaling=YARN, rope_parameters={"rope_theta": 5e5}),
    "its context beside it": dict(
        rope_scaling={"rope_type": "yarn", "factor": 4.0}, rope_theta=5e5, original_max_position_embeddings=4096
    ),
    "a short context": dict(rope_parameters={**YARN, "rope_theta": 1e4, "original_max_position_embeddings": 16}),
    "factors of its own": dict(
        rope_parameters={**YARN, "rope_theta": 1e4, "beta_fast": 8, "beta_slow": 2.5, "attention_factor": 1.25, "truncate": False}
    ),
    "a factor of 1": dict(rope_parameters={**YARN, "rope_theta": 1e4, "factor": 1.0}),
    "llama3": dict(rope_parameters={**LLAMA3, "rope_theta": 1e4}),
    "llama3 of Llama 3.1": dict(rope_scaling={**LLAMA3, "original_max_position_embeddings": 8192}, rope_theta=5e5),
}


@pytest.mark.parametrize("size", [8, 64, 128])
@pytest.mark.parametrize("said", SCALED)
def test_stretched_as_transformers_stretches(said, size):
    utilities = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    config = {**without_rope(made.target)[0], "head_dim": size, **SCALED[said]}
    # Of rope_scaling and rope_parameters, transformers keeps one.
    turn = rope.qwen3(config, "config")
    flat = {**config.get("rope_parameters", {}), **config.get("rope_scaling", {}), "rope_theta": turn.theta}
    flat.setdefault("original_max_position_embeddings", turn.scaled.original)
    own = transformers.Qwen3Config(head_dim=size, rope_parameters={key: value for key, value in flat.items() if key != "type"})
    want, factor = utilities.ROPE_INIT_FUNCTIONS[turn.scaled.__class__.__name__.lower()](own, "cpu")
    torch.testing.assert_close(turn.scaled.frequencies(turn.theta, size, "cpu"), want, rtol=1e-6, atol=0)
    assert turn.scaled.attention == pytest.approx(factor, rel=1e-12)


def test_yarn_by_hand():
    """theta 10000, heads of 8, a factor 4 over 64 positions: pairs 0 and 1 turn often and stay, pairs 2 and 3 turn less than once."""
    parameters = {**YARN, "rope_theta": 1e4, "original_max_position_embeddings": 64, "beta_fast": 2.0}
    turn = rope.qwen3({**without_rope(made.target)[0], "rope_parameters": parameters}, "config")
    # 64 / (2 pi 10000^(i/4)) turns: 10.2, 1.02, 0.10, 0.01; two of them at i = 0.71, one at i = 1.01, rounded outwards to 0 and 2.
    want = [1.0, 0.1 * (0.5 + 0.5 / 4), 0.01 / 4, 0.001 / 4]
    assert turn.scaled.frequencies(turn.theta, 8, "cpu").tolist() == pytest.approx(want, rel=1e-5)
    assert turn.scaled.attention == pytest.approx(0.1 * math.log(4) + 1)


@pytest.mark.parametrize("build", BUILDS)
def test_rows_are_turned_by_stretched_angles(tmp_path, build):
    config, shapes = without_rope(BUILDS[build])
    config |= dict(rope_parameters={**YARN, "rope_theta": 1e4, "original_max_position_embeddings": 16})
    load = checkpoint.load_target if build == "target" else checkpoint.load_drafter
    loaded = load(made.write(tmp_path / "d", config, made.tensors(shapes)))
    shape, positions = Shape.from_config(loaded.config), torch.tensor([0, 3, 29])
    angles = positions[:, None] * shape.scaled.frequencies(1e4, 8, "cpu")
    want = torch.cat([angles, angles], -1)
    rotation = Rotation.at(positions, shape, torch.float32)
    torch.testing.assert_close(rotation.cos[:, 0], want.cos() * shape.scaled.attention)
    torch.testing.assert_close(rotation.sin[:, 0], want.sin() * shape.scaled.attention)
    theirs = layers.Rotation.at(positions[None], layers.Shape.of(loaded.config, False), torch.float32)
    torch.testing.assert_close(theirs.cos[0, 0], rotation.cos[:, 0])
    torch.testing.assert_close(theirs.sin[0, 0], rotation.sin[:, 0])


# --- Gemma 4 ----------------------------------------------------------------------------------------------------------

GEMMA4 = {
    "as transformers writes it": ({}, (1e6, 0.25)),
    "a theta beside its entry": (dict(rope_theta=1000000), (1e6, 0.25)),
    "theta beside an entry without one": (
        dict(rope_parameters={"full_attention": {**FULL, "rope_theta": None}}, rope_theta=2e6),
        (2e6, 0.25),
    ),
    "no share": (dict(rope_parameters={"full_attention": {"rope_type": "proportional", "rope_theta": 1e6}}), (1e6, 1.0)),
    "a share beside": (
        dict(rope_parameters={"full_attention": {"rope_type": "proportional", "rope_theta": 1e6}}, partial_rotary_factor=0.5),
        (1e6, 0.5),
    ),
    "one size of heads": (dict(rope_parameters={"full_attention": PLAIN}, head_dim=16), (5e5, 1.0)),
    "another theta beside": (
        dict(rope_theta=1e4),
        ("10000.0 (rope_theta)", "1000000.0 (rope_parameters.full_attention.rope_theta)"),
    ),
    "another theta beside the entries": (
        dict(rope_parameters={"full_attention": FULL, "rope_theta": 1e4}),
        ("1000000.0 (rope_parameters.full_attention.rope_theta)", "10000.0 (rope_parameters.rope_theta)"),
    ),
    "another kind beside the entries": (
        dict(rope_parameters={"full_attention": FULL, "rope_type": "yarn"}),
        ("'proportional' (rope_parameters.full_attention.rope_type)", "'yarn' (rope_parameters.rope_type)"),
    ),
    "another share beside": (dict(partial_rotary_factor=0.5), ("0.5 (partial_rotary_factor)", "0.25 (rope_parameters.full")),
    "a share that is true": (
        dict(rope_parameters={"full_attention": {**FULL, "partial_rotary_factor": True}}),
        ("a partial_rotary_factor from 0 to 1, got True",),
    ),
    "a share above 1": (dict(rope_parameters={"full_attention": {**FULL, "partial_rotary_factor": 2}}), ("got 2 (",)),
    "scaled attention": (
        dict(rope_parameters={"full_attention": {**FULL, "attention_factor": 2.0}}),
        ("attention_factor 1, got 2",),
    ),
    "another key": (dict(rope_parameters={"full_attention": {**FULL, "truncate": True}}), ("full_attention.truncate", "got True")),
    "scaled": (dict(rope_parameters={"full_attention": {**FULL, "factor": 8.0}}), ("full_attention.factor 1, got 8.0",)),
    "half of the pairs by default": (
        dict(rope_parameters={"full_attention": {**PLAIN, "partial_rotary_factor": 0.5}}, head_dim=16),
        ("partial_rotary_factor 1, got 0.5",),
    ),
    "no theta": (dict(rope_parameters={"full_attention": {"rope_type": "proportional"}}), ("rope_theta itself, got neither",)),
    "theta false": (dict(rope_parameters={"full_attention": {**FULL, "rope_theta": False}}), ("a positive rope_theta, got False",)),
    "no entry": (dict(rope_parameters=FULL), ("an entry full_attention",)),
    "an odd head size": (dict(global_head_dim=15), ("an even global_head_dim", "got 15")),
}


@pytest.mark.parametrize("said", GEMMA4)
def test_gemma4_drafters(tmp_path, said):
    change, outcome = GEMMA4[said]
    config, shapes = made.dspark("gemma4", **change)
    directory = made.write(tmp_path / "d", config, made.tensors(shapes))
    if isinstance(outcome[0], float):
        for read in (checkpoint.load_drafter(directory).config, config):
            shape = gemma4.shape(read)
            assert (shape.rope_theta, shape.rotated) == outcome
        return
    for read in (lambda: checkpoint.load_drafter(directory), lambda: gemma4.shape(config)):
        with pytest.raises(ValueError) as refusal:
            read()
        assert all(part in str(refusal.value) for part in outcome), refusal.value


# --- targets of their own class ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, outcome",
    [
        (dict(rope_theta=1e4), 1e4),
        (dict(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, rope_theta=1e4), 1e4),
        (dict(rope_parameters=PLAIN, rope_theta=1e4), ("10000.0 (rope_theta)", "500000.0 (rope_parameters.rope_theta)")),
        (
            dict(rope_parameters={**YARN, "rope_theta": 1e4}, rope_scaling={**YARN, "factor": 2.0}),
            ("4.0 (rope_parameters.factor)", "2.0 (rope_scaling.factor)"),
        ),
        (dict(rope_theta=-1.0), ("a positive rope_theta, got -1.0",)),
    ],
    ids=["theta", "linear", "two thetas", "two factors", "negative"],
)
def test_a_target_run_by_transformers(tmp_path, change, outcome):
    """Any kind that its class knows, as long as the places agree."""
    pytest.importorskip("transformers")
    from reference import huggingface

    config, shapes = without_rope(made.target)
    directory = made.write(tmp_path / "d", config | change, made.tensors(shapes))
    if isinstance(outcome, float):
        assert huggingface.load(directory).config["rope_parameters"]["rope_theta"] == outcome
        return
    with pytest.raises(ValueError) as refusal:
        huggingface.load(directory)
    assert "config.json: " in str(refusal.value) and all(part in str(refusal.value) for part in outcome)


def test_types_of_layers_may_differ_where_the_class_reads_them():
    """Gemma 3's and 4's local layers have a theta of their own."""
    local = {"rope_type": "default", "rope_theta": 1e4}
    config = {"text_config": {"rope_parameters": {"full_attention": FULL, "sliding_attention": local}}}
    checkpoint.rope.check(config, "config.json")
    config["text_config"]["rope_scaling"] = {"sliding_attention": {**local, "rope_theta": 2e4}}
    with pytest.raises(ValueError, match=r"10000\.0 \(text_config\.rope_parameters\.sliding_attention\.rope_theta\) and 20000\.0"):
        checkpoint.rope.check(config, "config.json")
