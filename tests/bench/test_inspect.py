"""`python -m bench.inspect`: what it says of each kind of directory, its JSON, its refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dspark_kernels as dk
from bench.inspect import __main__ as job
from tests import directories as made

pytest.importorskip("safetensors.torch")
ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT.parent / "shared" / "golden" / "qwen3_tiny"


def shown(directory, capsys):
    """(text, JSON) of a directory."""
    assert job.main([str(directory)]) == 0
    text = capsys.readouterr().out
    assert job.main([str(directory), "--json"]) == 0
    return text, json.loads(capsys.readouterr().out)


def ops(found):
    return {op["op"]: op["options"] for op in reversed(found["ops"])}  # of several calls of an op, the first


def parts(found):
    return {part["part"]: part for part in found["parts"]}


def test_a_dspark_drafter(tmp_path, capsys):
    config, shapes = made.dspark("qwen3", "gated", sts_temperatures=[1.0, 1.1, 1.2, 1.3])
    tensors = made.tensors(shapes, torch.bfloat16)
    text, found = shown(made.write(tmp_path / "d", config, tensors, shards=2), capsys)
    assert (found["architecture"], found["block_size"], found["head"], found["rank"]) == ("Qwen3DSparkModel", 4, "gated", 5)
    assert (found["layers"], found["hidden_size"], found["vocabulary"], found["mask_token_id"]) == (2, 24, 41, 40)
    assert found["confidence"] == {"reads_markov": True, "calibrated": True}
    assert found["expects"] == {
        "layers": 3, "layers_read": [-1, 1], "hidden_size": 24, "vocabulary": 41, "shares_embedding": False, "shares_head": False,
        "known": None,
    }  # fmt: skip
    assert ops(found)["draft_block"] == "head=GatedMarkovHead(rank 5), hidden, confidence=ConfidenceHead([24 + 5])"
    assert ops(found)["draft_layout"] == "block_size=4, mask_token_id=40, anchor_first=True"
    assert "schedule_prefixes" in ops(found) and ops(found)["tree_attention"] == 'mask="full"'
    sizes = parts(found)
    assert sizes["sequential head, W2"] == {
        "part": "sequential head, W2", "tensors": 1, "parameters": 205, "bytes": 410, "dtypes": ["BF16"],
    }  # fmt: skip
    assert sizes["sequential head, gate"]["parameters"] == 5 * 29 + 5 and sizes["confidence head"]["parameters"] == 30
    assert sizes["in all"]["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert sizes["in all"]["bytes"] == 2 * sizes["in all"]["parameters"] and "other" not in sizes
    assert sum(part["parameters"] for name, part in sizes.items() if name != "in all") == sizes["in all"]["parameters"]
    for line in ("DSpark drafter with Qwen3 layers", "gated, rank 5", "reads layers -1, 1", "with STS temperatures", "--drafter"):
        assert line in text


@pytest.mark.parametrize("kind, confidence", [("vanilla", None), ("vanilla", "hidden"), ("rnn", None), (None, None)])
def test_options_follow_the_heads(tmp_path, capsys, kind, confidence):
    config, shapes = made.dspark("qwen3", kind, confidence)
    text, found = shown(made.write(tmp_path / "d", config, made.tensors(shapes)), capsys)
    want = {
        ("vanilla", None): "head=MarkovHead(rank 5)",
        ("vanilla", "hidden"): "head=MarkovHead(rank 5), hidden, confidence=ConfidenceHead([24])",
        ("rnn", None): "head=RnnMarkovHead(rank 5), hidden",
        (None, None): "head=None",
    }[kind, confidence]
    assert ops(found)["draft_block"] == want
    assert ("schedule_prefixes" in ops(found)) == (confidence is not None)
    assert ("positions are independent" in text) == (kind is None)


def test_a_gemma4_drafter(tmp_path, capsys):
    config, shapes = made.dspark("gemma4", num_target_layers=48, target_layer_ids=[5, 17])
    text, found = shown(made.write(tmp_path / "d", config, made.tensors(shapes)), capsys)
    assert (found["head_size"], found["key_value_heads"], found["logit_cap"]) == (16, 1, 30.0)
    assert ops(found)["tree_attention"] == 'mask="full", scale=1.0'
    assert found["expects"]["known"] == "google/gemma-4-12B-it" and "capped at 30" in text and "google/gemma-4-12B-it" in text


def test_heads_that_no_op_takes_are_said(tmp_path, capsys):
    """Gemma 4's full attention has heads of 512."""
    config, shapes = made.dspark("gemma4", global_head_dim=512)
    for name, shape in shapes.items():
        if "self_attn" in name:
            shapes[name] = [512 * size // 16 if size in (16, 64) else size for size in shape]
    text, found = shown(made.write(tmp_path / "d", config, made.tensors(shapes)), capsys)
    assert "tree_attention" not in ops(found) and "heads of 512 exceed tree_attention's 256" in text


def test_a_dflash_drafter(tmp_path, capsys):
    config, shapes = made.dflash()
    text, found = shown(made.write(tmp_path / "d", config, made.tensors(shapes)), capsys)
    assert (found["block_size"], found["anchor_first"], found["head"]) == (4, False, None)
    assert ops(found)["draft_layout"] == "block_size=4, mask_token_id=40, anchor_first=False"
    assert found["expects"]["shares_embedding"] and "its embedding and head are the drafter's too" in text
    assert "4 masks after the anchor predict" in text and "the block's 5 rows: the anchor and 4 masks" in text
    assert "embedding" not in parts(found)


@pytest.mark.parametrize("safe", [True, False])
def test_an_eagle3_drafter(tmp_path, capsys, safe):
    config, shapes = made.eagle3()
    directory = made.write(tmp_path / "d", config, made.tensors(shapes))
    if not safe:  # as its authors publish it
        (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    text, found = shown(directory, capsys)
    assert found["runs"] == ("python -m bench.decode --target TARGET --drafter " + str(directory) if safe else None)
    assert safe or ("pickles are not opened" in found["reason"] and "not run by bench.decode" in text)
    assert (found["vocabulary"], found["draft_vocabulary"]) == (41, 11) and "of which 11 can be drafted" in text
    if safe:
        assert ops(found)["draft_block"] == "K' = 1, first_draft=k, head=None, draft_to_target=arange + d2t"
        assert found["expects"]["num_layers_read"] == 3 and "reads 3 layers; its embedding is the drafter's too" in text
        assert parts(found)["vocabulary map"]["bytes"] == 11 * 8 + 41 and parts(found)["output head"]["parameters"] == 11 * 24
    else:
        assert found["parts"] == [] and "no safetensors" in text


def test_a_target(tmp_path, capsys):
    config, shapes = made.target()
    directory = made.write(tmp_path / "d", config, made.tensors(shapes))
    (directory / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    (directory / "tokenizer_config.json").write_text('{"chat_template": "..."}')
    text, found = shown(directory, capsys)
    assert found["stop_tokens"] == [7, 9] and found["chat_template"] and found["runs"].endswith("--target " + str(directory))
    assert "stop tokens   7, 9" in text and "with a chat template" in text and parts(found)["layers"]["tensors"] == 33


def test_a_target_of_another_class(tmp_path, capsys):
    """Language models that this repository has no code for are run by transformers; sizes come from text_config."""
    inner = dict(hidden_size=24, num_hidden_layers=3, vocab_size=41, head_dim=8)
    inner |= dict(sliding_window=8, layer_types=["sliding_attention"])
    config = {"architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4", "text_config": inner}
    shapes = {"model.language_model.embed_tokens.weight": [41, 24], "model.language_model.layers.0.mlp.up_proj.weight": [36, 24]}
    text, found = shown(made.write(tmp_path / "d", config, made.tensors(shapes)), capsys)
    assert found["runs"].endswith("--transformers") and "window=8" in ops(found)["tree_attention"]
    assert (found["layers"], found["hidden_size"], found["vocabulary"]) == (3, 24, 41)
    assert parts(found)["embedding"]["parameters"] == 41 * 24


def test_ops_are_those_of_the_package(tmp_path, capsys):
    config, shapes = made.dspark()
    _, found = shown(made.write(tmp_path / "d", config, made.tensors(shapes)), capsys)
    for op in found["ops"]:
        assert callable(getattr(dk, op["op"]))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model_type": "bert", "architectures": ["BertModel"]}, "expected a checkpoint of a known architecture"),
        ({"model_type": "qwen3"}, "got none (model_type 'qwen3')"),
        ({"architectures": ["DSparkDraftModel"]}, "of other training code"),
        ({"architectures": "Qwen3DSparkModel"}, "expected a checkpoint of a known architecture"),
    ],
)
def test_unknown_directories_are_refused(tmp_path, capsys, config, message):
    directory = made.write(tmp_path / "d", config, {"x": torch.zeros(1)})
    assert job.main([str(directory)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("bench.inspect: ") and message in captured.err
    assert "deepseek-ai/dspark_qwen3_4b_block7" in captured.err and captured.err.count("\n") == 1


def test_broken_and_missing_directories(tmp_path, capsys):
    config, shapes = made.dspark()
    tensors = made.tensors(shapes)
    del tensors["fc.weight"]
    for directory, message in (
        (made.write(tmp_path / "d", config, tensors), "expected the tensor fc.weight"),
        (tmp_path / "dspark_qwen3_4b_block7", "hf download deepseek-ai/dspark_qwen3_4b_block7"),
        (tmp_path, "config.json: no such file"),
    ):
        assert job.main([str(directory)]) == 2
        assert message in capsys.readouterr().err


def test_from_the_command_line(tmp_path):
    config, shapes = made.dspark()
    directory = made.write(tmp_path / "d", config, made.tensors(shapes))
    done = subprocess.run([sys.executable, "-m", "bench.inspect", str(directory)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(f"{directory}: DSpark drafter")


@pytest.mark.parametrize("arguments", [[], ["a", "--nonsense"]])
def test_usage(capsys, arguments):
    assert job.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("bench.inspect: ") and captured.err.count("\n") == 1


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden data is not beside this checkout")
def test_the_golden_directories(capsys):
    _, found = shown(GOLDEN / "draft", capsys)
    assert (found["block_size"], found["head"], found["rank"], found["vocabulary"]) == (7, "vanilla", 16, 130)
    assert parts(found)["in all"]["tensors"] == 31 and found["expects"]["layers_read"] == [0, 1, 2]
    _, found = shown(GOLDEN / "target", capsys)
    assert found["title"] == "Qwen3 language model" and "output head" not in parts(found)


# --- other publishers -------------------------------------------------------------------------------------------------


def test_a_drafter_of_speculators(tmp_path, capsys):
    config, shapes = made.speculators(draft_vocab=17, layers=made.SLIDING)
    tensors = made.tensors(shapes, torch.bfloat16)
    text, found = shown(made.write(tmp_path / "d", config, tensors), capsys)
    assert (found["block_size"], found["draft_vocabulary"], found["windows"], found["causal"]) == (8, 17, [6, 6], [True, True])
    assert ops(found)["draft_block"].startswith("head=MarkovHead(rank 5), draft_to_target, hidden")
    assert ops(found)["draft_tree"] == 'head=MarkovHead(rank 5), draft_to_target, method="top_k", branching'
    assert "window of 6 before the anchor, block causal" in ops(found)["(the engine's attention)"]
    assert found["expects"]["shares_embedding"] and not found["expects"]["shares_head"] and found["expects"]["layers"] is None
    # One pass over two layers, the head of 17 ids and fc, and W2 for each of eight drafts, in bf16.
    layer = sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("layers."))
    assert found["round"] == {
        "passes": 1, "bytes": 2 * (layer + 17 * 24 + 24 * 48 + 24 + 8 * 17 * 5), "context_bytes_per_token": 2 * 2 * 2 * 8 * 2,
    }  # fmt: skip
    for line in (
        "of which 17 can be drafted",
        "6, 6 by layer, causal inside the block",
        "vLLM: parts accept and draft",
        "1 pass, ",
    ):
        assert line in text


def test_one_of_nvidias_exporter(tmp_path, capsys):
    config, shapes = made.modelopt("rnn")
    text, found = shown(made.write(tmp_path / "d", config, made.tensors(shapes)), capsys)
    assert "NVIDIA Model-Optimizer" in found["title"] and (found["head"], found["draft_vocabulary"]) == ("rnn", None)
    assert "its embedding and head are the drafter's too" in text and parts(found)["sequential head, W2"]["parameters"] == 205
    assert "other" not in parts(found) and "vLLM: part accept, where vLLM itself runs the drafter" in text
    layer = sum(part["bytes"] for name, part in parts(found).items() if name in ("layers", "context projection"))
    assert found["round"]["bytes"] == layer + 4 * (41 * 24 + 8 * 205)  # the target's head, in fp32 as the layers


def test_an_eagle3_drafter_of_speculators(tmp_path, capsys):
    config, shapes = made.eagle3_of_speculators(norm_before_residual=True, norm_output=True)
    text, found = shown(made.write(tmp_path / "d", config, made.tensors(shapes)), capsys)
    assert found["norms"] == ["norm_before_residual", "norm_output"] and found["expects"]["layers_read"] == [0, 1, 2]
    size = parts(found)
    want = 4 * (size["layers"]["bytes"] + size["output head"]["bytes"]) + size["context projection"]["bytes"]
    assert found["round"] == {"passes": 4, "bytes": want, "context_bytes_per_token": 2 * 2 * 8 * 4}
    assert "4 passes, " in text and "norm_before_residual, norm_output" in text and "run it: python -m bench.decode" in text


def test_what_eagle3_refuses_is_said(tmp_path, capsys):
    config, shapes = made.eagle3(attention_bias=True)
    text, found = shown(made.write(tmp_path / "d", config, made.tensors(shapes)), capsys)
    assert found["runs"] is None and "no attention_bias, got True" in found["reason"] and "not run by bench.decode" in text
