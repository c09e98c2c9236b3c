"""The systems that are compared: a drafter each, and how it drafts, schedules and verifies."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import torch

from bench.decode import trees
from bench.decode.models import Models, naming
from bench.shared.command import BadArgument
from dspark_kernels.types import CostTable
from reference.drafters import Autoregressive, Drafter, TreeShape

SYSTEMS = (
    "autoregressive",
    "draft-model",
    "mtp",
    "mtp-tree",
    "eagle3",
    "eagle3-tree",
    "block",
    "block-tree",
    "dspark",
    "dspark-tree",
)


@dataclasses.dataclass(frozen=True)
class System:
    """A row of the table."""

    name: str  # one of SYSTEMS
    source: str
    drafter: Drafter
    threshold: float = 0.0
    cost: CostTable | None = None  # schedule by measured times, instead of a threshold
    drafts: int | None = None  # per round, where not all that the drafter makes
    tree: TreeShape | None = None
    ops: object = None  # None: the reference's

    @property
    def label(self) -> str:
        label = self.name + (f", {self.source}" if self.source else "")
        label += f", {self.drafts} drafts" if self.drafts is not None else ""
        label += f", {self.tree.num_nodes} nodes" if self.tree is not None else ""
        label += ", sampled" if trees.sampled(self.tree) else ""
        label += f", threshold {self.threshold:g}" if self.threshold else ""
        return label + (", scheduled" if self.cost is not None else "") + (", kernels" if self.ops else "")


def kernel_ops(device: str):
    """The Triton ops in the shape the loop takes; on a CPU in Triton's interpreter. Raises BadArgument."""
    if torch.device(device).type == "cpu":
        from dspark_kernels.testing import interpreter

        with naming("--kernels"):
            interpreter.repair()
    import dspark_kernels as dk

    return SimpleNamespace(
        draft_block=dk.draft_block,
        fixed_layout=dk.fixed_layout,
        accept_chain=dk.accept_chain,
        schedule_prefixes=dk.schedule_prefixes,
        draft_tree=dk.draft_tree,
        expand_tree=dk.expand_tree,
        tree_layout=dk.tree_layout,
        accept_tree=dk.accept_tree,
        compact_kv=dk.compact_kv,
        plan_attention=dk.plan_attention,
        tree_attention=dk.tree_attention,
    )


def systems_of(arguments, models: Models) -> list[System]:
    """Rows of the table. Raises BadArgument."""
    there = ["autoregressive"]
    for name, _, _ in models.drafters:
        there += [name, name + trees.SUFFIX] if name + trees.SUFFIX in trees.NODES else [name]
    wanted = arguments.systems
    if wanted is None:
        wanted = [name for name in there if arguments.model is None or not name.endswith(trees.SUFFIX)]
    for name in wanted:
        if name not in there:
            known = ", ".join(dict.fromkeys(there))
            raise BadArgument(f"--systems: expected names among {known} (with these models), got {name!r}")
    systems = [System("autoregressive", "", Autoregressive())] if "autoregressive" in wanted else []
    ops = kernel_ops(arguments.device) if arguments.kernels else None
    for name, source, make in models.drafters:
        if name not in wanted and name + trees.SUFFIX not in wanted:
            continue
        drafter = make()
        if name in wanted:
            thresholds = arguments.confidence_threshold if name == "dspark" else [0.0]
            if any(thresholds) and not drafter.has_confidence:
                thresholds = [0.0]
            rows = [System(name, source, drafter, threshold) for threshold in thresholds]
            if drafter.has_confidence and models.cost is not None:
                rows.append(System(name, source, drafter, cost=models.cost))
            systems += rows
            if ops is not None and (name == "dspark" or name + trees.SUFFIX in wanted):
                systems += [dataclasses.replace(row, ops=ops) for row in rows]
        if name + trees.SUFFIX in wanted:
            systems += _tree_systems(arguments, name, source, drafter, ops)
    if arguments.cost is not None and not any(system.cost is not None for system in systems):
        raise BadArgument("--cost: expected a drafter with a confidence head among the systems, there is none")
    if arguments.kernels and not any(system.ops for system in systems):
        raise BadArgument("--kernels: expected dspark among the systems, or a tree, there is none")
    return systems


def _tree_systems(arguments, name: str, source: str, drafter: Drafter, ops) -> list[System]:
    """Rows of a drafter's trees, each below the chain that verifies as many rows; through the kernels, too."""
    systems = []
    for num_nodes in dict.fromkeys(arguments.tree_nodes or trees.NODES[name + trees.SUFFIX]):
        chain = trees.chain(drafter, num_nodes)
        if chain is not None:
            systems.append(System(name, source, chain[0], drafts=chain[1]))
        for shape in trees.shapes(drafter, num_nodes):
            if arguments.tree_nodes is not None or not trees.sampled(shape) or num_nodes <= trees.SAMPLED_NODES.get(name, 0):
                systems.append(System(name + trees.SUFFIX, source, drafter, tree=shape))
    return systems + ([dataclasses.replace(row, ops=ops) for row in systems] if ops is not None else [])
