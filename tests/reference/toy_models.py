"""Tiny random models and drafters for tests of the decoding loop, and what plain decoding with them gives."""

from __future__ import annotations

import dataclasses

import torch

from dspark_kernels.types import CostTable
from reference.drafters import MTP, Block, DraftModel, DSpark
from reference.loop import Request
from reference.model import Rows, Target

VOCAB = 11
LAYER = dict(hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=4)
SIZES = dict(LAYER, vocab_size=VOCAB, rms_norm_eps=1e-6, rope_theta=100.0)
BLOCK = dict(SIZES, num_hidden_layers=1, block_size=4, mask_token_id=VOCAB - 1, target_layer_ids=[-1, 0, 1])
DSPARK = dict(BLOCK, markov_rank=3, markov_head_type="vanilla", enable_confidence_head=True, confidence_head_with_markov=True)


def random(generator, *shape, scale=1.0):
    return torch.randn(shape, generator=generator) * scale


def layer_tensors(generator, prefix):
    d, queries, keys, ffn = 16, 16, 8, 24
    norms = {"input_layernorm": d, "post_attention_layernorm": d, "self_attn.q_norm": 4, "self_attn.k_norm": 4}
    matrices = {
        "self_attn.q_proj": (queries, d),
        "self_attn.k_proj": (keys, d),
        "self_attn.v_proj": (keys, d),
        "self_attn.o_proj": (d, queries),
        "mlp.gate_proj": (ffn, d),
        "mlp.up_proj": (ffn, d),
        "mlp.down_proj": (d, ffn),
    }
    tensors = {name: 1 + random(generator, size, scale=0.1) for name, size in norms.items()}
    tensors |= {name: random(generator, *shape, scale=0.4) for name, shape in matrices.items()}
    return {f"{prefix}{name}.weight": tensor for name, tensor in tensors.items()}


def model_tensors(seed, layers=2, vocab=VOCAB):
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "model.embed_tokens.weight": random(generator, vocab, 16),
        "model.norm.weight": 1 + random(generator, 16, scale=0.1),
        "lm_head.weight": random(generator, vocab, 16, scale=0.4),
    }
    for i in range(layers):
        tensors |= layer_tensors(generator, f"model.layers.{i}.")
    return tensors


def make_target(vocab=VOCAB, seed=1):
    return Target(dict(SIZES, vocab_size=vocab, num_hidden_layers=2), model_tensors(seed, vocab=vocab))


def make_draft_model(target, seed=1):
    """The target's own weights, disturbed: right often, not always."""
    generator, tensors = torch.Generator().manual_seed(seed + 50), model_tensors(seed)
    tensors = {name: tensor + random(generator, *tensor.shape, scale=0.06) for name, tensor in tensors.items()}
    return DraftModel(dict(SIZES, num_hidden_layers=2, max_drafts=3), tensors, target)


def make_mtp(target, seed=3):
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"{name}.weight": torch.ones(16) for name in ("enorm", "hnorm", "norm")}
    tensors["eh_proj.weight"] = random(generator, 16, 32, scale=0.3)
    return MTP(dict(max_drafts=3), tensors | layer_tensors(generator, "layer."), target)


def block_tensors(seed, vocab=VOCAB, features=3):
    generator = torch.Generator().manual_seed(seed)
    tensors = {"hidden_norm.weight": torch.ones(16), "norm.weight": torch.ones(16)}
    tensors["fc.weight"] = random(generator, 16, features * 16, scale=0.2)
    return tensors | layer_tensors(generator, "layers.0.")


def make_block(target, seed=4, **changes):
    return Block({**BLOCK, "vocab_size": target.shape.vocab, **changes}, block_tensors(seed), target)


def make_dspark(target, seed=4, kind="vanilla", **changes):
    config = {**DSPARK, "vocab_size": target.shape.vocab, "markov_head_type": kind, **changes}
    generator, vocab, rank = torch.Generator().manual_seed(seed + 9), config["vocab_size"], config["markov_rank"]
    tensors = block_tensors(seed)
    for name in ("w1", "w2"):
        tensors[f"markov_head.markov_{name}.weight"] = random(generator, vocab, rank)
    tensors["markov_head.gate_proj.weight"] = random(generator, rank, 16 + rank, scale=0.3)
    tensors["markov_head.gate_proj.bias"] = random(generator, rank)
    tensors["markov_head.joint_proj.weight"] = random(generator, 3 * rank, 2 * rank + 16, scale=0.3)
    tensors["markov_head.joint_proj.bias"] = random(generator, 3 * rank)
    width = 16 + (rank if config["confidence_head_with_markov"] else 0)
    tensors["confidence_head.proj.weight"] = random(generator, 1, width, scale=0.4)
    tensors["confidence_head.proj.bias"] = torch.zeros(1)
    return DSpark(config, tensors, target)


TARGET = make_target()
COST = CostTable(seconds=1e-3 * (1.0 + 0.08 * torch.arange(64.0)))
SYSTEMS = {
    "draft model": (make_draft_model, {}),
    "MTP": (make_mtp, {}),
    "block": (make_block, {}),
    "block, anchor and masks": (lambda target: make_block(target, anchor_first=False), {}),
    "DSpark": (make_dspark, {}),
    "DSpark, two drafts": (make_dspark, dict(max_drafts=2)),
    "DSpark, gated": (lambda target: make_dspark(target, kind="gated"), {}),
    "DSpark, rnn": (lambda target: make_dspark(target, kind="rnn"), {}),
    "DSpark, no head": (lambda target: make_dspark(target, markov_rank=0, confidence_head_with_markov=False), {}),
    "DSpark, threshold": (make_dspark, dict(confidence_threshold=0.5)),
    "DSpark, causal": (make_dspark, dict(cost=COST)),
    "DSpark, budget": (make_dspark, dict(cost=COST, policy="budget")),
}


def requests_of(count=7, temperature=0.0, **changes):
    generator = torch.Generator().manual_seed(7)
    requests = []
    for i in range(count):
        length = (3, 9, 1, 14, 5, 2, 6)[i % 7]
        prompt = torch.randint(0, VOCAB - 1, (length,), generator=generator).tolist()
        requests.append(Request(prompt, (12, 5, 17, 1, 9, 14, 8)[i % 7], temperature, seed=100 + i))
    return [dataclasses.replace(request, **changes) for request in requests]


def plain_greedy(target, request):
    """Greedy decoding without caches, drafts or batches."""
    ids = list(request.prompt)
    for _ in range(request.max_new_tokens):
        ids.append(int(all_logits(target, ids)[-1].argmax()))
    return ids


def all_logits(target, ids):
    rows = Rows.of([(0, 0, len(ids))], target.device)
    return target.logits(target.forward(torch.tensor(ids), rows, target.new_cache(1)).hidden)
