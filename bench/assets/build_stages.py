"""What each stage of `bench.assets.build` does: it reads the folders of the stages before it and writes into its own."""

from __future__ import annotations

import functools
import json
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import build_corpus, build_models as models, build_text, build_tokenizer, build_train as train
from .build_corpus import DOMAINS
from .build_models import Sizes
from .build_plan import LIMIT
from .build_train import Budget, Progress, Teacher, Trainer, seeded, write
from .quantise import save
from .tokenizer import FIRST_MERGE, MASK, Tokenizer

SHIPPED = ("target", "draft_model", "mtp", "block", "dspark", "dspark_gated", "dspark_rnn")
CHUNK = 256  # sequences that are written at once
MAX_DRAFTS = 4  # of the step-wise drafters, where nobody asks for another number


def read_json(context, stage: str, file: str):
    return json.loads((context.folder(stage) / file).read_text(encoding="utf-8"))


def write_json(path: Path, content) -> None:
    write(path, lambda part: part.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8"))


def corpus(context) -> dict:
    found = build_corpus.read(0, context.plan.packages)
    write_json(
        context.folder("corpus") / "corpus.json", {"training": found.training, "held_out": found.held_out, "facts": found.facts}
    )
    return found.facts


def tokenizer(context) -> dict:
    texts, folder = read_json(context, "corpus", "corpus.json"), context.folder("tokenizer")
    progress = Progress("tokenizer", context.plan.merges)
    merges = build_tokenizer.learn((t for domain in DOMAINS for t in texts["training"][domain]), context.plan.merges, progress)
    write_json(folder / "merges.json", merges)
    made = Tokenizer(merges)
    rows = {
        f"{split}/{domain}": build_tokenizer.encode(made, texts[split][domain])
        for split in ("training", "held_out")
        for domain in DOMAINS
    }
    write(folder / "tokens.npz", lambda part: _savez(part, rows))
    return {"tokens": {name: len(row) for name, row in rows.items()}}


def _savez(path: Path, arrays: dict) -> None:
    with open(path, "wb") as file:  # a name would get a second suffix
        np.savez(file, **arrays)


def _rows(context, split: str) -> list[Tensor]:
    """Tokens of every domain, int64."""
    with np.load(context.folder("tokenizer") / "tokens.npz") as file:
        return [torch.from_numpy(file[f"{split}/{domain}"].astype(np.int64)) for domain in DOMAINS]


def _pieces(rows: list[Tensor], mixture, count: int, length: int, generator) -> Tensor:
    """int64 [count, length]: anywhere from the domains in the shares of the mixture."""
    chosen = torch.multinomial(torch.tensor(mixture), count, True, generator=generator).tolist()
    found = []
    for domain in chosen:
        start = int(torch.randint(len(rows[domain]) - length + 1, (1,), generator=generator))
        found.append(rows[domain][start : start + length])
    return torch.stack(found)


def _vocab(context) -> int:
    return FIRST_MERGE + len(read_json(context, "tokenizer", "merges.json"))


def _sizes(context, name: str = "target", layers: int | None = None) -> Sizes:
    hidden, intermediate, depth, *heads = getattr(context.plan, name)
    return Sizes(hidden, intermediate, layers or depth, *heads, vocab=_vocab(context))


def _weights(context, stage: str) -> dict[str, Tensor]:
    return torch.load(context.folder(stage) / "weights.pt", weights_only=True)


def _finish(context, stage: str, tensors: dict[str, Tensor]) -> None:
    kept = {name: tensor.detach() for name, tensor in tensors.items()}
    write(context.folder(stage) / "weights.pt", lambda part: torch.save(kept, part))


# --- target and its text ----------------------------------------------------------------------------------------------


def target(context) -> dict:
    plan, sizes = context.plan, _sizes(context)
    rows, held_out = _rows(context, "training"), _rows(context, "held_out")
    tensors = models.new_language_model(sizes, seeded(context.seed, "target"))
    compute = train.compiled(lambda sequences: train.target_loss(tensors, sizes, sequences), context.compile)

    def loss(step: int):
        generator = seeded(context.seed, "target", step)
        with train.autocast():
            return compute(_pieces(rows, plan.mixture, plan.target_batch, plan.length + 1, generator))

    trainer = Trainer("target", tensors, loss, context.folder("target"))
    budget = Budget(plan.target_seconds, context.recorded.get("target"))
    spent = trainer.run(budget, lambda nats: f"{nats.mean():.3f} nats per token")
    nats = {f"held_out_nats_of_{length}_tokens": {} for length in (plan.prompt, plan.length)}
    with torch.no_grad():
        for length, found in zip((plan.prompt, plan.length), nats.values(), strict=True):
            for domain, row in zip(DOMAINS, held_out, strict=True):
                pieces = _pieces([row], (1.0,), 128, length, seeded(context.seed, "judged", domain, length))
                found[domain] = round(float(train.target_loss(tensors, sizes, pieces)[0]), 3)
    _finish(context, "target", tensors)
    return {**spent, **nats, "parameters": sum(tensor.numel() for tensor in tensors.values())}


def text(context) -> dict:
    """Prompts of the corpus continued by the target: training text from training prompts, evaluation text from held-out ones."""
    plan, sizes, folder = context.plan, _sizes(context), context.folder("text")
    tensors = _weights(context, "target")
    prompts = {
        split: _pieces(_rows(context, split), plan.mixture, count, plan.prompt, seeded(context.seed, "prompts", split))
        for split, count in (("training", plan.sequences), ("held_out", plan.evaluated))
    }
    jobs = [(split, first) for split, found in prompts.items() for first in range(0, len(found), CHUNK)]
    progress = Progress("text", len(jobs))
    for number, (split, first) in enumerate(jobs, 1):
        file = folder / f"{split}-{first}.npy"
        if not file.is_file():
            some = prompts[split][first : first + CHUNK]
            found = build_text.continued(tensors, sizes, some, plan.length, seeded(context.seed, "text", split, first))
            write(file, lambda part, found=found: _save(part, found.numpy().astype(np.uint16)))
        progress(number)
    arrays = {
        split: np.concatenate([np.load(folder / f"{split}-{first}.npy") for of, first in jobs if of == split]) for split in prompts
    }
    write(folder / "text.npz", lambda part: _savez(part, arrays))
    return {"sequences": {split: len(found) for split, found in arrays.items()}}


def _save(path: Path, array) -> None:
    with open(path, "wb") as file:
        np.save(file, array)


# --- drafters ---------------------------------------------------------------------------------------------------------


def _text(context) -> tuple[Tensor, Tensor]:
    with np.load(context.folder("text") / "text.npz") as file:
        return tuple(torch.from_numpy(file[split].astype(np.int64)) for split in ("training", "held_out"))


def _teacher(context) -> Teacher:
    return Teacher(_weights(context, "target"), _sizes(context), tuple(context.plan.feature_layers))


def _train_drafter(context, stage: str, tensors: dict[str, Tensor], loss: Callable, teacher: Teacher, seconds: float) -> dict:
    """loss(tensors, teacher=, sequences=, passed=, anchors=) -> (loss, acceptance [rounds, drafts])."""
    plan = context.plan
    training, held_out = _text(context)
    of_target = train.compiled(teacher.__call__, context.compile)

    def compute(sequences, passed, anchors):
        return loss(tensors, teacher=teacher, sequences=sequences, passed=passed, anchors=anchors)

    fast = train.compiled(compute, context.compile)

    def step(number: int):
        generator = seeded(context.seed, stage, number)
        sequences = training[torch.randint(len(training), (plan.batch,), generator=generator)]
        anchors = train.anchors_of(plan.batch, plan.anchors, plan.length, plan.drafts, generator)
        with train.autocast():
            return fast(sequences, of_target(sequences), anchors)

    trainer = Trainer(stage, tensors, step, context.folder(stage))
    spent = trainer.run(Budget(seconds, context.recorded.get(stage)), lambda found: f"teacher-forced tau {train.tau(found):.3f}")
    scores, generator = [], seeded(context.seed, "anchors")
    with torch.no_grad():
        for sequences in held_out.split(plan.batch):
            anchors = train.anchors_of(len(sequences), plan.anchors, plan.length, plan.drafts, generator)
            scores.append(compute(sequences, teacher(sequences), anchors)[1])
    found = torch.cat(scores)
    _finish(context, stage, tensors)
    return {
        **spent,
        "acceptance": [round(share, 4) for share in found.mean(0).tolist()],  # by position, teacher-forced, not conditional
        "tau": round(train.tau(found), 4),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
    }


def draft_model(context) -> dict:
    sizes, teacher = _sizes(context, "draft_model"), _teacher(context)
    tensors = models.new_language_model(sizes, seeded(context.seed, "draft_model"))
    loss = functools.partial(train.draft_model_loss, sizes=sizes)
    return _train_drafter(context, "draft_model", tensors, loss, teacher, context.plan.drafter_seconds)


def mtp(context) -> dict:
    teacher = _teacher(context)
    tensors = models.new_mtp(teacher.tensors, teacher.sizes)
    loss = functools.partial(train.mtp_loss, sizes=_sizes(context, layers=1))
    return _train_drafter(context, "mtp", tensors, loss, teacher, context.plan.drafter_seconds)


def _backbone(context, teacher: Teacher) -> tuple[dict[str, Tensor], Sizes]:
    layers = context.plan.block_layers
    tensors = models.new_block(teacher.tensors, teacher.sizes, layers, len(teacher.feature_layers))
    return tensors, _sizes(context, layers=layers)


def block(context) -> dict:
    teacher = _teacher(context)
    tensors, sizes = _backbone(context, teacher)
    loss = functools.partial(train.block_loss, sizes=sizes, drafts=context.plan.drafts, kind=None)
    return _train_drafter(context, "block", tensors, loss, teacher, context.plan.drafter_seconds)


def dspark(context) -> dict:
    """Backbone and vanilla head together; the heads' stages then go on from these."""
    teacher, plan = _teacher(context), context.plan
    tensors, sizes = _backbone(context, teacher)
    tensors |= models.new_vanilla(teacher.sizes, plan.rank, seeded(context.seed, "dspark"))
    loss = functools.partial(train.block_loss, sizes=sizes, drafts=plan.drafts, kind="vanilla")
    return _train_drafter(context, "dspark", tensors, loss, teacher, plan.drafter_seconds - plan.head_seconds)


def head(context, kind: str) -> dict:
    """A head of this kind on the backbone as it stands, from where the vanilla head ended; all kinds have the same budget."""
    teacher, plan = _teacher(context), context.plan
    trained = _weights(context, "dspark")
    tensors = models.new_head(kind, trained, teacher.sizes, seeded(context.seed, "head", kind))
    loss = functools.partial(
        train.block_loss, sizes=_sizes(context, layers=plan.block_layers), drafts=plan.drafts, kind=kind, backbone=_bare(trained)
    )
    return _train_drafter(context, f"head_{kind}", tensors, loss, teacher, plan.head_seconds)


def _bare(trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone of a DSpark drafter, without its heads."""
    return {name: tensor for name, tensor in trained.items() if not name.startswith(("markov_head", "confidence_head"))}


# --- what is shipped --------------------------------------------------------------------------------------------------


def pack(context) -> dict:
    plan, folder, sizes = context.plan, context.folder("pack"), _sizes(context)
    of_block = _sizes(context, layers=plan.block_layers).config() | {
        "block_size": plan.drafts,
        "mask_token_id": MASK,
        "target_layer_ids": list(plan.feature_layers),
        "num_target_layers": sizes.layers,
    }

    def of_head(kind):
        return of_block | {
            "architectures": ["Qwen3DSparkModel"],
            "markov_rank": plan.rank,
            "markov_head_type": kind,
            "enable_confidence_head": True,
            "confidence_head_with_markov": True,
        }

    language_model = {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True}
    found = {
        "target": (language_model | sizes.config(), _weights(context, "target")),
        "draft_model": (
            language_model | _sizes(context, "draft_model").config() | {"max_drafts": MAX_DRAFTS}, _weights(context, "draft_model")
        ),
        "mtp": ({"max_drafts": MAX_DRAFTS}, _weights(context, "mtp")),
        "block": (of_block, _weights(context, "block")),
        "dspark": (of_head("vanilla"), _bare(_weights(context, "dspark")) | _weights(context, "head_vanilla")),
        **{
            f"dspark_{kind}": (of_head(kind) | {"backbone": "dspark"}, _weights(context, f"head_{kind}"))
            for kind in ("gated", "rnn")
        },
    }  # fmt: skip
    sizes_of_files = {name: save(name, config, tensors, folder) for name, (config, tensors) in found.items()}
    total = sum(sizes_of_files.values())
    if total > LIMIT:
        raise ValueError(f"the weights take {total} bytes, more than {LIMIT}")
    merges, held_out = read_json(context, "tokenizer", "merges.json"), read_json(context, "corpus", "corpus.json")["held_out"]
    write_json(folder / "merges.json", merges)
    made = Tokenizer(merges)
    prompts = {
        domain: _prompts(made, held_out[domain], count, plan.prompt, seeded(context.seed, "shipped", domain))
        for domain, count in zip(DOMAINS, plan.prompts, strict=True)
    }
    write_json(folder / "prompts.json", prompts.pop("code"))
    write_json(folder / "domains.json", prompts)
    made_with = {"torch": torch.__version__, "machine": platform.machine(), "threads": context.threads}
    record = {"seed": context.seed, **made_with, "bytes": sizes_of_files, "stages": {}}
    for stage in ("corpus", "tokenizer", "target", "text", *SHIPPED[1:5], "head_vanilla", "head_gated", "head_rnn"):
        done = read_json(context, stage, "done.json")
        record["stages"][stage] = {key: value for key, value in done.items() if key not in ("inputs", "outputs")}
    path = folder / "build.json"
    write(path, lambda part: part.write_text(json.dumps(record, indent=1) + "\n"))
    return {"bytes": total}


def _prompts(tokenizer: Tokenizer, texts: list[str], count: int, length: int, generator) -> list[str]:
    """Pieces of `length` tokens from the beginnings of lines, spread over the texts; encoding them gives these tokens back."""
    found: dict[str, None] = {}
    for _ in range(100 * count):
        words = texts[int(torch.randint(len(texts), (1,), generator=generator))]
        lines = words.splitlines(keepends=True)
        first = int(torch.randint(len(lines), (1,), generator=generator))
        piece = tokenizer.decode(tokenizer.encode("".join(lines[first : first + length]))[:length])
        if len(tokenizer.encode(piece)) == length and "\ufffd" not in piece and not any(_overlap(piece, other) for other in found):
            found[piece] = None
        if len(found) == count:
            return list(found)
    raise ValueError(f"expected {count} prompts of {length} tokens in the held-out text, found {len(found)}")


def _overlap(one: str, other: str) -> bool:
    lines = {line.strip() for line in one.splitlines() if len(line.strip()) >= build_corpus.LONG_LINE}
    return any(line.strip() in lines for line in other.splitlines())


def rounds(context) -> dict:
    """Rounds of the DSpark drafter for the load simulator and the calibration."""
    from bench.shared import acceptance

    plan, folder, found = context.plan, context.folder("pack"), {}
    for domain in acceptance.DOMAINS:
        count = len(acceptance.texts(domain, folder))
        progress = Progress(f"rounds of {domain}", count)
        chosen = range(min(count, plan.texts or count))
        parts = []
        for text in chosen:
            parts.append(acceptance.measure(domain, [text], stride=plan.rounds_stride, folder=folder))
            progress(text + 1)
        found[domain] = acceptance.joined(parts)
    recorded = acceptance.settings(folder) | {"stride": plan.rounds_stride}
    write(context.folder("rounds") / "rounds.json", lambda part: acceptance.save(part, found, recorded))
    return {"tokens_per_round": {domain: round(some.tokens_per_round, 3) for domain, some in found.items()}}


def report(context) -> dict:
    from bench.shared import acceptance, systems

    plan = context.plan
    found = systems.measure(
        context.folder("pack"),
        prompts=plan.report_prompts,
        new_tokens=plan.report_tokens,
        progress=lambda text: print(f"report: {text}", flush=True),
    )
    found["calibration"] = systems.calibration(acceptance.load(context.folder("rounds") / "rounds.json")[0])
    write(context.folder("report") / "systems.json", lambda part: systems.save(part, found))
    return {}
