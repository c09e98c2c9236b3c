"""DSpark and DFlash drafters of the speculators library: directories that it writes, and its forward pass over one block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from speculators import SpeculatorsConfig, VerifierConfig
from speculators.models.dflash import DFlashSpeculatorConfig
from speculators.models.dflash.core import DFlashDraftModel
from speculators.models.dspark import DSparkSpeculatorConfig
from speculators.models.dspark.core import DSparkDraftModel
from speculators.proposals.greedy import GreedyTokenProposalConfig
from speculators.train.vocab_mapping import build_vocab_mappings_from_distribution
from transformers import LlamaConfig, Qwen3Config

from dspark_kernels import checkpoint
from dspark_kernels.integrations.transformers.backbone import Backbone
from reference.draft import draft_block
from reference.drafters import Anchors, Block, Committed, DSpark
from reference.model import Rows, Target
from tests import directories as made

VERSION = version("speculators")
VOCAB, HIDDEN, CONTEXT, MASK = made.VOCAB, made.HIDDEN, 40, 40
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


_CLASSES = {"dspark": (DSparkSpeculatorConfig, DSparkDraftModel), "dflash": (DFlashSpeculatorConfig, DFlashDraftModel)}


class Case(NamedTuple):
    """A drafter. layers: what its transformer_layer_config says besides sizes; own: what its own config does."""

    name: str
    kind: str = "dspark"
    layers: dict = {}
    own: dict = {}
    draft_vocab: int = VOCAB
    layer_class: type = Qwen3Config


def _windows(*kinds: str, size: int = 6) -> dict:
    full = {"f": "full_attention", "s": "sliding_attention"}
    return dict(layer_types=[full[kind] for kind in kinds], sliding_window=size, use_sliding_window=True)


_SLIDING = _windows("s", "s")  # the library's default: every layer, the block causal
CASES = [
    Case("dspark, block 8"),
    Case("dspark, block 16, 17 of 41 ids", own=dict(block_size=16), draft_vocab=17),
    Case("dspark, default windows, 17 ids", layers=_SLIDING, draft_vocab=17),
    Case("dspark, windows both ways", layers=_SLIDING, own=dict(sliding_window_non_causal=True)),
    Case("dspark, one layer with a window", layers=_windows("s", "f")),
    Case("dspark, a window wider than the context", layers=_windows("f", "s", size=64)),
    Case("dspark, the anchor does not predict", own=dict(sample_from_anchor=False), draft_vocab=17),
    Case("dspark, the anchor does not predict, windows", layers=_SLIDING, own=dict(sample_from_anchor=False)),
    Case("dspark, gated", own=dict(markov_head_type="gated"), draft_vocab=17),
    Case("dspark, gated, the anchor does not predict", own=dict(markov_head_type="gated", sample_from_anchor=False)),
    Case("dspark, rnn", own=dict(markov_head_type="rnn"), draft_vocab=17),
    Case("dspark, confidence without the token", own=dict(confidence_head_with_markov=False)),
    Case("dspark, no confidence", own=dict(enable_confidence_head=False)),
    Case("dspark, rank 0", own=dict(markov_rank=0, confidence_head_with_markov=False)),
    Case("dspark, yarn", layers=dict(rope_parameters=YARN)),
    Case("dspark, yarn with its own factors", layers=dict(
        rope_parameters={**YARN, "beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.3, "truncate": False})),
    Case("dspark, llama3", layers=dict(rope_parameters=LLAMA3), layer_class=LlamaConfig),
    Case("dspark, the embedding and the last layer", own=dict(aux_hidden_state_layer_ids=[0, 3])),
    Case("dspark, a Llama config of layers", layer_class=LlamaConfig, draft_vocab=17),
    Case("dflash, block 8", kind="dflash"),
    Case("dflash, default windows, block 16, 17 ids", kind="dflash", layers=_SLIDING, own=dict(block_size=16), draft_vocab=17),
    Case("dflash, the anchor predicts", kind="dflash", own=dict(sample_from_anchor=True)),
    Case("dflash, yarn, 17 ids", kind="dflash", layers=dict(rope_parameters=YARN), draft_vocab=17),
]  # fmt: skip


def cases() -> Iterator[tuple[str, Callable[[Path], dict[str, float]]]]:
    for case in CASES:
        yield case.name, lambda directory, case=case: compare(case, directory)


def write(case: Case, directory: Path, target: Target):
    """A directory of the library, and the model that it holds, with the target's embedding and head where these are the target's."""
    generator = torch.Generator().manual_seed(7)
    sizes = dict(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=made.FFN, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-6, max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    layers = case.layer_class(**{**sizes, **case.layers})
    layers._attn_implementation = "eager"
    config_class, model_class = _CLASSES[case.kind]
    own = dict(block_size=8, sample_from_anchor=case.kind == "dspark", aux_hidden_state_layer_ids=[1, 2], mask_token_id=MASK)
    own |= dict(markov_rank=5) if case.kind == "dspark" else {}
    own |= case.own
    method = GreedyTokenProposalConfig(speculative_tokens=own["block_size"] - (not own["sample_from_anchor"]))
    speculators = SpeculatorsConfig(
        algorithm=case.kind, proposal_methods=[method], default_proposal_method="greedy",
        verifier=VerifierConfig(name_or_path=None, architectures=["Qwen3ForCausalLM"]),
    )  # fmt: skip
    config = config_class(transformer_layer_config=layers, draft_vocab_size=case.draft_vocab, speculators_config=speculators, **own)
    model = model_class(config).eval()
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        flat = parameter.ndim == 1 and "bias" not in name
        small = parameter.ndim == 2 and "markov_w1" not in name
        parameter.copy_(1 + 0.2 * values if flat else values * 1.5 / parameter.shape[1] ** 0.5 if small else values)
    frequencies = {token: 1 + (token * 7) % 13 for token in range(0, VOCAB, 2)}
    d2t, t2d = build_vocab_mappings_from_distribution(frequencies, case.draft_vocab, VOCAB)
    model.load_vocab_mappings(t2d, d2t)
    model.embed_tokens.weight.copy_(target.embedding)
    if case.draft_vocab == VOCAB:
        model.lm_head.weight.copy_(target.head)
    model.save_pretrained(str(directory))
    return model


def theirs(model, features, token_ids, anchor: int) -> dict[str, torch.Tensor]:
    """The library's numbers of the block at `anchor`, whose tokens are those of `token_ids`: what its own forward computes."""
    own, length = model.config, token_ids.shape[0]
    loss_mask = torch.zeros(1, length, dtype=torch.long)
    loss_mask[0, anchor] = 1
    hidden, logits, *_ = model._backbone_forward(
        features[None], token_ids[None], loss_mask, torch.zeros(1, length, HIDDEN), torch.zeros(1, length, dtype=torch.long),
        max_anchors=1,
    )  # fmt: skip
    block = token_ids[anchor : anchor + own.block_size][None]
    previous = block if own.sample_from_anchor else torch.cat([block[:, :1], block[:, :-1]], 1)
    first = 0 if own.sample_from_anchor else 1
    out = {"hidden": hidden[0, first:], "base logits": logits[0, first:]}
    head = getattr(model, "markov_head", None)
    if head is not None:
        out["logits"] = out["base logits"] + head.block_bias(prev_token_ids=previous, hidden_states=hidden)[0, first:]
    if getattr(model, "confidence_head", None) is not None:
        parts = [hidden] + ([head.prev_embeddings(previous)] if own.confidence_head_with_markov else [])
        out["confidence"] = torch.sigmoid(model.confidence_head(torch.cat(parts, -1)))[0, first:]
    return out


def ours(loaded, target: Target, features, token_ids, anchor: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The same of the reference, and the tokens that it drafts."""
    kind = DSpark if loaded.head is not None or loaded.confidence is not None else Block
    drafter = kind(loaded.config, loaded.tensors, target)
    drafter.start(1)
    drafter.commit(Committed(Rows.of([(0, 0, anchor)], "cpu"), None, None, None, features[:anchor]))
    hidden = drafter.block_hidden(Anchors.of(token_ids[anchor : anchor + 1], torch.tensor([anchor]), [0]))
    base = drafter.base_logits(hidden)
    block = draft_block(
        base, token_ids[anchor : anchor + 1], drafter.head, anchor_positions=torch.tensor([anchor]), hidden=hidden,
        confidence=drafter.confidence, draft_to_target=drafter.draft_to_target, keep_logits=True,
    )  # fmt: skip
    out = {"hidden": hidden[0], "base logits": base[0], "logits": block.proposal.logits[0]}
    if block.confidence is not None:
        out["confidence"] = block.confidence[0]
    return out, block.tokens[0]


def in_transformers(loaded, target: Target, features, token_ids, anchor: int) -> dict[str, torch.Tensor]:
    """The same of the backbone of `model.generate`, which adds no sequential head."""
    backbone = Backbone(loaded, target.embedding, target.head)
    backbone.start(anchor + 1)
    backbone.inject(features[None, :anchor], torch.arange(anchor)[None])
    hidden = backbone.hidden(token_ids[anchor : anchor + 1], torch.tensor([anchor]), anchor + backbone.block_rows)
    return {"hidden": hidden[0], "base logits": backbone.base_logits(hidden)[0]}


def golden(directory: Path) -> dict:
    """The library's numbers of the directories `tests.directories.GOLDEN`, which it loads as they are, for a context of 20."""
    arrays, target = {}, Target(made.target()[0], made.tensors(made.target()[1], seed=1))
    for name, changes in made.GOLDEN.items():
        config, shapes = made.speculators(**changes)
        where = made.write(directory / name, config, made.tensors(shapes, seed=4))
        config_class, model_class = _CLASSES[changes.get("kind", "dspark")]
        own = config_class.from_pretrained(where)
        own.transformer_layer_config._attn_implementation = "eager"
        model = model_class.from_pretrained(where, config=own).eval()
        model.embed_tokens.weight.copy_(target.embedding)
        if model.d2t is None:
            model.lm_head.weight.copy_(target.head)
        features, token_ids = made.golden_inputs()
        numbers, tokens = ours(checkpoint.load_drafter(where), target, features, token_ids, 20)
        token_ids[21 : 21 + len(tokens)] = tokens
        arrays |= {f"{name}: {what}": number.numpy() for what, number in theirs(model, features, token_ids, 20).items()}
    return arrays


def compare(case: Case, directory: Path) -> dict[str, float]:
    """The largest differences by what is compared, as shares of the largest number; inf where drafts are not the library's arg-max."""
    config, shapes = made.target()
    target = Target(config, made.tensors(shapes, seed=1))
    model = write(case, directory, target)
    loaded = checkpoint.load_drafter(directory)
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(CONTEXT + 24, 2 * HIDDEN, generator=generator)
    token_ids = torch.randint(VOCAB, (CONTEXT + 24,), generator=generator)
    errors: dict[str, float] = {}
    for anchor in (2, 5, CONTEXT):
        numbers, tokens = ours(loaded, target, features, token_ids, anchor)
        token_ids[anchor + 1 : anchor + 1 + len(tokens)] = tokens
        want = theirs(model, features, token_ids, anchor)
        want.setdefault("logits", want["base logits"])
        assert want.keys() == numbers.keys(), (want.keys(), numbers.keys())
        best = want["logits"].argmax(-1)
        best = best if model.d2t is None else best + model.d2t[best]
        if not torch.equal(best, tokens):
            errors["drafts"] = float("inf")
        both = [(what, numbers[what]) for what in want]
        both += list(in_transformers(loaded, target, features, token_ids, anchor).items())
        for what, number in both:
            assert number.shape == want[what].shape, (what, number.shape, want[what].shape)
            error = float((number - want[what]).abs().max() / want[what].abs().max())
            errors[what] = max(errors.get(what, 0.0), error)
    return errors
