"""Outputs of ops, field by field: overwritten before a call, compared after it, moved to a device."""

import dataclasses

import torch

SENTINEL = -77777  # no op writes it


def poisoned(value):
    """The same fields, every tensor overwritten with what no op writes."""
    if isinstance(value, torch.Tensor):
        return torch.ones_like(value) if value.dtype == torch.bool else torch.full_like(value, SENTINEL)
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **{f.name: poisoned(getattr(value, f.name)) for f in dataclasses.fields(value)})
    return value


def to_device(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if dataclasses.is_dataclass(value):
        return type(value)(**{f.name: to_device(getattr(value, f.name), device) for f in dataclasses.fields(value)})
    return value


def assert_same(have, want, name=""):
    """Every field holds the same bits in the same dtype, NaN where NaN."""
    if isinstance(want, torch.Tensor):
        assert have.dtype == want.dtype and torch.equal(have.nan_to_num(-1e9), want.nan_to_num(-1e9)), f"{name}: {have} != {want}"
    elif dataclasses.is_dataclass(want):
        for field in dataclasses.fields(want):
            assert_same(getattr(have, field.name), getattr(want, field.name), f"{name}.{field.name}".removeprefix("."))
    else:
        assert have == want, f"{name}: {have} != {want}"
