"""Reductions that Triton before 3.9 compiles wrongly, found in its GPU IR (TTGIR).

What was reshaped has a linear layout: a list of what each bit of a lane's number adds to an index, 0 where lanes hold copies. Triton
3.6 and 3.7 exchange along as many bits as the reduced dimension has, counted from its lowest one, so where copies stand between

    lane = [[2], [4], [0], [0], [1]]     five bits of a lane, 8 elements: exchanged are bits 0 to 2, due are 0, 1 and 4

each half of the warp reduces half of the elements. Triton 3.9 exchanges the right bits. The interpreter does not have lanes.
"""

from __future__ import annotations

import ast
import re

_LAYOUT = re.compile(r"^(#\w+) = (#ttg\..*)$", re.MULTILINE)
_REDUCTION = re.compile(r'"tt\.reduce"\([^)]*\) <\{axis = (\d+) : i32.*?\}\) : \((tensor<.*?)\) ->', re.DOTALL)
_OPERAND = re.compile(r"tensor<[\dx]*x(?:!tt\.ptr<\w+>|\w+), (#(?:\w+|ttg\.slice<\{.*?\}>+))>")


def wrong(ttgir: str) -> list[str]:
    """Operand types of what this process's Triton compiles wrongly."""
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return over_gaps(ttgir) if version < (3, 9) else []


def over_gaps(ttgir: str) -> list[str]:
    """Operand types of reductions whose elements lie in lanes with copies between."""
    layouts = dict(_LAYOUT.findall(ttgir))
    found = []
    for axis, operands in _REDUCTION.findall(ttgir):
        for layout in _OPERAND.findall(operands):
            bits = [bit for bit, step in enumerate(_lane_steps(layout, int(axis), layouts)) if step]
            if bits and bits[-1] - bits[0] >= len(bits):
                found.append(operands)
    return found


def _lane_steps(layout: str, axis: int, layouts: dict[str, str]) -> list[int]:
    """What each bit of a lane adds to the index along `axis`; nothing for the other layouts, whose lanes have no gaps."""
    layout = layouts.get(layout, layout)
    if part := re.fullmatch(r"#ttg\.slice<\{dim = (\d+), parent = (.*)\}>", layout):
        return _lane_steps(part[2], axis + (axis >= int(part[1])), layouts)
    if part := re.match(r"#ttg\.linear<\{.*?lane = (\[.*?\]), warp", layout):
        return [steps[axis] for steps in ast.literal_eval(part[1])]
    return []
