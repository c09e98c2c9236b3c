"""Targets run by their own class of transformers: equal to the reference's reading of them, lossless, with text around.

What needs transformers is skipped where it is not installed; nothing is fetched.
"""

from __future__ import annotations

import builtins
import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
import torch

from bench.decode import __main__ as job, models
from dspark_kernels import checkpoint
from reference import huggingface
from reference.drafters import Autoregressive, Block, DSpark
from reference.loop import Request, decode
from reference.model import Rows, Target
from tests import directories as made

pytest.importorskip("safetensors.torch")
os.environ["HF_HUB_OFFLINE"] = "1"
GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "qwen3_tiny"
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs transformers, which is not installed"
)
PROMPTS = [[3, 1, 4, 1, 5], [2, 7], [18, 28, 18, 2]]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<{{ 'think' if enable_thinking else 'say' }}>{% endif %}"
)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    """A tiny Qwen3 directory with a stop token."""
    config, shapes = made.target()
    directory = made.write(tmp_path_factory.mktemp("models") / "target", config, made.tensors(shapes, seed=1))
    (directory / "generation_config.json").write_text('{"eos_token_id": [33]}')
    return directory


@pytest.fixture(scope="module")
def drafter(tmp_path_factory):
    config, shapes = made.dspark("qwen3", "gated")
    return made.write(tmp_path_factory.mktemp("models") / "drafter", config, made.tensors(shapes, seed=2))


def words(directory, template=TEMPLATE):
    """Put a tokenizer of one word per character into a directory; texts begin with "."."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = "abcdefghijklmnopqrstuvwxyz<>. "
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single=". $A", special_tokens=[(".", 28)])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "."} | ({"chat_template": template} if template else {})
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return letters


@needs_transformers
def test_states_features_and_logits_equal_the_references_reading(qwen3):
    own, theirs = checkpoint.load_target(qwen3), huggingface.load(qwen3)
    own = Target(own.config, own.tensors)
    caches = own.new_cache(3), theirs.new_cache(3)
    # Prompts of two slots, a step of one beside another prompt, and one cut back before it goes on.
    for segments in ([(2, 0, 4), (0, 0, 3)], [(2, 4, 1), (1, 0, 2)], [(0, 2, 3), (2, 3, 2)]):
        rows = Rows.of(segments, "cpu")
        token_ids = torch.arange(len(rows.positions)) * 7 % 41
        outputs = []
        for target, cache in zip((own, theirs), caches, strict=True):
            outputs.append(target.forward(token_ids, rows, cache, (-1, 0, 2)))
        for have, want in zip(outputs[1], outputs[0], strict=True):
            torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(theirs.logits(outputs[1].hidden), own.logits(outputs[0].hidden), rtol=1e-4, atol=1e-5)
    assert torch.equal(theirs.embedding, own.embedding) and (theirs.shape.layers, theirs.shape.vocab) == (3, 41)
    with pytest.raises(ValueError, match="expected 0 to 5"):
        caches[1].crop(2, 6)


@needs_transformers
@pytest.mark.parametrize(
    "build", [made.dspark, lambda: made.dspark("gemma4", "rnn"), made.dflash], ids=["dspark", "gemma4", "dflash"]
)
def test_every_drafter_decodes_losslessly_on_it(tmp_path, qwen3, build):
    target = huggingface.load(qwen3)
    config, shapes = build()
    loaded = checkpoint.load_drafter(made.write(tmp_path / "d", config, made.tensors(shapes, seed=2)))
    drafter = (Block if loaded.head is None else DSpark)(loaded.config, loaded.tensors, target)
    requests = [Request(prompt, 16) for prompt in PROMPTS]
    plain = decode(target, Autoregressive(), requests, batch_size=1)
    assert [g.output_ids for g in decode(target, drafter, requests)] == [g.output_ids for g in plain]
    # And plain decoding is what the class itself generates.
    with torch.no_grad():
        for prompt, generation in zip(PROMPTS, plain, strict=True):
            want = target._model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None)
            assert want[0].tolist() == generation.output_ids


@needs_transformers
@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden data is not beside this checkout")
def test_the_research_codes_results_on_its_own_class_of_target():
    target, loaded = huggingface.load(GOLDEN / "target"), checkpoint.load_drafter(GOLDEN / "draft")
    cases = [case for case in json.loads((GOLDEN / "greedy_cases.json").read_text()) if case["confidence_threshold"] == 0][:3]
    requests = [Request(case["prompt"], case["max_new_tokens"]) for case in cases]
    for result, case in zip(decode(target, DSpark(loaded.config, loaded.tensors, target), requests), cases, strict=True):
        for key in ("output_ids", "acceptance_lengths", "proposal_lengths"):
            assert getattr(result, key) == case[key], key


def tiny_gemma4(directory, **changes):
    """A Gemma 4 text model with sliding and full layers, saved by its own class."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "Gemma4ForCausalLM"):
        pytest.skip("this transformers has no Gemma 4")
    settings = {key: made.GEMMA4[key] for key in made.GEMMA4.keys() - {"target_model_type", "model_type", "rope_parameters"}}
    settings |= dict(num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=6, **changes)
    torch.manual_seed(0)
    model = transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter) if parameter.ndim > 1 else 0.5 + torch.rand_like(parameter))
    model.save_pretrained(directory)
    return directory


@needs_transformers
def test_gemma4_target_and_drafter(tmp_path):
    """Texts three times as long as the window, capped logits, scaled embeddings, a drafter with Gemma's layers."""
    target = huggingface.load(tiny_gemma4(tmp_path / "target"))
    config, shapes = made.dspark("gemma4", "vanilla", num_target_layers=4, target_layer_ids=[-1, 2])
    loaded = checkpoint.load_drafter(made.write(tmp_path / "d", config, made.tensors(shapes, seed=2)))
    requests = [Request(prompt, 20) for prompt in PROMPTS]
    plain = decode(target, Autoregressive(), requests)
    drafted = decode(target, DSpark(loaded.config, loaded.tensors, target), requests)
    assert [g.output_ids for g in drafted] == [g.output_ids for g in plain]
    with torch.no_grad():
        for prompt, generation in zip(PROMPTS, plain, strict=True):
            want = target._model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None)
            assert want[0].tolist() == generation.output_ids
    with pytest.raises(ValueError, match="an embedding of its own, for the target's is a Gemma4TextScaledWordEmbedding"):
        config, shapes = made.dflash(num_target_layers=4)
        Block(checkpoint.formats.DRAFTERS["DFlashDraftModel"].read(config, "config"), made.tensors(shapes), target)


@needs_transformers
def test_a_gemma4_layer_is_transformers_own(tmp_path):
    """Without injected context a drafter's layer is the class's layer without a causal mask."""
    from transformers.models.gemma4 import modeling_gemma4 as theirs

    from reference import gemma4
    from reference.model import Rotation, Weights

    for shares in (True, False):
        target = huggingface.load(tiny_gemma4(tmp_path / str(shares), attention_k_eq_v=shares))
        layer, config = target._layers[1], target._model.config
        values = config.to_dict()
        for other in values.get("per_layer_config", {}).values():  # as 5.24 says what layers of full attention have of their own
            values |= dict(global_head_dim=other["head_dim"], num_global_key_value_heads=other.get("num_key_value_heads"))
        own = gemma4.DecoderLayer(gemma4.shape(values), Weights(dict(layer.state_dict()), "cpu", torch.float32))
        x, positions = torch.randn(5, 24), torch.arange(7, 12)
        angles = theirs.Gemma4TextRotaryEmbedding(config)(x[None], positions[None], layer_type="full_attention")

        def attend(queries, keys, values):
            mixed = torch.nn.functional.scaled_dot_product_attention(
                *(part.transpose(0, 1)[None] for part in (queries, keys, values)), scale=1.0, enable_gqa=True
            )
            return mixed[0].transpose(0, 1).flatten(1)

        with torch.no_grad():
            want = layer(x[None], shared_kv_states={}, position_embeddings=angles, attention_mask=torch.zeros(1, 1, 5, 5))
        have = own(x, Rotation.at(positions, own.shape, torch.float32), attend)
        torch.testing.assert_close(have, want[0], rtol=1e-5, atol=1e-5)


@needs_transformers
def test_text_chat_and_stop_tokens(tmp_path, qwen3):
    directory = tmp_path / "text"
    directory.mkdir()
    assert huggingface.load_text(directory) is None
    letters = words(directory)
    text = huggingface.load_text(directory)
    assert text.encode("abc.") == [28, 0, 1, 2, 28] and text.decode([2, 0, 1]).split() == ["c", "a", "b"] and text.stop_token == 28
    turns = [{"role": "user", "content": "hi"}]
    assert "".join(letters[i] for i in text.chat(turns)) == "<user>hi<say>"
    assert "".join(letters[i] for i in huggingface.load_text(directory, thinking=True).chat(turns)) == "<user>hi<think>"
    words(directory, template=None)
    assert huggingface.load_text(directory).chat is None


@needs_transformers
def test_a_directory_pair_from_the_command_line(qwen3, drafter, tmp_path, capsys):
    """--target and --drafter, the target by its own class and by the reference's: one table, the same text, lossless."""
    letters = words(qwen3)
    prompts, outputs = tmp_path / "prompts.json", []
    prompts.write_text(json.dumps(["go on", [{"role": "user", "content": "hi"}, {"role": "user", "content": "there"}]]))
    shared = ["--target", str(qwen3), "--drafter", str(drafter), "--prompts", str(prompts), "--chat", "--max-new-tokens", "12"]
    for more in ([], ["--transformers"], ["--transformers", "--ignore-stop-tokens"]):
        out = tmp_path / "out.json"
        assert job.main([*shared, "--temperature", "0", "--confidence-threshold", "0", "--json", str(out), *more]) == 0
        text = capsys.readouterr().out
        assert "2 of 2 texts identical to plain decoding" in text
        outputs.append([r["output_ids"] for r in json.loads(out.read_text())["runs"][-1]["prompts"]])
    for start, ids in zip(("<user>go on<say>", "<user>hi<user>there<say>"), outputs[0], strict=True):
        assert "".join(letters[i] for i in ids[: len(start)]) == start
    assert outputs[0] == outputs[1]
    loaded = models.load(job.parser().parse_args([*shared, "--transformers"]))
    assert (loaded.target.dtype, loaded.exact().dtype, loaded.stop_tokens) == (torch.float32, torch.float64, (33,))
    for stopped, whole in zip(outputs[1], outputs[2], strict=True):
        assert stopped == whole[: len(stopped)] and (len(stopped) == len(whole) or stopped[-1] == 33)


@needs_transformers
def test_what_it_refuses(tmp_path, qwen3, drafter, capsys):
    config, shapes = made.target()
    tensors = made.tensors(shapes)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match="expected the tensor model.layers.1.mlp.up_proj.weight of Qwen3ForCausalLM, found none"):
        huggingface.load(made.write(tmp_path / "hole", config, tensors))
    with pytest.raises(ValueError, match="cannot read it"):
        huggingface.load(made.write(tmp_path / "odd", {"model_type": "no-such-model"}, {"x": torch.zeros(1)}))
    with pytest.raises(FileNotFoundError):
        huggingface.load(tmp_path / "nowhere")
    target = huggingface.load(qwen3)
    target._model.config.layer_types[1] = "linear_attention"
    with pytest.raises(ValueError, match="which can forget drafts, got linear_attention"):
        huggingface.HuggingFaceTarget(target._model)
    target._model.config.layer_types[1] = "full_attention"
    target._model.config.final_logit_softcapping = 0.5  # which Qwen3 does not do
    with pytest.raises(ValueError, match="expected logits that are the head of the last state"):
        huggingface.HuggingFaceTarget(target._model)
    mute = made.write(tmp_path / "mute", config, made.tensors(shapes))
    capsys.readouterr()  # transformers' progress bars
    for arguments, message in (
        (["--target", str(drafter), "--transformers"], '--model: .*expected a causal language model, got \\["Qwen3DSparkModel"\\]'),
        (["--target", str(tmp_path / "Qwen3-4B"), "--transformers"], "--model: .*the repository Qwen/Qwen3-4B .* holds it"),
        (["--target", str(mute), "--chat"], "tokenizer with a chat template"),
    ):
        assert job.main(arguments) == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1 and re.match(f"bench.decode: .*{message}", error[0]), error


def test_without_transformers_the_extra_is_named(qwen3, drafter, monkeypatch, capsys):
    real = builtins.__import__

    def refuse(name, *arguments, **options):
        if name.split(".")[0] == "transformers":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    for call in (lambda: huggingface.load(qwen3), lambda: huggingface.load_text(qwen3)):
        with pytest.raises(ImportError, match=r"pip install dspark_kernels\[transformers\]"):
            call()
    for option in ("--transformers", "--chat"):
        assert job.main(["--target", str(qwen3), "--drafter", str(drafter), option]) == 2
        error = capsys.readouterr().err
        assert error.startswith("bench.decode: --model: ") and "pip install dspark_kernels[transformers]" in error


def test_stop_tokens_end_a_text_without_transformers_too(qwen3, drafter, tmp_path, capsys):
    """33 is what generation_config.json names; the reference's reading of the target has it from there."""
    prompts, out = tmp_path / "prompts.json", tmp_path / "out.json"
    prompts.write_text(json.dumps([[i, i + 1] for i in range(8)]))
    texts = []
    for more in ([], ["--ignore-stop-tokens"]):
        arguments = ["--target", str(qwen3), "--drafter", str(drafter), "--prompts", str(prompts), "--max-new-tokens", "24"]
        assert job.main([*arguments, "--temperature", "0", "--confidence-threshold", "0", "--json", str(out), *more]) == 0
        texts.append([r["output_ids"] for r in json.loads(out.read_text())["runs"][-1]["prompts"]])
    stopped = 0
    for have, whole in zip(*texts, strict=True):
        at = next((i + 1 for i, token in enumerate(whole) if token == 33 and i >= 2), len(whole))
        assert have == whole[:at]
        stopped += at < len(whole)
    assert 0 < stopped


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--transformers"], "--transformers: expected together with --model"),
        (["--chat"], "--chat: expected together with --model"),
        (["--thinking"], "--thinking: expected together with --chat"),
    ],
)
def test_options_that_need_others(arguments, message, capsys):
    assert job.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"bench.decode: {message}")
