"""EAGLE-3 drafters of the speculators library: directories that it writes, and its forward pass over drafts that follow each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from speculators import SpeculatorsConfig, VerifierConfig
from speculators.models.eagle3 import Eagle3SpeculatorConfig
from speculators.models.eagle3.core import Eagle3DraftModel
from speculators.proposals.greedy import GreedyTokenProposalConfig
from speculators.train.vocab_mapping import build_vocab_mappings_from_distribution
from transformers import LlamaConfig, Qwen3Config

from dspark_kernels import checkpoint
from reference.drafters import Anchors, Committed, Eagle3
from reference.loop import REFERENCE_OPS
from reference.model import Rows, Target
from tests import directories as made
from tests.checkpoints import of_speculators

VOCAB, HIDDEN, DRAFTS = made.VOCAB, made.HIDDEN, 5


class Case(NamedTuple):
    """A drafter: what its transformer_layer_config and its own config say besides sizes."""

    name: str
    layer_class: type = LlamaConfig
    layers: dict = {}
    own: dict = {}
    draft_vocab: int = 17


_WINDOW = dict(layer_types=["sliding_attention"], sliding_window=6, use_sliding_window=True)
CASES = [
    Case("eagle3, llama, 17 of 41 ids"),
    Case("eagle3, qwen3, all ids", Qwen3Config, draft_vocab=VOCAB),
    Case("eagle3, default windows", layers=_WINDOW),
    Case("eagle3, default windows, qwen3", Qwen3Config, layers=_WINDOW),
    Case("eagle3, the normed residual", own=dict(norm_before_residual=True)),
    Case("eagle3, one norm before fc", own=dict(norm_before_fc=True)),
    Case("eagle3, a norm for each layer before fc", own=dict(fc_norm=True, norm_before_residual=True)),
    Case("eagle3, the output after its norm", Qwen3Config, own=dict(norm_output=True)),
    Case("eagle3, two layers", Qwen3Config, layers=dict(num_hidden_layers=2)),
    Case("eagle3, yarn", layers=dict(rope_parameters=of_speculators.YARN)),
    Case("eagle3, llama3", layers=dict(rope_parameters=of_speculators.LLAMA3)),
]


def cases() -> Iterator[tuple[str, Callable[[Path], dict[str, float]]]]:
    for case in CASES:
        yield case.name, lambda directory, case=case: compare(case, directory)


def write(case: Case, directory: Path) -> Eagle3DraftModel:
    generator = torch.Generator().manual_seed(7)
    sizes = dict(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=made.FFN, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-6, max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    layers = case.layer_class(**{**sizes, **case.layers})
    layers._attn_implementation = "eager"
    speculators = SpeculatorsConfig(
        algorithm="eagle3", proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=DRAFTS)],
        default_proposal_method="greedy", verifier=VerifierConfig(name_or_path=None, architectures=["Qwen3ForCausalLM"]),
    )  # fmt: skip
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=layers, draft_vocab_size=case.draft_vocab, eagle_aux_hidden_state_layer_ids=[1, 2, 3],
        speculators_config=speculators, **case.own,
    )  # fmt: skip
    model = Eagle3DraftModel(config).eval()
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(
            1 + 0.2 * values if parameter.ndim == 1 else values if "embed" in name else values * 1.5 / parameter.shape[1] ** 0.5
        )
    frequencies = {token: 1 + (token * 7) % 13 for token in range(0, VOCAB, 2)}
    d2t, t2d = build_vocab_mappings_from_distribution(frequencies, case.draft_vocab, VOCAB)
    model.load_vocab_mappings(t2d, d2t)
    model.save_pretrained(str(directory))
    return model


def theirs(model, features, token_ids, anchor: int, drafts: int) -> torch.Tensor:
    """Logits [drafts, Vd] of the drafts after the anchor, each given the ones before: the library reads them from `token_ids`.

    Its row i holds the features of position i and the token after it; the row before the anchor's gives a draft in each step."""
    seen: list[torch.Tensor] = []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output[0, anchor - 1]))
    rows = anchor + drafts
    model(
        hidden_states=features[None, :rows], input_ids=token_ids[None, 1 : rows + 1],
        document_ids=torch.zeros(1, rows, dtype=torch.long), ttt_steps=drafts,
    )  # fmt: skip
    handle.remove()
    return torch.stack(seen)


class WithoutVerifier(Eagle3DraftModel):
    """Loads a directory that names no verifier, where the library's own class asks for its config."""

    def load_verifier_weights(self) -> None:
        pass


class Watched:
    """The reference's ops, which keep the logits that they are given."""

    def __init__(self):
        self.logits: list[torch.Tensor] = []

    def draft_block(self, logits, *arguments, **options):
        self.logits.append(logits[0, 0])
        return REFERENCE_OPS.draft_block(logits, *arguments, **options)


def ours(loaded, target: Target, features, token_ids, anchor: int, drafts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of the reference, and the tokens that it drafts. The context comes in two commits, as in decoding."""
    drafter, ops = Eagle3({**loaded.config, "max_drafts": drafts}, loaded.tensors, target), Watched()
    drafter.start(1)
    cut = max(1, anchor - 3)
    for begin, end in ((0, cut), (cut, anchor)):
        if end > begin:
            rows = Rows.of([(0, begin, end - begin)], "cpu")
            drafter.commit(Committed(rows, token_ids[begin:end], token_ids[begin + 1 : end + 1], None, features[begin:end]))
        if end < anchor:  # drafts of a round whose rows are given up again
            stop = Anchors.of(token_ids[end : end + 1], torch.tensor([end]), [0])
            drafter.propose(stop, drafts=drafts, sampling=None, noise="draft", ops=REFERENCE_OPS)
    anchors = Anchors.of(token_ids[anchor : anchor + 1], torch.tensor([anchor]), [0])
    block = drafter.propose(anchors, drafts=drafts, sampling=None, noise="draft", ops=ops)
    return torch.stack(ops.logits), block.tokens[0]


def golden(directory: Path) -> dict:
    """The library's numbers of the directories `tests.directories.GOLDEN_EAGLE3`, which it loads as they are."""
    arrays, target = {}, Target(made.target()[0], made.tensors(made.target()[1], seed=1))
    for name, changes in made.GOLDEN_EAGLE3.items():
        config, shapes = made.eagle3_of_speculators(**changes)
        where = made.write(directory / f"eagle3 {name}", config, made.tensors(shapes, seed=4))
        own = Eagle3SpeculatorConfig.from_pretrained(where)
        own.transformer_layer_config._attn_implementation = "eager"
        model = WithoutVerifier.from_pretrained(where, config=own).eval()
        features, token_ids = made.golden_inputs()
        features = torch.cat([features, features.flip(1)[:, :HIDDEN]], 1)
        _, tokens = ours(checkpoint.load_eagle3(where), target, features, token_ids, 20, DRAFTS)
        token_ids[21 : 21 + len(tokens)] = tokens
        arrays[f"eagle3: {name}"] = theirs(model, features, token_ids, 20, DRAFTS).numpy()
    return arrays


def compare(case: Case, directory: Path) -> dict[str, float]:
    """The largest difference of the logits, as a share of the largest; inf where drafts are not the library's arg-max."""
    target = Target(made.target()[0], made.tensors(made.target()[1], seed=1))
    model = write(case, directory)
    loaded = checkpoint.load_eagle3(directory)
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(64, 3 * HIDDEN, generator=generator)
    token_ids = torch.randint(VOCAB, (64,), generator=generator)
    errors: dict[str, float] = {}
    for anchor in (2, 5, 40):
        logits, tokens = ours(loaded, target, features, token_ids, anchor, DRAFTS)
        token_ids[anchor + 1 : anchor + 1 + len(tokens)] = tokens
        want = theirs(model, features, token_ids, anchor, DRAFTS)
        best = want.argmax(-1)
        if not torch.equal(best if model.d2t is None else best + model.d2t[best], tokens):
            errors["drafts"] = float("inf")
        errors["logits"] = max(errors.get("logits", 0.0), float((logits - want).abs().max() / want.abs().max()))
    return errors
