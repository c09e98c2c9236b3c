"""Tiny checkpoint directories with every tensor of the published ones: names, shapes and dtypes written out by hand."""

from __future__ import annotations

import json

import torch

VOCAB, HIDDEN, FFN, LAYERS = 41, 24, 36, 2
KINDS = ("vanilla", "gated", "rnn")
RANK, BLOCK, MASK, TARGET_LAYERS = 5, 4, 40, 3

QWEN3 = dict(
    attention_bias=False,
    hidden_act="silu",
    hidden_size=HIDDEN,
    intermediate_size=FFN,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_hidden_layers=LAYERS,
    layer_types=["full_attention"] * LAYERS,
    model_type="qwen3",
    rms_norm_eps=1e-6,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    use_sliding_window=False,
    vocab_size=VOCAB,
)
QWEN3_LAYER = {
    "input_layernorm.weight": [24],
    "post_attention_layernorm.weight": [24],
    "self_attn.q_proj.weight": [32, 24],
    "self_attn.k_proj.weight": [16, 24],
    "self_attn.v_proj.weight": [16, 24],
    "self_attn.o_proj.weight": [24, 32],
    "self_attn.q_norm.weight": [8],
    "self_attn.k_norm.weight": [8],
    "mlp.gate_proj.weight": [36, 24],
    "mlp.up_proj.weight": [36, 24],
    "mlp.down_proj.weight": [24, 36],
}
# What transformers 5.10 writes for a Gemma 4 text config, without what no layer reads; the heads of full attention are wider.
GEMMA4 = dict(
    attention_bias=False,
    attention_k_eq_v=True,
    enable_moe_block=False,
    final_logit_softcapping=30.0,
    global_head_dim=16,
    head_dim=8,
    hidden_activation="gelu_pytorch_tanh",
    hidden_size=HIDDEN,
    hidden_size_per_layer_input=0,
    intermediate_size=FFN,
    layer_types=["full_attention"] * LAYERS,
    model_type="gemma4_text",
    num_attention_heads=4,
    num_global_key_value_heads=1,
    num_hidden_layers=LAYERS,
    num_key_value_heads=2,
    num_kv_shared_layers=0,
    rms_norm_eps=1e-6,
    rope_parameters={
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
        "rope_theta": None,
        "rope_type": "default",
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    sliding_window=512,
    target_model_type="gemma4",
    use_double_wide_mlp=False,
    vocab_size=VOCAB,
)
GEMMA4_LAYER = {
    **QWEN3_LAYER,
    "pre_feedforward_layernorm.weight": [24],
    "post_feedforward_layernorm.weight": [24],
    "layer_scalar": [1],
    "self_attn.q_proj.weight": [64, 24],
    "self_attn.k_proj.weight": [16, 24],
    "self_attn.o_proj.weight": [24, 64],
    "self_attn.q_norm.weight": [16],
    "self_attn.k_norm.weight": [16],
}
del GEMMA4_LAYER["self_attn.v_proj.weight"]
DSPARK = dict(
    block_size=BLOCK,
    enable_confidence_head=True,
    confidence_head_with_markov=True,
    markov_head_type="vanilla",
    markov_rank=RANK,
    mask_token_id=MASK,
    num_anchors=8,
    num_target_layers=TARGET_LAYERS,
    target_layer_ids=[-1, 1],
    tie_word_embeddings=False,
)
TABLES = {"markov_head.markov_w1.weight": [41, 5], "markov_head.markov_w2.weight": [41, 5]}
HEADS = {
    None: {},
    "vanilla": TABLES,
    "gated": {**TABLES, "markov_head.gate_proj.weight": [5, 29], "markov_head.gate_proj.bias": [5]},
    "rnn": {**TABLES, "markov_head.joint_proj.weight": [15, 34], "markov_head.joint_proj.bias": [15]},
}
CONFIDENCE = {
    None: {},
    "hidden": {"confidence_head.proj.weight": [1, 24], "confidence_head.proj.bias": [1]},
    "markov": {"confidence_head.proj.weight": [1, 29], "confidence_head.proj.bias": [1]},
}
BACKBONE = {"fc.weight": [24, 48], "hidden_norm.weight": [24], "norm.weight": [24]}
OWN_ENDS = {"embed_tokens.weight": [41, 24], "lm_head.weight": [41, 24]}


def _numbered(layer, prefix="layers."):
    return {f"{prefix}{i}.{name}": shape for i in range(LAYERS) for name, shape in layer.items()}


def dspark(family="qwen3", kind="vanilla", confidence="markov", **changes):
    """(config, shapes) of DeepSpec's format. kind None: rank 0, as its DFlash. confidence: None, "hidden" or "markov"."""
    layers, layer, name = {
        "qwen3": (QWEN3, QWEN3_LAYER, "Qwen3DSparkModel"),
        "gemma4": (GEMMA4, GEMMA4_LAYER, "Gemma4DSparkModel"),
    }[family]
    config = {**layers, **DSPARK, "architectures": [name]}
    if kind is None:
        del config["markov_head_type"]
        config["markov_rank"] = 0
    else:
        config["markov_head_type"] = kind
    if confidence is None:
        del config["confidence_head_with_markov"]
        config["enable_confidence_head"] = False
    else:
        config["confidence_head_with_markov"] = confidence == "markov"
    return {**config, **changes}, {**OWN_ENDS, **BACKBONE, **_numbered(layer), **HEADS[kind], **CONFIDENCE[confidence]}


def dflash(**changes):
    """(config, shapes) of z-lab's format: four drafts, for the anchor is in the block size too."""
    own = {"target_layer_ids": [0, 1], "mask_token_id": MASK}
    config = {**QWEN3, "architectures": ["DFlashDraftModel"], "block_size": BLOCK + 1, "num_target_layers": TARGET_LAYERS}
    return {**config, "dflash_config": own, **changes}, {**BACKBONE, **_numbered(QWEN3_LAYER)}


def modelopt(kind="vanilla", confidence=True, **changes):
    """(config, shapes) of a DSpark drafter as NVIDIA Model-Optimizer 0.47.0 exports it. changes: of its dflash_config."""
    own = {
        "mask_token_id": MASK, "target_layer_ids": [0, 1], "causal": False, "projector_type": "dspark", "shift_label": True,
        "markov_rank": RANK, "markov_head_type": kind, "use_confidence_head": confidence,
    }  # fmt: skip
    layers = {key: value for key, value in QWEN3.items() if key not in ("rope_parameters", "use_sliding_window")}
    config = {**layers, "architectures": ["DFlashDraftModel"], "block_size": 8, "dflash_config": {**own, **changes}}
    config |= {"rope_theta": 10000.0, "rope_scaling": None, "tie_word_embeddings": False, "num_target_layers": TARGET_LAYERS}
    shapes = {
        **BACKBONE,
        **_numbered(QWEN3_LAYER),
        **{name.removeprefix("markov_head."): shape for name, shape in HEADS[kind].items()},
    }
    if confidence:
        shapes |= {"confidence_proj.weight": [1, HIDDEN + RANK], "confidence_proj.bias": [1]}
    return config, shapes


def speculators(kind="dspark", draft_vocab=VOCAB, block=8, first=None, layers=None, **changes):
    """(config, shapes) as speculators 0.9.0 writes them: its own keys outside, those of the layers inside. The embedding and, over all
    ids, the head are the target's. first: sample_from_anchor. layers: changes of transformer_layer_config."""
    first = kind == "dspark" if first is None else first
    method = {
        "accept_tolerance": 0.0, "proposal_type": "greedy", "speculative_tokens": block - (not first), "verifier_accept_k": 1,
    }  # fmt: skip
    verifier = {"architectures": ["Qwen3ForCausalLM"], "name_or_path": None}
    config = {
        "architectures": ["DSparkDraftModel" if kind == "dspark" else "DFlashDraftModel"],
        "auto_map": {"": "config.DSparkSpeculatorConfig"},
        "aux_hidden_state_layer_ids": [1, 2],
        "block_size": block,
        "draft_vocab_size": draft_vocab,
        "dtype": "float32",
        "mask_token_id": MASK,
        "sample_from_anchor": first,
        "sliding_window_non_causal": False,
        "speculators_config": {
            "algorithm": kind, "default_proposal_method": "greedy", "proposal_methods": [method], "verifier": verifier,
        },
        "speculators_model_type": kind,
        "speculators_version": "0.9.0",
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "transformer_layer_config": {**QWEN3, "sliding_window": None, "tie_word_embeddings": False, **(layers or {})},
        "transformers_version": "5.19.0",
    }  # fmt: skip
    shapes = {**BACKBONE, **_numbered(QWEN3_LAYER)}
    if kind == "dspark":
        heads = {"confidence_head_with_markov": True, "enable_confidence_head": True, "markov_head_type": "vanilla"}
        config |= {**heads, "markov_rank": RANK}
        shapes |= {**HEADS["vanilla"], "markov_head.markov_w2.weight": [draft_vocab, RANK], **CONFIDENCE["markov"]}
    if draft_vocab != VOCAB:
        shapes |= {"lm_head.weight": [draft_vocab, HIDDEN], "d2t": [draft_vocab], "t2d": [VOCAB]}
    return {**config, **changes}, shapes


SLIDING = dict(layer_types=["sliding_attention"] * LAYERS, sliding_window=6, use_sliding_window=True)  # speculators' default kind
YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0, "rope_type": "yarn"}
# Drafters whose numbers by the library's own forward are in tests/data/golden_speculators.npz (run_publishers.py --golden).
GOLDEN = {
    "windows, 17 ids": dict(draft_vocab=17, layers=SLIDING),
    "all ids, yarn, block 16": dict(block=16, layers=dict(rope_parameters=YARN)),
    "the anchor does not predict": dict(draft_vocab=17, first=False),
    "windows both ways, the anchor does not predict": dict(first=False, layers=SLIDING, sliding_window_non_causal=True),
    "dflash, windows, 17 ids": dict(kind="dflash", draft_vocab=17, layers=SLIDING),
}


EAGLE3_SPECULATORS = {
    "norm_before_residual": False, "norm_before_fc": False, "fc_norm": False, "norm_output": False, "embed_requires_grad": False,
    "target_hidden_size": None, "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
}  # fmt: skip


def eagle3_of_speculators(draft_vocab=17, model_type="llama", num_layers=1, layers=None, **changes):
    """(config, shapes) of an EAGLE-3 drafter as speculators 0.9.0 writes it. layers: changes of transformer_layer_config."""
    config, _ = speculators()
    own = {**QWEN3, "model_type": model_type, "num_hidden_layers": num_layers, "layer_types": ["full_attention"] * num_layers}
    verifier = {"architectures": ["Qwen3ForCausalLM"], "name_or_path": None}
    config = {
        "architectures": ["Eagle3DraftModel"],
        "auto_map": {"": "config.Eagle3SpeculatorConfig"},
        "draft_vocab_size": draft_vocab,
        "dtype": "float32",
        **EAGLE3_SPECULATORS,
        "speculators_config": {**config["speculators_config"], "algorithm": "eagle3", "verifier": verifier},
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "tie_word_embeddings": False,
        "transformer_layer_config": {**own, **(layers or {})},
        **changes,
    }
    shapes = {"embed_tokens.weight": [VOCAB, HIDDEN], "fc.weight": [HIDDEN, 3 * HIDDEN], "norm.weight": [HIDDEN]}
    shapes |= {"lm_head.weight": [draft_vocab, HIDDEN], "layers.0.hidden_norm.weight": [HIDDEN]}
    for i in range(num_layers):
        for name, shape in QWEN3_LAYER.items():
            wide = i == 0 and name.split(".")[-2] in ("q_proj", "k_proj", "v_proj")
            if model_type == "qwen3" or "self_attn.q_norm" not in name and "self_attn.k_norm" not in name:
                shapes[f"layers.{i}.{name}"] = [shape[0], 2 * HIDDEN] if wide else shape
    if config["norm_before_fc"]:
        shapes["input_norm.weight"] = [3 * HIDDEN]
    if config["fc_norm"]:
        shapes |= {f"fc_norm.{i}.weight": [HIDDEN] for i in range(3)}
    if draft_vocab != VOCAB:
        shapes |= {"d2t": [draft_vocab], "t2d": [VOCAB]}
    return config, shapes


# EAGLE-3 drafters of speculators whose numbers by its own forward are in tests/data/golden_speculators.npz.
GOLDEN_EAGLE3 = {
    "llama, 17 ids": {},
    "qwen3, all ids, every norm": dict(
        draft_vocab=VOCAB, model_type="qwen3", norm_before_residual=True, norm_before_fc=True, norm_output=True
    ),
    "llama, windows, a norm for each layer": dict(
        fc_norm=True, layers=dict(layer_types=["sliding_attention"], sliding_window=6, use_sliding_window=True)
    ),
    "qwen3, two layers": dict(model_type="qwen3", num_layers=2),
}


def golden_inputs():
    """Features [64, 2 d] of the target's two layers, and token ids [64]."""
    generator = torch.Generator().manual_seed(9)
    return torch.randn(64, 2 * HIDDEN, generator=generator), torch.randint(VOCAB, (64,), generator=generator)


def eagle3(**changes):
    """(config, shapes) of an EAGLE-3 drafter as SGLang's users publish it: a draft vocabulary of 11, mapped by d2t."""
    config = dict(
        architectures=["LlamaForCausalLMEagle3"],
        draft_vocab_size=11,
        head_dim=8,
        hidden_size=24,
        intermediate_size=36,
        model_type="llama",
        num_attention_heads=4,
        num_hidden_layers=1,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        vocab_size=VOCAB,
    )
    layer = {f"midlayer.{name}": shape for name, shape in QWEN3_LAYER.items() if "_norm" not in name}
    for name in "qkv":
        layer[f"midlayer.self_attn.{name}_proj.weight"] = [32 if name == "q" else 16, 48]
    shapes = {"fc.weight": [24, 72], "midlayer.hidden_norm.weight": [24], **layer, "norm.weight": [24], "lm_head.weight": [11, 24]}
    return {**config, **changes}, {**shapes, "d2t": [11], "t2d": [41]}


def target(**changes):
    """(config, shapes) of a Qwen3 target with three layers."""
    config = {**QWEN3, "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    shapes = {"model.embed_tokens.weight": [41, 24], "model.norm.weight": [24], "lm_head.weight": [41, 24]}
    for i in range(3):
        shapes.update({f"model.layers.{i}.{name}": shape for name, shape in QWEN3_LAYER.items()})
    return {**config, "tie_word_embeddings": False, **changes}, shapes


def tensors(shapes, dtype=torch.float32, seed=0):
    """Random weights whose sizes are those of trained ones: norms near 1, projections that keep the size of what they map."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        if name in ("d2t", "t2d"):  # draft id i is target id 2 i, and d2t the offset between them
            fewer = shapes["d2t"][0]
            ids = torch.arange(shape[0])
            made[name] = ids if name == "d2t" else (ids % 2 == 0) & (ids < 2 * fewer)
            continue
        values = torch.randn(shape, generator=generator)
        if len(shape) == 1 and "bias" not in name:
            values = 1 + 0.2 * values
        elif len(shape) == 2 and "embed" not in name and "markov_w1" not in name:
            values = values * (1.5 / shape[1] ** 0.5)
        made[name] = values.to(dtype)
    return made


def write(directory, config, made, shards=1):
    """A directory as transformers' save_pretrained writes it."""
    from safetensors.torch import save_file

    directory.mkdir(exist_ok=True, parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    if shards == 1:
        save_file(made, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    names, where = sorted(made), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: made[name] for name in names[i::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(part, file))
    size = sum(tensor.numel() * tensor.element_size() for tensor in made.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
