"""Make the embedded weights from trained ones: python -m bench.assets.quantise DIRECTORY.

DIRECTORY holds target.pt, ardraft.pt, mtp.pt, dflash_long.pt and dspark_long.pt as the training trial wrote them (a dict with the
sizes and a state dict each). Matrices become int8 with a scale per row, scale = max |row| / 127; vectors stay fp32.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from . import FOLDER, SCALE
from .tokenizer import MASK

LIMIT = 5_000_000  # bytes of all weights together


def quantise(tensor: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """int8 [rows, columns] and fp32 scale [rows]."""
    values = tensor.detach().float()
    scale = values.abs().amax(1).clamp(min=1e-12) / 127
    return (values / scale[:, None]).round().to(torch.int8).numpy(), scale.numpy()


def layer_config(sizes: dict, layers: int) -> dict:
    return {
        "vocab_size": sizes["V"],
        "hidden_size": sizes["d"],
        "intermediate_size": sizes["f"],
        "num_hidden_layers": layers,
        "num_attention_heads": sizes["nh"],
        "num_key_value_heads": sizes["nkv"],
        "head_dim": sizes["hd"],
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "hidden_act": "silu",
    }


def language_model(trained: dict, **more) -> tuple[dict, dict]:
    config = {"architectures": ["Qwen3ForCausalLM"], **layer_config(trained["c"], trained["c"]["L"])}
    return config | {"tie_word_embeddings": True} | more, {f"model.{k}": v for k, v in trained["sd"].items()}


def block(trained: dict, sizes: dict) -> tuple[dict, dict]:
    """A block drafter; it shares the target's embedding and head."""
    config = layer_config(sizes, trained["NL"]) | {
        "block_size": trained["BL"],
        "mask_token_id": MASK,
        "target_layer_ids": list(trained["IDS"]),
        "num_target_layers": sizes["L"],
    }
    rank = trained["R"]
    names = {
        "markov_w1.weight": "markov_head.markov_w1.weight",
        "markov_w2.weight": "markov_head.markov_w2.weight",
        "conf.weight": "confidence_head.proj.weight",
        "conf.bias": "confidence_head.proj.bias",
    }
    if rank:
        config |= {
            "architectures": ["Qwen3DSparkModel"],
            "markov_rank": rank,
            "markov_head_type": "vanilla",
            "enable_confidence_head": True,
            "confidence_head_with_markov": True,
        }
    # Without a sequential head there is nothing to schedule by: DFlash has no confidence head.
    kept = {k: v for k, v in trained["sd"].items() if rank or not k.startswith("conf.")}
    return config, {names.get(k, k): v for k, v in kept.items()}


def save(name: str, config: dict, tensors: dict) -> int:
    arrays = {"config": np.frombuffer(json.dumps(config).encode(), np.uint8)}
    for key, tensor in tensors.items():
        if tensor.ndim == 2:
            arrays[key], arrays[key + SCALE] = quantise(tensor)
        else:
            arrays[key] = tensor.detach().float().numpy()
    path = FOLDER / f"{name}.npz"
    np.savez_compressed(path, **arrays)
    return path.stat().st_size


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.assets.quantise", description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="where the trained *.pt files are")
    directory = parser.parse_args().directory

    def trained(name):
        path = directory / f"{name}.pt"
        if not path.is_file():
            parser.error(f"DIRECTORY: expected a file {path}, there is none")
        return torch.load(path, map_location="cpu", weights_only=True)

    target = trained("target")
    sizes = target["c"]
    models = {
        "target": language_model(target),
        "draft_model": language_model(trained("ardraft"), max_drafts=4),
        "mtp": ({"max_drafts": 4}, trained("mtp")["sd"]),
        "block": block(trained("dflash_long"), sizes),
        "dspark": block(trained("dspark_long"), sizes),
    }
    total = 0
    for name, (config, tensors) in models.items():
        size = save(name, config, tensors)
        total += size
        print(f"{name}.npz: {size} bytes, {sum(t.numel() for t in tensors.values())} parameters")
    print(f"all: {total} bytes")
    if total > LIMIT:
        raise SystemExit(f"the weights take {total} bytes, more than {LIMIT}")


if __name__ == "__main__":
    main()
