"""bench.decode with drafter directories of every publisher, beside a tiny target: greedy texts are the target's own."""

from __future__ import annotations

import json

import pytest

from bench.decode import __main__ as job
from tests import directories as made

pytest.importorskip("safetensors.torch")
DRAFTERS = {
    "speculators, dspark": (lambda: made.speculators(draft_vocab=17, layers=made.SLIDING), "dspark"),
    "speculators, dflash": (lambda: made.speculators(kind="dflash"), "block"),
    "speculators, eagle3": (lambda: made.eagle3_of_speculators(), "eagle3"),
    "SafeAILab, eagle3": (made.eagle3, "eagle3"),
    "Model-Optimizer": (made.modelopt, "dspark"),
    "a draft model": (made.target, "draft-model"),
}


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_chain_and_a_tree(tmp_path, capsys, name):
    build, system = DRAFTERS[name]
    for what, (config, shapes) in (("target", made.target()), ("drafter", build())):
        made.write(tmp_path / what, config, made.tensors(shapes, seed=len(what)))
    (tmp_path / "prompts.json").write_text(json.dumps([[3, 1, 4, 1, 5], [2, 7]]))
    arguments = ["--model", str(tmp_path / "target"), "--drafter", str(tmp_path / "drafter"), "--prompts"]
    arguments += [str(tmp_path / "prompts.json"), "--max-new-tokens", "12", "--temperature", "0"]
    systems = ["autoregressive", system] + ([] if system == "draft-model" else [f"{system}-tree"])
    assert job.main([*arguments, "--systems", ",".join(systems)]) == 0
    out = capsys.readouterr().out
    assert system in out and ("-tree" in out) == (system != "draft-model")
