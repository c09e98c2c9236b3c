"""DSpark drafters of NVIDIA Model-Optimizer: directories of its exporter, and its draft module's forward pass over one block."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from modelopt.torch.export.plugins.hf_spec_export import DSparkExporter
from modelopt.torch.speculative.plugins.modeling_dspark import DSparkModule
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from dspark_kernels import checkpoint
from reference.model import Target
from tests import directories as made
from tests.checkpoints import of_speculators

VERSION = version("nvidia-modelopt")
BLOCK, HIDDEN = 8, made.HIDDEN
SIZES = dict(
    vocab_size=made.VOCAB, hidden_size=HIDDEN, intermediate_size=made.FFN, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    rms_norm_eps=1e-6, max_position_embeddings=256, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)  # fmt: skip
CASES = {
    "modelopt, dspark": {},
    "modelopt, dspark, gated": dict(markov_head_type="gated"),
    "modelopt, dspark, rnn": dict(markov_head_type="rnn"),
    "modelopt, dspark, no confidence": dict(use_confidence_head=False),
}


def cases() -> Iterator[tuple[str, Callable[[Path], dict[str, float]]]]:
    for name, heads in CASES.items():
        yield name, lambda directory, heads=heads: compare(heads, directory)


def write(heads: dict, directory: Path) -> DSparkModule:
    """A directory of the exporter, and the module that it holds."""
    own = dict(markov_rank=5, markov_head_type="vanilla", use_confidence_head=True, projector_type="dspark") | heads
    config = Qwen3Config(num_hidden_layers=2, **SIZES, block_size=BLOCK, target_layer_ids=[0, 1], **own)
    config._attn_implementation = "sdpa"
    module, generator = DSparkModule(config).eval(), torch.Generator().manual_seed(7)
    module.rotary_emb = Qwen3RotaryEmbedding(config)  # transformers 5.19 takes no device, which the library gives where it makes it
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        small = parameter.ndim == 2 and "markov_w1" not in name
        norm = parameter.ndim == 1 and "bias" not in name
        parameter.copy_(1 + 0.2 * values if norm else values * 1.5 / parameter.shape[1] ** 0.5 if small else values)
    whole = SimpleNamespace(
        config=Qwen3Config(num_hidden_layers=3, **SIZES), dflash_config=config, dflash_block_size=BLOCK, mask_token_id=made.MASK,
        target_layer_ids=[0, 1], dflash_swa_window_size=None, dflash_draft_attention="bidirectional",
        state_dict=lambda: {f"dflash_module.{name}": tensor for name, tensor in module.state_dict().items()},
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        DSparkExporter(whole).export(directory)
    return module


def theirs(module, target: Target, features, token_ids, anchor: int) -> dict[str, torch.Tensor]:
    """The numbers of the block at `anchor`, in the steps of HFDSparkModel's forward; the head is the target's."""
    noise = torch.full((1, BLOCK), made.MASK)
    noise[0, 0] = token_ids[anchor]
    positions = torch.cat([torch.arange(anchor), anchor + torch.arange(BLOCK)])[None]
    embedded = torch.nn.functional.embedding(noise, target.embedding)
    hidden = module(noise_embedding=embedded, target_hidden=features[None, :anchor], position_ids=positions)
    previous = token_ids[anchor : anchor + BLOCK][None, None]
    base = hidden @ target.head.T
    out = {"hidden": hidden[0], "base logits": base[0], "logits": (base + module.compute_markov_bias(previous, hidden[None])[0])[0]}
    if module.use_confidence_head:
        out["confidence"] = torch.sigmoid(module.compute_confidence_logits(previous, hidden[None]))[0, 0]
    return out


def compare(heads: dict, directory: Path) -> dict[str, float]:
    """As of_speculators.compare."""
    target = Target(made.target()[0], made.tensors(made.target()[1], seed=1))
    module = write(heads, directory)
    loaded = checkpoint.load_drafter(directory)
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(64, 2 * HIDDEN, generator=generator)
    token_ids = torch.randint(made.VOCAB, (64,), generator=generator)
    errors: dict[str, float] = {}
    for anchor in (2, 40):
        numbers, tokens = of_speculators.ours(loaded, target, features, token_ids, anchor)
        token_ids[anchor + 1 : anchor + 1 + len(tokens)] = tokens
        want = theirs(module, target, features, token_ids, anchor)
        if not torch.equal(want["logits"].argmax(-1), tokens):
            errors["drafts"] = float("inf")
        assert want.keys() == numbers.keys()
        both = [*numbers.items(), *of_speculators.in_transformers(loaded, target, features, token_ids, anchor).items()]
        for what, number in both:
            error = float((number - want[what]).abs().max() / want[what].abs().max())
            errors[what] = max(errors.get(what, 0.0), error)
    return errors
