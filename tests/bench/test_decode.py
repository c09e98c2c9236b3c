"""The main job, `python -m bench.decode`: its table, its files, checkpoints from disk, its refusals."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import assets
from bench.decode import __main__ as job, settings, systems
from bench.shared import summary
from bench.shared.comb import comb
from bench.shared.parity import CheckedOps
from dspark_kernels.types import CostTable
from reference import attention, loop
from reference.drafters import DSpark
from reference.model import Target

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT.parent / "shared" / "golden" / "qwen3_tiny"
KEYS = ("output_ids", "acceptance_lengths", "proposal_lengths")
SYSTEMS = ("autoregressive", "draft-model", "mtp", "block", "dspark")
TREES = ("mtp-tree", "block-tree", "dspark-tree")
SMALL = ["--num-prompts", "5", "--max-new-tokens", "32", "--batch-size", "3"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A whole run of the command, in its own process, with five prompts."""
    path = tmp_path_factory.mktemp("decode") / "out.json"
    command = [sys.executable, "-m", "bench.decode", *SMALL, "--systems", ",".join(SYSTEMS), "--show", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return SimpleNamespace(text=done.stdout, json=json.loads(path.read_text()), errors=done.stderr)


# --- the run ----------------------------------------------------------------------------------------------------------


def test_a_row_for_every_system_at_both_temperatures(ran):
    for temperature in ("1", "0"):
        table = ran.text.split(f"\nT = {temperature} ")[1].split("\n\n")[0]
        names = [line.split("  ")[0] for line in table.splitlines()[2:]]
        assert names == [*SYSTEMS, "dspark, threshold 0.3", "dspark, scheduled"]
        for name, _ in summary.COLUMNS:
            assert name in table.splitlines()[0]
    assert len(re.findall(r"^  ok ", ran.text, re.M)) == 12 and "NOT" not in ran.text
    assert ran.errors == "", "a progress bar where nobody watches"


def test_counts_hang_together(ran):
    prompts = [assets.tokenizer().encode(text) for text in assets.prompts()[:5]]
    runs = {(r["system"], r["confidence_threshold"], r["policy"], r["temperature"]): r for r in ran.json["runs"]}
    assert len(runs) == 14
    for (system, threshold, policy, _), run in runs.items():
        drafts = {"autoregressive": 0, "draft-model": 4, "mtp": 4, "block": 7, "dspark": 7}[system]
        passes = {"autoregressive": 0, "draft-model": 4, "mtp": 4, "block": 1, "dspark": 1}[system]
        rounds = sum(len(p["acceptance_lengths"]) for p in run["prompts"])
        tokens = sum(sum(p["acceptance_lengths"]) for p in run["prompts"])
        for prompt, result in zip(prompts, run["prompts"], strict=True):
            assert result["output_ids"][: len(prompt)] == prompt and len(result["output_ids"]) == len(prompt) + 32
            assert all(1 <= a <= p + 1 for a, p in zip(result["acceptance_lengths"], result["proposal_lengths"], strict=True))
            # The prompt's pass gives the first token; rounds go on until the anchor is the last token asked for, or beyond.
            assert 32 <= sum(result["acceptance_lengths"]) < 32 + drafts + 1
            if threshold == 0 and policy is None:
                assert set(result["proposal_lengths"]) == {drafts}
        assert math.isclose(run["tokens_per_round"], tokens / rounds)
        # The same under the names of engines, from the rounds themselves.
        accepted = [length - 1 for result in run["prompts"] for length in result["acceptance_lengths"]]
        verified = sum(length for result in run["prompts"] for length in result["proposal_lengths"])
        assert math.isclose(run["mean_acceptance_length"], 1 + sum(accepted) / len(accepted))
        assert run["draft_acceptance_rate"] == (pytest.approx(sum(accepted) / verified) if verified else None)
        assert run["acceptance_histogram"] == [accepted.count(n) for n in range(max(accepted) + 1)]
        assert math.isclose(run["target_passes_per_token"], rounds / tokens)
        assert run["draft_passes_per_round"] == passes
        if threshold > 0:
            assert run["verified_per_round"] < 7


def test_the_documents_have_the_figures_of_the_shipped_weights(tmp_path, capsys):
    """One system again, at both temperatures. Counts do not depend on the machine, but for ties of rounding."""
    path = tmp_path / "out.json"
    arguments = ["--systems", "dspark", "--confidence-threshold", "0", "--json", str(path)]
    assert job.main(arguments) == 0
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    shown = page.split("`python -m bench.decode`: ")[1].split("```")[1]
    found = 0
    for run in json.loads(path.read_text())["runs"]:
        table = shown.split(f"T = {run['temperature']:g} ")[1].split("\n\n")[0]
        rows = {line.split("  ")[0]: line.split("  ", 1)[1].split() for line in table.splitlines()[2:]}
        if run["system"] == "dspark" and run["policy"] is None:
            assert run["tokens_per_round"] == pytest.approx(float(rows[run["system"]][0]), abs=0.02), run["system"]
            found += 1
    assert found == 2


def test_trees_stand_below_the_chain_of_the_same_budget(tmp_path, capsys):
    path = tmp_path / "out.json"
    arguments = ["--num-prompts", "2", "--max-new-tokens", "10", "--systems", ",".join(["autoregressive", *TREES])]
    assert job.main([*arguments, "--tree-nodes", "6", "--json", str(path)]) == 0
    text, runs = capsys.readouterr().out, json.loads(path.read_text())["runs"]
    for temperature in ("1", "0"):
        table = text.split(f"\nT = {temperature} ")[1].split("\n\n")[0]
        names = [line.split("  ")[0] for line in table.splitlines()[2:]]
        want = ["autoregressive"]
        for tree in TREES:
            name = tree.removesuffix("-tree")
            want += [f"{name}, 5 drafts", f"{tree}, 6 nodes"] + ([f"{tree}, 6 nodes, sampled"] if temperature == "1" else [])
        assert names == want
    assert len(re.findall(r"^  ok ", text, re.M)) == 9 + 6 and "NOT" not in text
    for run in runs[1:]:
        verified = {length for result in run["prompts"] for length in result["proposal_lengths"]}
        if run["tree"] is None:
            assert verified == {run["max_drafts"]} or run["system"] == "autoregressive"
        else:
            shape = run["tree"]
            methods = {"mtp-tree": "top_k", "block-tree": "best_first", "dspark-tree": "conditioned"}
            assert shape["method"] == (methods[run["system"]] if shape["rule"] == "walk" else "without_replacement")
            assert verified == {5 if shape["branching"] is None else 4}  # a comb of two teeth has an even number
        passes = {"autoregressive": 0, "mtp": 5, "mtp-tree": 2}
        assert run["draft_passes_per_round"] == passes.get(run["system"], 1)


def test_without_being_asked_trees_are_rows_of_the_embedded_models():
    drafter = SimpleNamespace(max_drafts=7, has_confidence=False)
    models = SimpleNamespace(drafters=[(name, "", lambda: drafter) for name in SYSTEMS[1:]], cost=None)
    arguments = job.parser().parse_args([])
    settings.check(arguments)
    labels = [system.label for system in systems.systems_of(arguments, models)]
    assert [label for label in labels if "tree" in label] == [
        "mtp-tree, 16 nodes", "mtp-tree, 16 nodes, sampled", "block-tree, 16 nodes",
        "dspark-tree, 16 nodes", "dspark-tree, 16 nodes, sampled", "dspark-tree, 32 nodes",
    ]  # fmt: skip
    arguments.model = "a directory"
    assert not any("tree" in system.label for system in systems.systems_of(arguments, models))


@pytest.mark.parametrize(
    "nodes, depth, branching",
    [(2, 7, (1,)), (3, 7, (1, 1)), (6, 7, (2, 1)), (9, 7, (2, 1, 1, 1)), (16, 7, (3, 1, 1, 1, 1)), (32, 7, (4, *[1] * 6)),
     (64, 7, (9, *[1] * 6)), (64, 64, (6, *[1] * 9)), (16, 1, (15,))],
)  # fmt: skip
def test_combs_by_hand(nodes, depth, branching):
    assert comb(nodes, depth) == branching
    assert 1 + branching[0] * len(branching) <= nodes


def test_show_marks_the_targets_own_tokens(ran):
    shown = ran.text.split("in brackets\n")[1]
    assert shown.count("-" * 80) == 5 and shown.startswith("-" * 80 + "\n" + assets.prompts()[0] + "|[")
    own = [r for r in ran.json["runs"] if r["system"] == "dspark"][-1]["prompts"][0]
    first = shown.split("-" * 80)[1]
    # One bracket per round, and one for the token after the prompt; the last round may be cut.
    assert 0 <= len(own["acceptance_lengths"]) + 1 - first.count("[") + sum(t.count("[") for t in _pieces(own)) <= 1


def _pieces(result):
    tokenizer = assets.tokenizer()
    prompt = tokenizer.encode(assets.prompts()[0])
    return [tokenizer.decode([t]) for t in result["output_ids"][len(prompt) :]] + [assets.prompts()[0]]


def test_a_run_repeats_and_a_seed_changes_it(tmp_path, capsys):
    outputs = []
    for seed in ("0", "0", "1"):
        path = tmp_path / "out.json"
        arguments = ["--num-prompts", "2", "--max-new-tokens", "12", "--systems", "dspark", "--temperature", "1"]
        assert job.main([*arguments, "--seed", seed, "--json", str(path)]) == 0
        outputs.append([p["output_ids"] for p in json.loads(path.read_text())["runs"][0]["prompts"]])
    assert outputs[0] == outputs[1] != outputs[2]


@pytest.mark.parametrize("rule", ["block", "coupled"])
def test_other_rules(rule, capsys):
    assert job.main(["--num-prompts", "3", "--max-new-tokens", "24", "--systems", "autoregressive,dspark", "--rule", rule]) == 0
    assert f"rule {rule}" in capsys.readouterr().out


@pytest.mark.slow
def test_kernels_equal_the_reference_while_decoding():
    pytest.importorskip("triton")
    arguments = ["--kernels", "--num-prompts", "1", "--max-new-tokens", "6", "--systems", "autoregressive,dspark"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # the command sees to it itself
    done = subprocess.run(
        [sys.executable, "-m", "bench.decode", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all tokens and lengths identical") == 6
    assert len(re.findall(r"^dspark.*, kernels ", done.stdout, re.M)) == 6


@pytest.mark.parametrize("policy", ["causal", "budget"])
def test_the_scheduled_row_follows_its_costs(policy, tmp_path, capsys):
    """Nothing is verified where every row costs as much again, everything where rows cost nothing; lossless anyhow."""
    file, out = tmp_path / "cost.json", tmp_path / "out.json"
    arguments = ["--num-prompts", "2", "--max-new-tokens", "16", "--systems", "autoregressive,dspark", "--temperature", "0"]
    arguments += ["--confidence-threshold", "0", "--policy", policy, "--cost", str(file), "--json", str(out)]
    texts = []
    for seconds, verified in ((torch.arange(100.0), {0}), (torch.ones(100), {7})):
        CostTable(seconds * 1e-3).save(file)
        assert job.main(arguments) == 0, capsys.readouterr().out
        run = json.loads(out.read_text())["runs"][-1]
        assert run["policy"] == policy
        lengths = [p["proposal_lengths"] for p in run["prompts"]]
        # A new request counts as sure: with a budget, its first round is cut by what the table says alone.
        assert {length for p in lengths for length in p[1:]} == verified
        texts.append([p["output_ids"] for p in run["prompts"]])
    assert texts[0] == texts[1]


def test_a_wrong_kernel_is_seen(monkeypatch, capsys):
    ops = SimpleNamespace(**vars(loop.REFERENCE_OPS))
    calls = []

    def accept_chain(*arguments, **options):
        acceptance = loop.REFERENCE_OPS.accept_chain(*arguments, **options)
        calls.append(1)
        if len(calls) % 5 == 0:
            row = acceptance.num_accepted[0]
            acceptance.tokens[0, row] = (acceptance.tokens[0, row] + 1) % 1024
            options["anchors"][options["state_indices"][0]] = acceptance.tokens[0, row]
        return acceptance

    ops.accept_chain = accept_chain
    monkeypatch.setattr(systems, "kernel_ops", lambda device: ops)
    arguments = ["--kernels", "--num-prompts", "2", "--max-new-tokens", "24", "--systems", "autoregressive,dspark"]
    assert job.main([*arguments, "--confidence-threshold", "0"]) == 1
    text = capsys.readouterr().out
    assert "requests differ, and a call does" in text
    assert re.search(r"NOT +dspark, kernels, T = 0 +2? ?", text)


@pytest.mark.parametrize("wrong", [False, True])
def test_trees_of_kernels_stand_beside_the_references(monkeypatch, capsys, wrong):
    ops = SimpleNamespace(**vars(loop.REFERENCE_OPS))

    def accept_tree(*arguments, **options):
        acceptance = loop.REFERENCE_OPS.accept_tree(*arguments, **options)
        if wrong:
            row = acceptance.num_accepted[0]
            acceptance.tokens[0, row] = (acceptance.tokens[0, row] + 1) % 1024
            options["anchors"][options["state_indices"][0]] = acceptance.tokens[0, row]
        return acceptance

    ops.accept_tree = accept_tree
    monkeypatch.setattr(systems, "kernel_ops", lambda device: ops)
    arguments = ["--num-prompts", "2", "--max-new-tokens", "8", "--systems", "mtp,mtp-tree", "--temperature", "1"]
    assert job.main(["--kernels", "--tree-nodes", "4", *arguments]) == wrong
    text = capsys.readouterr().out
    rows = ["mtp", "mtp, 3 drafts", "mtp-tree, 4 nodes", "mtp-tree, 4 nodes, sampled"]
    for row in rows:
        found = re.search(rf"^  (ok |NOT)  {row}, kernels, T = 1 against the reference .*$", text, re.M)
        expected = "NOT" if wrong and "tree" in row else "ok "
        assert found and found[1] == expected and (expected == "ok ") == ("all tokens and lengths identical" in found[0])


@pytest.mark.parametrize("fault", ["none", "a scale", "a key", "a padded row"])
def test_wrong_attention_is_seen(fault):
    """Every call of the attention op is held to the error of dense attention."""

    def tree_attention(q, kv, layout, *, plan, **options):
        if fault == "a scale":
            options["scale"] = 1.001 * q.shape[-1] ** -0.5
        if fault == "a key":
            kv = dataclasses.replace(kv, context_lens=(kv.context_lens - 1).clamp(min=0))
        out = attention.tree_attention(q, kv, layout, **options).to(q.dtype)
        if fault == "a padded row":
            out[-1] = math.nan
        return out

    extra = dict(plan_attention=lambda *arguments, **options: None, tree_attention=tree_attention)
    ops = SimpleNamespace(**vars(loop.REFERENCE_OPS), **extra)
    checked = CheckedOps(ops)
    target = Target(*assets.weights("target"))
    drafter = DSpark(*assets.weights("dspark"), target)
    requests = [loop.Request(assets.tokenizer().encode(text), 8, 0.0) for text in assets.prompts()[:2]]
    if fault == "none":
        loop.decode(target, drafter, requests, ops=checked)
        assert checked.calls > 20
    else:
        with pytest.raises(AssertionError, match="tree_attention: error"):
            loop.decode(target, drafter, requests, ops=checked)


def test_roundings_are_told_from_faults(monkeypatch, capsys):
    """Proposals rounded to quarters lead to another text: no fault, where every call agrees on what was stored."""
    ops = SimpleNamespace(**vars(loop.REFERENCE_OPS))

    def draft_block(*arguments, **options):
        block = loop.REFERENCE_OPS.draft_block(*arguments, **options)
        logits = block.proposal.logits
        rounded = (4 * logits).round() / 4
        again = loop.REFERENCE_OPS.draft_block(*arguments, **options, stored_logits=rounded[options["state_indices"].long()])
        logits.copy_(rounded)
        block.tokens.copy_(again.tokens)
        return block

    ops.draft_block = draft_block
    monkeypatch.setattr(systems, "kernel_ops", lambda device: ops)
    arguments = ["--kernels", "--num-prompts", "3", "--max-new-tokens", "48", "--systems", "autoregressive,dspark"]
    assert job.main([*arguments, "--confidence-threshold", "0", "--temperature", "1"]) == 0
    assert "part at roundings; each of" in capsys.readouterr().out


# --- checkpoints from disk --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden data is not beside this checkout")
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_published_research_code_is_reproduced_from_the_command_line(tmp_path, capsys, threshold):
    pytest.importorskip("safetensors")
    cases = [c for c in json.loads((GOLDEN / "greedy_cases.json").read_text()) if c["confidence_threshold"] == threshold]
    assert len({case["max_new_tokens"] for case in cases}) == 1
    prompts, out = tmp_path / "prompts.json", tmp_path / "out.json"
    prompts.write_text(json.dumps([case["prompt"] for case in cases]))
    arguments = ["--model", str(GOLDEN / "target"), "--drafter", str(GOLDEN / "draft"), "--prompts", str(prompts)]
    arguments += ["--temperature", "0", "--confidence-threshold", str(threshold), "--json", str(out)]
    assert job.main([*arguments, "--max-new-tokens", str(cases[0]["max_new_tokens"])]) == 0
    runs = {run["system"]: run for run in json.loads(out.read_text())["runs"]}
    assert set(runs) == {"autoregressive", "dspark"}
    for result, plain, case in zip(runs["dspark"]["prompts"], runs["autoregressive"]["prompts"], cases, strict=True):
        for key in KEYS:
            assert result[key] == case[key], key
        assert (plain["output_ids"] == case["output_ids"]) == case["matches_plain_greedy"]


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """The embedded target and draft model as checkpoint directories."""
    safetensors = pytest.importorskip("safetensors.torch")
    folder = tmp_path_factory.mktemp("models")
    for name in ("target", "draft_model"):
        config, tensors = assets.weights(name)
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        safetensors.save_file(tensors, folder / name / "model.safetensors")
    return folder


def test_a_language_model_from_disk_drafts(directories, tmp_path, capsys):
    prompts = [assets.tokenizer().encode(text) for text in assets.prompts()[:2]]
    file, outputs = tmp_path / "prompts.json", []
    file.write_text(json.dumps(prompts))
    model = ["--model", str(directories / "target"), "--drafter", str(directories / "draft_model"), "--prompts", str(file)]
    for arguments in (model, ["--num-prompts", "2", "--systems", "draft-model"]):
        out = tmp_path / "out.json"
        assert job.main([*arguments, "--max-new-tokens", "16", "--temperature", "0", "--json", str(out)]) == 0
        runs = {run["system"]: run for run in json.loads(out.read_text())["runs"]}
        outputs.append([result["output_ids"] for result in runs["draft-model"]["prompts"]])
    assert outputs[0] == outputs[1]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--num-prompts", "0"], "--num-prompts: expected at least 1, got 0"),
        (["--num-prompts", "33"], "--num-prompts: expected at most 32"),
        (["--max-new-tokens", "-1"], "--max-new-tokens: expected at least 1"),
        (["--batch-size", "0"], "--batch-size: expected at least 1"),
        (["--temperature", "-1"], "--temperature: expected a number of at least 0"),
        (["--temperature", "nan"], "--temperature: expected a number of at least 0"),
        (["--confidence-threshold", "1.5"], "--confidence-threshold: expected a number from 0 to 1"),
        (["--seed", str(1 << 40)], "--seed: expected a 32-bit integer"),
        (["--systems", "eagle"], "--systems: expected names among autoregressive"),
        (["--systems", "block", "--kernels"], "--kernels: expected dspark among the systems"),
        (["--tree-nodes", "1"], "--tree-nodes: expected 2 to 64, got 1"),
        (["--tree-nodes", "65"], "--tree-nodes: expected 2 to 64, got 65"),
        (["--model", "x", "--transformers", "--systems", "dspark-tree"], "--systems: expected no dspark-tree with --transformers"),
        (["--kernels", "--rule", "block"], "--kernels: expected --rule token"),
        (["--drafter", "x"], "--drafter: expected together with --model"),
        (["--model", "/nowhere"], "--model: /nowhere: no such directory"),
        (["--prompts", "/nowhere.json"], "--prompts: /nowhere.json: No such file"),
        (["--json", "/nowhere/out.json"], "--out: expected a file in a folder that exists"),
        (["--cost", "/nowhere.json"], "--cost: /nowhere.json: no such file"),
        (["--cost", str(assets.COST), "--systems", "block"], "--cost: expected a drafter with a confidence head"),
        (["--device", "abacus"], "--device: expected one that torch has here"),
    ],
)
def test_bad_arguments_take_one_line(arguments, message, capsys):
    assert job.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"bench.decode: {message}")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "expected JSON"),
        ("{}", "expected a JSON list"),
        ("[]", "expected a JSON list with at least one prompt"),
        ("[[1, 2], []]", "prompt 1: expected text or a list of ids"),
        ("[[1, 1024]]", "prompt 0: expected text or a list of ids from 0 to 1023"),
        ("[[true]]", "prompt 0: expected text or a list of ids"),
        ('[""]', "prompt 0: expected text or a list of ids"),
        ("[3]", "prompt 0: expected text or a list of ids"),
    ],
)
def test_bad_prompts_take_one_line(tmp_path, content, message, capsys):
    file = tmp_path / "prompts.json"
    file.write_text(content)
    assert job.main(["--prompts", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench.decode: --prompts: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "name, content, want",
    [
        ("prompt.txt", "def f(x):\n    return x\n", ["def f(x):\n    return x\n"]),
        ("prompt", "[a list of words] is text", ["[a list of words] is text"]),
        ("prompts.txt", '["one", "two"]', ["one", "two"]),
        ("prompts.json", "[[1, 2], [3]]", [[1, 2], [3]]),
    ],
)
def test_a_text_file_is_one_prompt(tmp_path, name, content, want):
    (tmp_path / name).write_text(content)
    assert settings.prompts_of(str(tmp_path / name)) == want


def test_a_text_file_is_decoded(tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("def add(a, b):\n    return")
    out = tmp_path / "out.json"
    arguments = ["--prompts", str(tmp_path / "prompt.txt"), "--max-new-tokens", "4", "--systems", "dspark", "--temperature", "0"]
    assert job.main([*arguments, "--json", str(out)]) == 0
    assert capsys.readouterr().out.startswith("1 prompts, up to 4 new tokens")
    ids = assets.tokenizer().encode("def add(a, b):\n    return")
    assert json.loads(out.read_text())["runs"][0]["prompts"][0]["output_ids"][: len(ids)] == ids


@pytest.mark.parametrize("content, message", [(b"", "expected a text, got an empty file"), (b"\xff\xfe", "expected text in UTF-8")])
def test_bad_texts_take_one_line(tmp_path, content, message, capsys):
    file = tmp_path / "prompt.txt"
    file.write_bytes(content)
    assert job.main(["--prompts", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"bench.decode: --prompts: {file}: {message}") and error.count("\n") == 1


def test_bad_checkpoints_take_one_line(directories, tmp_path, capsys):
    target = str(directories / "target")
    prompts = tmp_path / "prompts.json"
    prompts.write_text("[[1, 2]]")
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, message in [
        (["--model", str(empty)], "--model: "),
        (["--model", target, "--drafter", str(empty)], "--drafter: "),
        (["--model", target, "--drafter", str(tmp_path / "none")], "--drafter: "),
        (["--model", target], "--prompts: expected a JSON list of token-id lists, for --model has no tokenizer.json"),
        (["--model", target, "--prompts", str(prompts), "--systems", "dspark"], "--systems: expected names among"),
    ]:
        assert job.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"bench.decode: {message}") and error.count("\n") == 1, error


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as ended:
        job.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for option in (
        "--kernels --model --drafter --prompts --max-new-tokens --temperature --confidence-threshold --systems --rule "
        "--tree-nodes --batch-size --num-prompts --cost --policy --device --dtype --seed --show --json --live --pace --seconds"
    ).split():
        assert option in text
    for name, _ in summary.COLUMNS:
        assert name in text


def test_an_unknown_option_takes_one_line_and_status_two(capsys):
    assert job.main(["--nonsense"]) == 2
    assert capsys.readouterr().err == "bench.decode: unrecognized arguments: --nonsense\n"
