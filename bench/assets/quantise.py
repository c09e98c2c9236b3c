"""The files that the embedded models are shipped in: matrices int8 with a scale per row, scale = max |row| / 127; vectors fp32."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from . import FOLDER, SCALE


def quantise(tensor: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """int8 [rows, columns] and fp32 scale [rows]."""
    values = tensor.detach().float()
    scale = values.abs().amax(1).clamp(min=1e-12) / 127
    return (values / scale[:, None]).round().to(torch.int8).numpy(), scale.numpy()


def save(name: str, config: Mapping, tensors: Mapping[str, torch.Tensor], folder: Path = FOLDER) -> int:
    """Writes folder/name.npz; its size in bytes."""
    arrays = {"config": np.frombuffer(json.dumps(config).encode(), np.uint8)}
    for key, tensor in tensors.items():
        if tensor.ndim == 2:
            arrays[key], arrays[key + SCALE] = quantise(tensor)
        else:
            arrays[key] = tensor.detach().float().numpy()
    path = folder / f"{name}.npz"
    np.savez_compressed(path, **arrays)
    return path.stat().st_size
