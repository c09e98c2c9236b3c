"""Every case of bench.kernels, those that matter most first."""

from __future__ import annotations

from bench.shared.cases import accept, attention, candidates, draft, layout, trees
from bench.shared.cases.case import Case


def registry() -> list[Case]:
    chains = draft.registry() + accept.registry() + layout.scheduling() + candidates.registry()
    return chains + attention.registry() + trees.registry() + layout.registry()
