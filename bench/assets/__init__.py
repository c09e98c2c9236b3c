"""The embedded demo: a target and its drafters trained on real text, their tokenizer, and held-out prompts (README.md here).

Weights are int8 with one scale per row: tensor = int8 * scale; vectors are kept as they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .tokenizer import Tokenizer

if TYPE_CHECKING:  # which takes a second: commands that only say what they are do without
    from torch import Tensor

FOLDER = Path(__file__).resolve().parent
SCALE = "#scale"
COST = FOLDER / "cost.json"  # a CostTable: measured times of the target's and of the DSpark drafter's step


class Weights(NamedTuple):
    """A model as a checkpoint directory would give it."""

    config: dict
    tensors: dict[str, Tensor]


def weights(name: str, folder: Path = FOLDER) -> Weights:
    """One of "target", "draft_model", "mtp", "block", "dspark" and, where there are some, "dspark_gated" and "dspark_rnn", in fp32.

    A config with `backbone` names the model that has the tensors which are not in the file.
    """
    import numpy as np
    import torch

    with np.load(folder / f"{name}.npz") as file:
        config = json.loads(bytes(file["config"]).decode())
        tensors = {}
        for key in file.files:
            if key == "config" or key.endswith(SCALE):
                continue
            values = torch.from_numpy(file[key].astype(np.float32))
            if key + SCALE in file.files:
                values *= torch.from_numpy(file[key + SCALE])[:, None]
            tensors[key] = values
    if "backbone" in config:
        tensors = weights(config.pop("backbone"), folder).tensors | tensors
    return Weights(config, tensors)


def there(name: str, folder: Path = FOLDER) -> bool:
    """Whether a model of this name is shipped."""
    return (folder / f"{name}.npz").is_file()


def tokenizer(folder: Path = FOLDER) -> Tokenizer:
    return Tokenizer(json.loads((folder / "merges.json").read_text()))


def prompts(domain: str = "code", folder: Path = FOLDER) -> list[str]:
    """Pieces of text that no model was trained on; of domains(folder)."""
    if domain == "code":
        return json.loads((folder / "prompts.json").read_text())
    return json.loads((folder / "domains.json").read_text(encoding="utf-8"))[domain]


def domains(folder: Path = FOLDER) -> list[str]:
    """Kinds of text that there are prompts of, code first."""
    more = folder / "domains.json"
    return ["code", *(json.loads(more.read_text(encoding="utf-8")) if more.is_file() else ())]
