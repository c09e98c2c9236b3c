"""examples/round.py runs, and the README shows exactly its round."""

import importlib.util
import re
from pathlib import Path

import dspark_kernels as dk

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "examples" / "round.py"


def _example():
    spec = importlib.util.spec_from_file_location("round_example", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_round_emits_and_repeats(monkeypatch):
    example = _example()
    launches = []
    for name in ("draft_block", "schedule_prefixes", "accept_chain"):
        op = getattr(dk, name)
        monkeypatch.setattr(dk, name, lambda *a, op=op, name=name, **k: (launches.append(name), op(*a, **k))[1])
    emitted = example.main(3)
    assert launches == ["draft_block", "schedule_prefixes", "accept_chain"] * 3
    assert all(len(tokens) >= 3 and all(0 <= t < 500 for t in tokens) for tokens in emitted)
    assert sum(map(len, emitted)) > 9, "no draft was ever accepted"
    assert example.main(3) == emitted


def test_readme_shows_the_round():
    shown = SOURCE.read_text().split("# README: begin\n")[1].split("# README: end")[0].strip()
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert any(shown in block for block in blocks), "README.md does not show the round of examples/round.py"
