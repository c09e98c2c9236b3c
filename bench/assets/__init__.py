"""The embedded demo: a target and four drafters trained on real text, their tokenizer, and held-out prompts (README.md here).

Weights are int8 with one scale per row: tensor = int8 * scale; vectors are kept as they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .tokenizer import Tokenizer

FOLDER = Path(__file__).resolve().parent
SCALE = "#scale"
COST = FOLDER / "cost.json"  # a CostTable: measured times of the target's and of the DSpark drafter's step


class Weights(NamedTuple):
    """A model as a checkpoint directory would give it."""

    config: dict
    tensors: dict[str, Tensor]


def weights(name: str) -> Weights:
    """One of "target", "draft_model", "mtp", "block", "dspark", in fp32."""
    with np.load(FOLDER / f"{name}.npz") as file:
        config = json.loads(bytes(file["config"]).decode())
        tensors = {}
        for key in file.files:
            if key == "config" or key.endswith(SCALE):
                continue
            values = torch.from_numpy(file[key].astype(np.float32))
            if key + SCALE in file.files:
                values *= torch.from_numpy(file[key + SCALE])[:, None]
            tensors[key] = values
    return Weights(config, tensors)


def tokenizer() -> Tokenizer:
    return Tokenizer(json.loads((FOLDER / "merges.json").read_text()))


def prompts() -> list[str]:
    """Pieces of text that no model was trained on."""
    return json.loads((FOLDER / "prompts.json").read_text())
