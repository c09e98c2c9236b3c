"""Directories of every known format, tiny but with every tensor: read, decoded losslessly, or refused by name."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dspark_kernels import checkpoint
from dspark_kernels.types import GatedMarkovHead, MarkovHead, RnnMarkovHead
from reference import attention, gemma4
from reference.drafters import Anchors, Autoregressive, Block, Committed, DSpark
from reference.loop import Request, decode
from reference.model import KVCache, Rotation, Rows, Target, Weights
from reference.paged import PagedCache
from tests import directories as made

pytest.importorskip("safetensors.torch")
FAMILIES = ("qwen3", "gemma4")
CLASSES = {"vanilla": MarkovHead, "gated": GatedMarkovHead, "rnn": RnnMarkovHead}


@pytest.fixture(scope="module")
def target():
    config, shapes = made.target()
    return Target(config, made.tensors(shapes, seed=1))


def drafter_of(loaded, target):
    kind = DSpark if loaded.head is not None or loaded.confidence is not None else Block
    return kind(loaded.config, loaded.tensors, target)


# --- read -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "kind, confidence",
    [*((kind, confidence) for kind in made.KINDS for confidence in (None, "hidden", "markov")), (None, None), (None, "hidden")],
)
def test_sharded_bf16_directory_with_every_head(tmp_path, family, kind, confidence):
    config, shapes = made.dspark(family, kind, confidence)
    tensors = made.tensors(shapes, torch.bfloat16)
    loaded = checkpoint.load_drafter(made.write(tmp_path / "d", config, tensors, shards=3))
    assert loaded.config == config and loaded.tensors.keys() == tensors.keys()
    assert all(torch.equal(loaded.tensors[name], tensors[name]) for name in tensors)
    assert type(loaded.head) is CLASSES.get(kind, type(None))
    width = {None: None, "hidden": 24, "markov": 29}[confidence]
    assert (None if loaded.confidence is None else loaded.confidence.weight.shape[0]) == width
    assert checkpoint.check(tmp_path / "d")[0] == config


@pytest.mark.parametrize("shares", [True, False])
def test_gemma4_with_values_of_their_own(tmp_path, shares):
    config, shapes = made.dspark("gemma4", attention_k_eq_v=shares)
    if not shares:  # then the number of key-value heads is that of the other layers
        for i in range(made.LAYERS):
            shapes[f"layers.{i}.self_attn.k_proj.weight"] = shapes[f"layers.{i}.self_attn.v_proj.weight"] = [32, 24]
    loaded = checkpoint.load_drafter(made.write(tmp_path / "d", config, made.tensors(shapes)))
    assert ("layers.0.self_attn.v_proj.weight" in loaded.tensors) == (not shares)


def test_dflash_counts_the_anchor_in_its_block(tmp_path):
    config, shapes = made.dflash()
    loaded = checkpoint.load_drafter(made.write(tmp_path / "d", config, made.tensors(shapes, torch.bfloat16), shards=2))
    assert (loaded.block_size, loaded.target_layer_ids, loaded.config["anchor_first"]) == (4, (0, 1), False)
    assert loaded.head is None and loaded.confidence is None
    assert all(loaded.config[key] == value for key, value in config.items() if key != "block_size")


def test_dflash_chooses_target_layers_of_its_own(tmp_path):
    """Their code: evenly from layer 1 to the last but two, as Qwen3-4B's published [1, 9, 17, 25, 33] of 36 for five layers."""
    for target_layers, draft_layers, want in ((36, 5, [1, 9, 17, 25, 33]), (9, 3, [1, 4, 6]), (36, 1, [18])):
        own = {"mask_token_id": made.MASK}
        config, shapes = made.dflash(num_target_layers=target_layers, num_hidden_layers=draft_layers, dflash_config=own)
        config["layer_types"] = ["full_attention"] * draft_layers
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("layers.")} | {
            f"layers.{i}.{name}": shape for i in range(draft_layers) for name, shape in made.QWEN3_LAYER.items()
        }
        shapes["fc.weight"] = [24, 24 * draft_layers]
        directory = made.write(tmp_path / f"d{target_layers}_{draft_layers}", config, made.tensors(shapes))
        assert checkpoint.load_drafter(directory).config["target_layer_ids"] == want


@pytest.mark.parametrize("build", [lambda: made.dspark("gemma4", "rnn"), made.dflash], ids=["gemma4", "dflash"])
def test_every_missing_and_every_misshapen_tensor_is_named(tmp_path, build):
    config, shapes = build()
    tensors = made.tensors(shapes)
    for name in [name for name in tensors if "layers.1." not in name]:
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        with pytest.raises(ValueError, match=f"expected the tensor {name} .*, found none"):
            checkpoint.load_drafter(made.write(tmp_path / "d", config, rest))
        wrong = {**tensors, name: torch.zeros(*tensors[name].shape[:-1], tensors[name].shape[-1] + 1)}
        with pytest.raises(ValueError, match=f"expected {name} of shape"):
            checkpoint.load_drafter(made.write(tmp_path / "d", config, wrong))
    with pytest.raises(ValueError, match="expected no tensor layers.0.self_attn.q_proj.bias"):
        checkpoint.load_drafter(made.write(tmp_path / "d", config, tensors | {"layers.0.self_attn.q_proj.bias": torch.zeros(32)}))


# --- decode -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [lambda kind=kind, family=family: made.dspark(family, kind) for family in FAMILIES for kind in made.KINDS]
    + [lambda: made.dspark("gemma4", None, None), made.dflash],
    ids=[*(f"{family}-{kind}" for family in FAMILIES for kind in made.KINDS), "gemma4-dflash", "dflash"],
)
def test_greedy_text_is_the_targets_own(tmp_path, build, target):
    config, shapes = build()
    loaded = checkpoint.load_drafter(made.write(tmp_path / "d", config, made.tensors(shapes, seed=2)))
    requests = [Request([3, 1, 4, 1, 5], 24), Request([2, 7], 24), Request([18, 28, 18], 24)]
    plain = decode(target, Autoregressive(), requests)
    drafted = decode(target, drafter_of(loaded, target), requests, batch_size=2)
    assert [g.output_ids for g in drafted] == [g.output_ids for g in plain]
    assert all(set(g.drafted_lengths) == {4} for g in drafted)
    if config.get("enable_confidence_head"):
        assert all(0 < c < 1 for g in drafted for row in g.confidences for c in row)


def test_a_drafter_of_another_target_is_refused(tmp_path, target):
    config, shapes = made.dspark(target_layer_ids=[0, 4], num_target_layers=5)
    loaded = checkpoint.load_drafter(made.write(tmp_path / "d", config, made.tensors(shapes)))
    with pytest.raises(ValueError, match=r"expected target_layer_ids from -1 to 2, got \[0, 4\]"):
        drafter_of(loaded, target)


# --- the layers of Gemma 4 --------------------------------------------------------------------------------------------


def _unit(vector):
    return vector / math.sqrt(float((vector * vector).mean()) + 1e-6)


def _turned(vector, position, head=16, share=0.25, theta=1000000.0):
    """Proportional RoPE: the pairs (i, i + head / 2) of the leading share of a head; frequencies by the whole head."""
    out = vector.clone()
    for i in range(int(share * head // 2)):
        angle = position / theta ** (2 * i / head)
        a, b = vector[i], vector[i + head // 2]
        out[i], out[i + head // 2] = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
    return out


def _dense(queries, keys, values):
    """Unscaled attention of all rows over all keys, heads in groups."""
    group = queries.shape[1] // keys.shape[1]
    scores = torch.einsum("qhd,khd->hqk", queries, keys.repeat_interleave(group, 1))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values.repeat_interleave(group, 1)).flatten(1)


@pytest.mark.parametrize("shares", [True, False])
def test_a_gemma4_layer_word_by_word(shares):
    """The layer against its description, row by row and head by head in fp64, over context and block."""
    config, _ = made.dspark("gemma4", attention_k_eq_v=shares)
    layer = dict(made.GEMMA4_LAYER)
    if not shares:
        layer["self_attn.k_proj.weight"] = layer["self_attn.v_proj.weight"] = [32, 24]
    w = {name: tensor.double() for name, tensor in made.tensors(layer, seed=3).items()}
    shape = gemma4.shape(config)
    have = gemma4.DecoderLayer(shape, Weights(w, "cpu", torch.float64))
    generator = torch.Generator().manual_seed(4)
    context, block = (torch.randn(n, 24, generator=generator, dtype=torch.float64) for n in (3, 2))
    spots = torch.arange(5)
    rotations = Rotation.at(spots[:3], shape, torch.float64), Rotation.at(spots[3:], shape, torch.float64)
    held = have.keys_values(context, rotations[0])

    got = have(block, rotations[1], lambda q, k, v: _dense(q, torch.cat([held[0], k]), torch.cat([held[1], v])))
    heads = 1 if shares else 2
    rows = [*context, *(_unit(row) * w["input_layernorm.weight"] for row in block)]
    keys = [(w["self_attn.k_proj.weight"] @ row).view(heads, 16) for row in rows]
    values = keys if shares else [(w["self_attn.v_proj.weight"] @ row).view(heads, 16) for row in rows]
    for i in range(2):
        queries = (w["self_attn.q_proj.weight"] @ rows[3 + i]).view(4, 16)
        mixed = []
        for head in range(4):
            query = _turned(_unit(queries[head]) * w["self_attn.q_norm.weight"], 3 + i)
            mine = [_turned(_unit(k[head * heads // 4]) * w["self_attn.k_norm.weight"], at) for at, k in enumerate(keys)]
            weights = torch.stack([query @ key for key in mine]).softmax(0)
            mixed.append(sum(p * _unit(v[head * heads // 4]) for p, v in zip(weights, values, strict=True)))
        x = block[i] + _unit(w["self_attn.o_proj.weight"] @ torch.cat(mixed)) * w["post_attention_layernorm.weight"]
        normed = _unit(x) * w["pre_feedforward_layernorm.weight"]
        gated = F.gelu(w["mlp.gate_proj.weight"] @ normed, approximate="tanh") * (w["mlp.up_proj.weight"] @ normed)
        x = x + _unit(w["mlp.down_proj.weight"] @ gated) * w["post_feedforward_layernorm.weight"]
        torch.testing.assert_close(got[i], x * w["layer_scalar"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("paged", [False, True])
def test_caches_do_not_scale_gemma4s_attention(paged):
    shape = gemma4.shape(made.dspark("gemma4")[0])
    ops = SimpleNamespace(plan_attention=lambda *arguments, **options: None, tree_attention=_reference_attention)
    cache = PagedCache(shape, 2, "cpu", torch.float32, ops=ops) if paged else KVCache(shape, 2, "cpu", torch.float32)
    rows = Rows.of([(1, 0, 6)], "cpu")
    queries, keys, values = torch.randn(6, 4, 16), torch.randn(6, 1, 16), torch.randn(6, 1, 16)
    cache.claim(rows)
    cache.write(1, rows, keys, values)
    have = cache.attend(1, rows, queries, causal=False)
    torch.testing.assert_close(have, _dense(queries, keys, values), rtol=1e-4, atol=1e-5)


def _reference_attention(*arguments, plan, **options):
    return attention.tree_attention(*arguments, **options).float()


def test_gemma4_scales_embeddings_and_caps_logits(target):
    config, shapes = made.dspark("gemma4", None, None)
    tensors = made.tensors(shapes, seed=5)
    drafter = Block(config, tensors, target)
    hidden = 40 * torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(6))
    raw = hidden @ tensors["lm_head.weight"].T
    assert raw.abs().max() > 60
    torch.testing.assert_close(drafter.base_logits(hidden), 30 * torch.tanh(raw / 30))
    # An embedding that is smaller by the scale, under a config of the same layers without one, gives the same states.
    drafter.start(1)
    rows = Rows.of([(0, 0, 2)], "cpu")
    features = torch.randn(2, 48, generator=torch.Generator().manual_seed(7))
    drafter.commit(Committed(rows, None, None, None, features))
    anchors = Anchors.of(torch.tensor([9]), torch.tensor([2]), [0])
    want = drafter.block_hidden(anchors)
    drafter.embedding, drafter._scale = drafter.embedding * math.sqrt(24), None
    torch.testing.assert_close(drafter.block_hidden(anchors), want)
    drafter.embedding = drafter.embedding / math.sqrt(24)
    assert (drafter.block_hidden(anchors) - want).abs().max() > 0.1


def test_gemma4s_norms_round_once(target):
    """In bf16 the weight multiplies before the rounding; Qwen3's multiplies what was rounded."""
    config, shapes = made.dspark("gemma4", None, None)
    small = Target(target.config, made.tensors(made.target()[1], seed=1), dtype=torch.bfloat16)
    x, weight = torch.randn(64, 24).bfloat16(), torch.rand(24).bfloat16()
    wide = x.float()
    once = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight.float()).bfloat16()
    assert torch.equal(Block(config, made.tensors(shapes), small)._norm(x, weight, 1e-6), once)
    config, shapes = made.dspark("qwen3", None, None)
    assert not torch.equal(Block(config, made.tensors(shapes), small)._norm(x, weight, 1e-6), once)


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(enable_moe_block=True), "no mixture-of-experts blocks in a drafter"),
        (dict(hidden_size_per_layer_input=4), "no embeddings per layer in a drafter"),
        (dict(use_double_wide_mlp=True), "no double-wide MLPs in a drafter"),
        (dict(attention_bias=True), "no attention_bias"),
        (dict(hidden_activation="relu"), "hidden_activation 'gelu_pytorch_tanh', got 'relu'"),
        (dict(final_logit_softcapping=-1.0), "positive final_logit_softcapping"),
        (dict(num_global_key_value_heads=3), "multiple of num_global_key_value_heads, got 4 and 3"),
        (dict(layer_types=["sliding_attention", "full_attention"]), "full attention in every layer"),
        (dict(rope_parameters={"rope_theta": 1e4}), "an entry full_attention"),
        (dict(rope_parameters={"full_attention": {"rope_type": "yarn", "rope_theta": 1e4}}), "'proportional'.*got 'yarn'"),
        (dict(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e4}}), "'proportional'.*got 'default'"),
        (dict(mask_token_id=41), "mask_token_id from 0 to 40"),
        (dict(markov_head_type="lstm"), "markov_head_type in"),
    ],
)
def test_what_gemma4_drafters_do_not_have(tmp_path, change, message):
    config, shapes = made.dspark("gemma4", **change)
    with pytest.raises(ValueError, match=message):
        checkpoint.load_drafter(made.write(tmp_path / "d", config, made.tensors(shapes)))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(block_size=1), "integer block_size >= 2, got 1"),
        (dict(dflash_config=None), "expected a dflash_config"),
        (dict(dflash_config={"target_layer_ids": [0]}), "the keys mask_token_id"),
        (dict(dflash_config={"mask_token_id": 1, "projector_type": "dspark"}), "a dflash_config with the key markov_rank"),
        (
            dict(dflash_config={"mask_token_id": 1, "projector_type": "domino"}),
            "a head of the kind 'domino', of which 'dspark' is read",
        ),
        (dict(use_sliding_window=True, layer_types=None), "full attention in every layer, got use_sliding_window"),
        (dict(layer_types=["sliding_attention", "full_attention"]), "full attention in every layer, got layer_types"),
        (dict(rope_parameters=None, rope_scaling={"rope_type": "yarn"}, rope_theta=1e6), "the key 'factor' with rope_type 'yarn'"),
    ],
)
def test_what_dflash_drafters_do_not_have(tmp_path, change, message):
    config, shapes = made.dflash(**change)
    with pytest.raises(ValueError, match=message):
        checkpoint.load_drafter(made.write(tmp_path / "d", config, made.tensors(shapes)))


@pytest.mark.parametrize(
    "config, message",
    [
        (made.eagle3()[0], "an EAGLE-3 drafter.*over 11 ids of its own that d2t maps"),
        (made.eagle3(architectures=["LlamaForCausalLM"])[0], "an EAGLE-3 drafter"),
        (made.eagle3(architectures=["Qwen3ForCausalLM"])[0], "an EAGLE-3 drafter"),
        (
            {**made.QWEN3, "architectures": ["Qwen3Eagle3Model"], "ttt_length": 7},
            "an EAGLE-3 drafter.*by token; load_eagle3 reads it",
        ),
        ({**made.QWEN3, "architectures": ["Gemma4Eagle3Model"]}, "an EAGLE-3 drafter"),
        ({**made.QWEN3, "architectures": ["EagleLlamaForCausalLM"]}, "an EAGLE drafter"),
        ({**made.QWEN3, "architectures": ["DFlash2DraftModel"]}, "a DFlash drafter of another version"),
        ({**made.QWEN3, "architectures": ["DSparkDraftModel"]}, "of other training code"),
        ({"architectures": ["DSparkSpeculator"], "speculators_config": {}}, "layout of the speculators library"),
        ({"architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4"}, "a DeepSeek model"),
    ],
    ids=lambda value: value.get("architectures")[0] if isinstance(value, dict) else "",
)
def test_other_formats_are_named_and_refused(tmp_path, config, message):
    directory = made.write(tmp_path / "other", config, {"fc.weight": torch.zeros(4, 4)})
    check = () if checkpoint.formats.is_eagle3(config) else (checkpoint.check,)
    for load in (checkpoint.load_drafter, checkpoint.load_target, *check):
        with pytest.raises(ValueError, match=message) as refusal:
            load(directory)
        assert config["architectures"][0] in str(refusal.value) and "on Hugging Face: " in str(refusal.value)


@pytest.mark.parametrize(
    "name, repository",
    [
        ("dspark_qwen3_4b_block7", "deepseek-ai/dspark_qwen3_4b_block7"),
        ("dspark_gemma4_12b_block7", "deepseek-ai/dspark_gemma4_12b_block7"),
        ("dflash_qwen3_14b_block7", "deepseek-ai/dflash_qwen3_14b_block7"),
        ("eagle3_qwen3_8b_ttt7", "deepseek-ai/eagle3_qwen3_8b_ttt7"),
        ("models--deepseek-ai--dspark_qwen3_8b_block7", "deepseek-ai/dspark_qwen3_8b_block7"),
        ("Qwen3-8B-DFlash-b16", "z-lab/Qwen3-8B-DFlash-b16"),
        ("qwen3-4b", "Qwen/Qwen3-4B"),
        ("gemma-4-12B-it", "google/gemma-4-12B-it"),
    ],
)
def test_a_missing_directory_of_a_known_name_says_where_it_is_held(tmp_path, name, repository):
    for load in (checkpoint.load_drafter, checkpoint.load_target, checkpoint.read_config):
        with pytest.raises(FileNotFoundError, match=f"the repository {repository} on Hugging Face holds it: hf download"):
            load(tmp_path / name)


def test_stop_tokens(tmp_path):
    file = tmp_path / "generation_config.json"
    assert checkpoint.stop_tokens(tmp_path) == ()
    for content, want in (('{"eos_token_id": [5, 3, 5]}', (5, 3)), ('{"eos_token_id": 1}', (1,)), ("{}", ())):
        file.write_text(content)
        assert checkpoint.stop_tokens(tmp_path) == want
    file.write_text('{"eos_token_id": ["</s>"]}')
    with pytest.raises(ValueError, match="an id or a list of ids"):
        checkpoint.stop_tokens(tmp_path)
