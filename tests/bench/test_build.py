"""bench.assets.build and bench.systems: the corpus and its hold-out, training passes against the models that are served, a build in
small that is resumed, a drafter that learns, and figures that the shipped weights give."""

import contextlib
import dataclasses
import json
import math
import sys
import time
import types

import pytest
import torch

from bench import assets
from bench.assets import build, build_corpus, build_models, build_stages, build_text, build_train
from bench.assets.build_plan import FULL, QUICK
from bench.assets.tokenizer import MASK
from bench.shared import acceptance, systems
from reference import heads
from reference.draft import draft_block
from reference.drafters import MTP, Block, DraftModel, DSpark
from reference.model import Target

SIZES = build_models.Sizes(32, 48, 3, 4, 2, 8, vocab=300)
FEATURES = (-1, 1)
DRAFTS = 4


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- what is trained is what is served --------------------------------------------------------------------------------


def loud(tensors, seed):
    """Weights that do something: norms other than 1, matrices of a size that moves logits."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator) * (0.3 if tensor.dim() == 2 else 0.2) + (1 if "norm" in name else 0)
        for name, tensor in tensors.items()
    }


@pytest.fixture(scope="module")
def small():
    """A target, texts, and what the target says of them."""
    tensors = loud(build_models.new_language_model(SIZES, torch.Generator()), 0)
    config = SIZES.config() | {"tie_word_embeddings": True}
    texts = torch.randint(0, 300, (2, 30), generator=torch.Generator().manual_seed(1))
    teacher = build_train.Teacher(tensors, SIZES, FEATURES)
    target, passed = Target(config, tensors), teacher(texts)
    return types.SimpleNamespace(target=target, tensors=tensors, texts=texts, teacher=teacher, passed=passed)


def distributions(small, drafter, **options):
    """Distributions of the served drafter, [R, cuts, K, V], and the target's."""
    with torch.inference_mode():
        found = list(systems.cuts(small.target, drafter, small.texts, 5, **options))
    return tuple(torch.stack([cut[which] for cut in found], 1).softmax(-1) for which in (0, 1))


def test_the_target_is_trained_as_it_is_served(small):
    drafter = DraftModel(SIZES.config() | {"tie_word_embeddings": True, "max_drafts": DRAFTS}, small.tensors, small.target)
    drafted, targeted = distributions(small, drafter, drafts=DRAFTS, stride=2)
    assert torch.allclose(drafted, targeted, atol=1e-5)  # the same model in its own caches, forced along the text
    hidden = build_models.logits(small.passed.hidden, small.teacher.embedding).softmax(-1)
    want = torch.stack([hidden[:, anchor : anchor + DRAFTS] for anchor in range(5, 30 - DRAFTS, 2)], 1)
    assert torch.allclose(targeted, want, atol=1e-5) and want.max() > 0.3
    logits = build_models.logits(small.passed.hidden[:, :-1], small.teacher.embedding)
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), small.texts[:, 1:].flatten())
    assert torch.allclose(build_train.target_loss(small.tensors, SIZES, small.texts)[0], nats)


def test_mtp_is_trained_as_it_is_served(small):
    sizes = dataclasses.replace(SIZES, layers=1)
    tensors = loud(build_models.new_mtp(small.tensors, SIZES), 2)
    drafted, targeted = distributions(small, MTP({"max_drafts": 1}, tensors, small.target), drafts=1, stride=1)
    hidden = build_models.mtp_hidden(tensors, sizes, small.teacher.embedding, small.texts[:, 1:-1], small.passed.pre_norm[:, :-2])
    want = build_models.logits(hidden, small.teacher.embedding).softmax(-1)  # of tokens 2, 3, ...
    assert torch.allclose(drafted[:, :, 0], want[:, 4 : 4 + drafted.shape[1]], atol=1e-5) and want.max() > 0.3
    _, found = build_train.mtp_loss(tensors, sizes, small.teacher, small.texts, small.passed, None)
    overlap = torch.minimum(drafted, targeted).sum(-1)[:, :, 0]
    assert torch.allclose(found.view(2, -1)[:, 4 : 4 + overlap.shape[1]], overlap, atol=1e-5)


def test_the_draft_model_is_trained_as_it_is_served(small):
    sizes = build_models.Sizes(16, 24, 1, 2, 1, 8, vocab=300)
    tensors = loud(build_models.new_language_model(sizes, torch.Generator()), 6)
    drafter = DraftModel(sizes.config() | {"tie_word_embeddings": True, "max_drafts": 1}, tensors, small.target)
    drafted, targeted = distributions(small, drafter, drafts=1, stride=1)
    _, found = build_train.draft_model_loss(tensors, sizes, small.teacher, small.texts, small.passed, None)
    overlap = torch.minimum(drafted, targeted).sum(-1)[:, :, 0]
    assert torch.allclose(found.view(2, -1)[:, 5 : 5 + overlap.shape[1]], overlap, atol=1e-5)


@pytest.mark.parametrize("kind", [None, *build_models.HEADS])
def test_block_drafters_are_trained_as_they_are_served(small, kind):
    sizes = dataclasses.replace(SIZES, layers=2)
    tensors = loud(build_models.new_block(small.tensors, SIZES, 2, len(FEATURES)), 3)
    config = sizes.config() | {"block_size": DRAFTS, "mask_token_id": MASK, "target_layer_ids": list(FEATURES)}
    if kind is not None:
        vanilla = build_models.new_vanilla(SIZES, 6, torch.Generator())
        tensors |= loud(vanilla | build_models.new_head(kind, vanilla, SIZES, torch.Generator()), 4)
        config |= {"markov_rank": 6, "markov_head_type": kind, "enable_confidence_head": True, "confidence_head_with_markov": True}
    drafter = (Block if kind is None else DSpark)(config, tensors, small.target)
    said = []
    if kind is not None:
        plain = systems.PlainOps.draft_block

        def listening(ops, base, anchors, head, *, hidden, state_indices, **more):
            slots = state_indices.long()
            before = torch.cat([anchors[slots][:, None], ops.forced[:, :-1]], 1)
            said.append(
                [
                    [heads.confidence_logit(drafter.confidence, h, heads.embed(head, int(t))) for h, t in zip(*row, strict=True)]
                    for row in zip(hidden, before, strict=True)
                ]
            )
            return plain(ops, base, anchors, head, hidden=hidden, state_indices=state_indices, **more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(systems.PlainOps, "draft_block", listening)
            drafted, targeted = distributions(small, drafter, stride=3)
    else:
        drafted, targeted = distributions(small, drafter, stride=3)
    anchors = torch.arange(5, 30 - DRAFTS, 3).expand(2, -1)
    blocks = build_models.Blocks(anchors, DRAFTS)
    hidden = build_models.block_hidden(tensors, sizes, small.teacher.embedding, small.texts, small.passed.features, blocks)
    shape = (*anchors.shape, DRAFTS)
    logits = build_models.logits(hidden, small.teacher.embedding).view(*shape, -1)
    if kind is not None:
        bias, known = build_models.transition(
            tensors, kind, hidden.view(*shape, -1), small.texts.gather(1, blocks.positions).view(shape)
        )
        logits = logits + bias
        have = build_models.confidence(tensors, hidden.view(*shape, -1), known)
        assert torch.allclose(have, torch.tensor(said).transpose(0, 1).float(), atol=1e-4)
    assert torch.allclose(drafted, logits.softmax(-1), atol=1e-5) and drafted.max() > 0.3
    # The loss: acceptance is the overlap of the two distributions.
    loss, found = build_train.block_loss(
        tensors, sizes, small.teacher, small.texts, small.passed, anchors, drafts=DRAFTS, kind=kind
    )
    overlap = torch.minimum(drafted, targeted).sum(-1)
    assert torch.allclose(found, overlap.flatten(0, 1), atol=1e-5)
    want, whole = 0.0, 0.0
    for sequence, places in enumerate(anchors.tolist()):
        for number, anchor in enumerate(places):
            for k in range(DRAFTS):
                cell = sequence, number, k
                part = -0.1 * drafted[cell][small.texts[sequence, anchor + k + 1]].log() + 0.9 * 2 * (1 - overlap[cell])
                if kind is not None:
                    predicted = have[cell].sigmoid()
                    part -= overlap[cell] * predicted.log() + (1 - overlap[cell]) * (1 - predicted).log()
                want, whole = want + math.exp(-k / 4) * part, whole + math.exp(-k / 4)
    assert loss.item() == pytest.approx(float(want / whole), rel=1e-3)


@pytest.mark.parametrize("kind", build_models.HEADS)
def test_plain_logits_are_the_references(kind):
    vanilla = build_models.new_vanilla(SIZES, 6, torch.Generator())
    tensors = loud(vanilla | build_models.new_head(kind, vanilla, SIZES, torch.Generator()), 5)
    from reference.drafters.dspark import _sequential_head
    from reference.model import Weights

    head = _sequential_head(kind, 6, SIZES.vocab, SIZES.vocab, SIZES.hidden, Weights(tensors, "cpu", torch.float32))
    base, hidden = torch.randn(2, 3, SIZES.vocab), torch.randn(2, 3, SIZES.hidden)
    shared = dict(anchor_positions=torch.tensor([4, 9, 2]), hidden=hidden, state_indices=torch.tensor([2, 0], dtype=torch.int32))
    anchors, ops = torch.tensor([7, 0, 11]), systems.PlainOps()
    want = draft_block(base, anchors, head, keep_logits=True, **shared)
    have = ops.draft_block(base, anchors, head, **shared)
    assert torch.equal(have.tokens, want.tokens)
    assert torch.allclose(torch.stack(ops.logits, 1), want.proposal.logits[[2, 0]], atol=1e-4)


def test_new_heads_start_where_the_vanilla_one_ended():
    vanilla = build_models.new_vanilla(SIZES, 6, torch.Generator().manual_seed(0))
    hidden, previous = torch.randn(1, 2, 3, SIZES.hidden), torch.randint(0, 300, (1, 2, 3))
    want, _ = build_models.transition(vanilla, "vanilla", hidden, previous)
    for kind in ("gated", "rnn"):
        head = build_models.new_head(kind, vanilla, SIZES, torch.Generator().manual_seed(1))
        have, _ = build_models.transition(head, kind, hidden, previous)
        assert (have - want).norm() < 0.1 * want.norm(), kind


def test_written_text_follows_the_targets_distribution(small):
    whole = build_models.logits(small.passed.hidden, small.teacher.embedding)
    writer = build_text._Writer(small.tensors, SIZES, 2, 30)
    with torch.inference_mode():
        have = [writer(small.texts[:, first:last]) for first, last in ((0, 3), (3, 4), (4, 9), (9, 10))]
    assert torch.allclose(torch.stack(have, 1), whole[:, [2, 3, 8, 9]], atol=1e-3)
    text = build_text.continued(small.tensors, SIZES, small.texts[:, :4], 12, torch.Generator().manual_seed(0))
    again = build_text.continued(small.tensors, SIZES, small.texts[:, :4], 12, torch.Generator().manual_seed(0))
    assert text.shape == (2, 12) and torch.equal(text, again) and torch.equal(text[:, :4], small.texts[:, :4])


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_stopped_training_goes_on_as_if_it_had_not_been(tmp_path):
    def run(folder, stop):
        tensors = {"a.weight": torch.ones(6, 4), "norm.weight": torch.ones(4)}

        def loss(step):
            if step == stop:
                trainer.checkpoint()
                raise KeyboardInterrupt
            x = torch.randn(5, 4, generator=build_train.seeded("x", step))
            found = (x * tensors["norm.weight"] @ tensors["a.weight"].mT - x.sum(1, keepdim=True)).square().mean()
            return found, found.detach()

        trainer = build_train.Trainer("trial", tensors, loss, folder)
        with contextlib.suppress(KeyboardInterrupt):
            trainer.run(build_train.Budget(0.0, 9), str)
        return tensors

    def trained(folder, stops):
        folder.mkdir()
        return [run(folder, stop) for stop in stops][-1]

    whole, parted = trained(tmp_path / "whole", [None]), trained(tmp_path / "parted", [2, 7, None])
    assert all(torch.equal(whole[name], parted[name]) for name in whole)
    assert not torch.equal(whole["a.weight"], torch.ones(6, 4))


def test_steps_follow_from_the_budget_and_calibration_leaves_no_trace(tmp_path):
    tensors = {"a.weight": torch.ones(6, 4), "norm.weight": torch.ones(4)}

    def loss(step):
        return (tensors["a.weight"] * tensors["norm.weight"]).square().mean(), torch.zeros(())

    trainer = build_train.Trainer("trial", tensors, loss, tmp_path)
    steps = trainer._steps(build_train.Budget(0.05))
    recorded = json.loads((tmp_path / "steps.json").read_text())
    assert steps == recorded["steps"] and steps >= 2 and trainer.step_number == 0
    assert all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in tensors.values())
    assert trainer._steps(build_train.Budget(1e9)) == steps  # once made, it stays
    assert trainer._steps(build_train.Budget(1e9, 3)) == 3


def test_compiling_is_not_counted(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(build_train, "time", types.SimpleNamespace(process_time=lambda: clock[0], monotonic=time.monotonic))
    tensors = {"a.weight": torch.ones(6, 4), "norm.weight": torch.ones(4)}

    def loss(step):
        clock[0] += 100.0 if not step else 2.0
        return (tensors["a.weight"] * tensors["norm.weight"]).square().mean(), torch.zeros(())

    assert build_train.Trainer("trial", tensors, loss, tmp_path).run(build_train.Budget(0.0, 5), str)["cpu_seconds"] == 10.0


@pytest.mark.parametrize("pays", [False, True])
def test_half_precision_only_where_it_pays(pays, monkeypatch, tmp_path):
    """Without bf16 instructions a step in bf16 takes some ten times as long as in fp32."""
    monkeypatch.setattr(build_train, "bf16_pays", lambda: pays)
    weight = torch.ones(4, 3, requires_grad=True)
    with build_train.autocast():
        assert (weight @ torch.ones(3, 2)).dtype == (torch.bfloat16 if pays else torch.float32)
    tensors = {"weight": weight, "embedding": torch.ones(4, 3)}

    def loss(_):
        return sum((tensor**2).sum() for tensor in tensors.values()), weight.detach()

    trainer = build_train.Trainer("half", tensors, loss, tmp_path)
    record = trainer.run(build_train.Budget(0.0, 2), str)
    assert record["precision"] == ("bf16" if pays else "fp32")
    assert weight.isfinite().all() and bool((weight < 1).all())


def test_learning_rate():
    assert build_train.rate(0.0) < 0.1 and build_train.rate(0.3) == 1.0
    assert build_train.rate(1.0) == pytest.approx(build_train.LAST)
    assert build_train.rate(0.75) == pytest.approx((1 + build_train.LAST) / 2)


def test_a_drafter_learns(tmp_path):
    """A block drafter of one layer with a vanilla head, on text of the shipped target: its teacher-forced acceptance rises."""
    config, weights = assets.weights("target")
    layers, features = config["num_hidden_layers"], (config["num_hidden_layers"] - 2,)
    sizes = build_models.Sizes(*(config[key] for key in SHAPE))
    target, tokenizer = Target(config, weights), assets.tokenizer()
    prompts = torch.tensor([tokenizer.encode(text)[:24] for text in assets.prompts()])
    text = build_text.continued(weights, sizes, prompts, 88, build_train.seeded("learns"))
    training, tested = text[8:], text[:8]
    teacher = build_train.Teacher(weights, sizes, features)
    tensors = build_models.new_block(weights, sizes, 1, 1) | build_models.new_vanilla(sizes, 16, build_train.seeded("head"))
    one = dataclasses.replace(sizes, layers=1)
    served = one.config() | {
        "block_size": 5, "mask_token_id": MASK, "target_layer_ids": list(features), "markov_rank": 16,
        "enable_confidence_head": True, "confidence_head_with_markov": True,
    }  # fmt: skip

    def tau():
        drafter = DSpark(served, {name: tensor.detach() for name, tensor in tensors.items()}, target)
        return systems.teacher_forced(systems.accepted(target, drafter, tested, 24))

    def loss(step):
        generator = build_train.seeded("learns", step)
        sequences = training[torch.randint(len(training), (4,), generator=generator)]
        anchors = build_train.anchors_of(4, 12, 88, 5, generator)
        return build_train.block_loss(tensors, one, teacher, sequences, teacher(sequences), anchors, drafts=5, kind="vanilla")

    before = tau()
    build_train.Trainer("learns", tensors, loss, tmp_path).run(build_train.Budget(0.0, 30), str)
    after = tau()
    assert layers > 1 and after["tau"] > before["tau"] + 4 * max(before["error"], after["error"]), (before, after)


SHAPE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
)  # fmt: skip  # as Sizes has them


# --- the whole build, in small ----------------------------------------------------------------------------------------

SMALL = dataclasses.replace(QUICK, evaluated=4, sequences=8, report_tokens=14, texts=1, rounds_stride=40)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    recorded = dict.fromkeys(build.stages(), 3)
    context = build.Context(tmp_path_factory.mktemp("build"), SMALL, 0, 1, False, recorded)
    for name, stage in build.stages().items():
        build.run_stage(name, stage, context)
    return context


def test_a_finished_stage_is_skipped_until_what_it_reads_changes(built):
    def done(context):
        return {name for name, stage in build.stages().items() if build.is_done(name, stage, context)}

    everything = set(build.stages())
    assert done(built) == everything
    assert done(dataclasses.replace(built, seed=1)) == set()
    changed = dataclasses.replace(SMALL, head_seconds=0.25)
    # What comes after these depends on what they wrote, which is as it was.
    assert done(dataclasses.replace(built, plan=changed)) == everything - {"dspark", "head_vanilla", "head_gated", "head_rnn"}
    assert done(dataclasses.replace(built, recorded=built.recorded | {"mtp": 4})) == everything - {"mtp"}
    record = json.loads((built.folder("block") / "done.json").read_text())
    assert record["steps"] == 3 and record["cpu_seconds"] > 0 and len(record["acceptance"]) == SMALL.drafts
    try:
        kept = (built.folder("block") / "done.json").read_text()
        (built.folder("block") / "done.json").write_text(json.dumps(record | {"outputs": {"weights.pt": "another"}}))
        assert done(built) == everything - {"pack"}
    finally:
        (built.folder("block") / "done.json").write_text(kept)


def test_stages_run_side_by_side_and_the_first_failure_ends_all(tmp_path, monkeypatch, capsys):
    script = tmp_path / "python"  # stands in for the process of a stage, which its last argument names
    script.write_text(
        f"""#!/bin/sh
for stage; do :; done
echo "$stage: $OMP_NUM_THREADS threads, after $(ls {tmp_path}/done)"
case $stage in
first | wide)
    sleep 0.3; touch {tmp_path}/done/$stage
    mkdir {tmp_path}/$stage; echo '{{"outputs": 0}}' > {tmp_path}/$stage/done.json ;;
slow) exec sleep 60 ;;
broken) sleep 1; exit 3 ;;
esac
"""
    )
    script.chmod(0o755)
    (tmp_path / "done").mkdir()
    monkeypatch.setattr(build, "sys", types.SimpleNamespace(executable=str(script), stderr=sys.stderr))
    made = {
        "first": build.Stage((), (), (), None),
        "wide": build.Stage(("first",), (), (), None, wide=True),
        "slow": build.Stage(("wide",), (), (), None),
        "broken": build.Stage(("wide",), (), (), None),
        "waiting": build.Stage(("wide",), (), (), None),
        "after": build.Stage(("broken",), (), (), None),
    }
    monkeypatch.setattr(build, "stages", lambda: made)
    then = time.monotonic()
    assert build.run_all(build.Context(tmp_path, SMALL, 0, 2, False, {}), []) == 1
    assert time.monotonic() - then < 30  # the slow one was ended
    lines = (tmp_path / "build.log").read_text().splitlines()
    assert lines[:2] == ["first: 1 threads, after ", "wide: 2 threads, after first"]
    begun = sorted(line for line in lines[2:] if "threads" in line)
    assert begun == [f"{name}: 1 threads, after first" for name in ("broken", "slow")]
    assert "stage broken failed; the same command goes on" in capsys.readouterr().err


def test_a_build_has_all_models_in_the_shipped_format(built):
    folder = built.folder("pack")
    target = Target(*assets.weights("target", folder))
    found = systems.drafters(target, folder)
    assert list(found) == list(systems.SYSTEMS)
    dspark, gated = (assets.weights(name, folder).tensors for name in ("dspark", "dspark_gated"))
    assert torch.equal(dspark["fc.weight"], gated["fc.weight"])  # one backbone for all heads
    assert not torch.equal(dspark["markov_head.markov_w1.weight"], gated["markov_head.markov_w1.weight"])
    trained = torch.load(built.folder("head_gated") / "weights.pt", weights_only=True)["markov_head.gate_proj.weight"]
    assert (trained - gated["markov_head.gate_proj.weight"]).abs().max() <= trained.abs().max() / 254 * 1.0001
    tokenizer = assets.tokenizer(folder)
    for domain, count in zip(assets.domains(folder), SMALL.prompts, strict=True):
        prompts = assets.prompts(domain, folder)
        assert len(prompts) == count and all(len(tokenizer.encode(text)) == SMALL.prompt for text in prompts)
    record = json.loads((folder / "build.json").read_text())
    assert record["stages"]["corpus"]["sha256"] and record["stages"]["head_rnn"]["steps"] == 3
    assert set(assets.domains(folder)) == set(build_corpus.DOMAINS)


def test_a_build_is_reported(built):
    found = systems.load(built.folder("report") / "systems.json")
    assert {(row["domain"], row["system"]) for row in found["teacher_forced"]} == {
        (domain, system) for domain in build_corpus.DOMAINS for system in systems.SYSTEMS
    }
    assert len(found["decoded"]) == 2 * len(found["teacher_forced"]) and len(found["calibration"]) == 6
    assert systems.table(found).count("\n") == 2 + 18 + 2 + 6
    rounds, recorded = acceptance.load(built.folder("rounds") / "rounds.json")
    assert recorded["stride"] == 40 and set(rounds) == set(acceptance.DOMAINS)


def test_the_size_of_the_weights_is_limited(built, monkeypatch):
    monkeypatch.setattr(build_stages, "LIMIT", 1000)
    with pytest.raises(ValueError, match="the weights take .* bytes, more than 1000"):
        build_stages.pack(built)


def test_the_full_plan_fits_its_limits():
    """At most 90 minutes on two cores: drafters two at a time, the rest of the stages took 15 minutes together."""
    seconds = FULL.target_seconds + 4 * FULL.drafter_seconds + 3 * FULL.head_seconds
    assert seconds / 2 <= 75 * 60


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--out"),
        (["--out", "x", "--threads", "0"], "--threads: expected at least 1, got 0"),
        (["--out", "x", "--quick", "--install"], "--install: expected without --quick"),
        (["--out", "x", "--recorded", "nowhere"], "--recorded: expected a build.json"),
        (["--out", "x", "--only", "eagle"], "--only: expected one of corpus, tokenizer"),
        (["--out", "x", "--only", "target"], "--only: target needs tokenizer, not done"),
    ],
)
def test_refusals(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert build.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("bench.assets.build: ") and error.count("\n") == 1


def test_the_names_of_stages():
    assert build.STAGES == tuple(build.stages())
