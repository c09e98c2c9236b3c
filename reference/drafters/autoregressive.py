"""Plain decoding: no drafts, every round is one pass of the target and one token drawn from its distribution."""

from __future__ import annotations

from .protocol import Drafter


class Autoregressive(Drafter):
    """The baseline. Takes (config, tensors, target) as the others do and needs none of them."""

    def __init__(self, config=None, tensors=None, target=None):
        pass
