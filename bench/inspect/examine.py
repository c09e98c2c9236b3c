"""What a checkpoint directory contains, which ops of the package a decoder with it calls and with what, and the target it expects.

Knows DSpark drafters (Qwen3 and Gemma 4 layers), DFlash drafters, EAGLE-3 drafters (described, not run here) and language models.
Only config.json and the headers of the weight files are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import dspark_kernels as dk
from bench.shared.command import BadArgument, first_line
from dspark_kernels import checkpoint
from dspark_kernels.checkpoint import formats
from dspark_kernels.ops.attention.tree import MAX_HEAD_DIM

_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2}
# Beginnings of tensor names, in the order of the table; the first that fits.
_PARTS = (
    ("sequential head, W1", ("markov_head.markov_w1",)),
    ("sequential head, W2", ("markov_head.markov_w2",)),
    ("sequential head, gate", ("markov_head.gate_proj", "markov_head.joint_proj")),
    ("confidence head", ("confidence_head.",)),
    ("context projection", ("fc.", "hidden_norm.")),
    ("vocabulary map", ("d2t", "t2d")),
    ("embedding", ("embed_tokens.", "model.embed_tokens.", "model.language_model.embed_tokens.")),
    ("output head", ("lm_head.",)),
    ("layers", ("layers.", "midlayer.", "model.layers.", "model.language_model.layers.")),
    ("final norm", ("norm.", "model.norm.", "model.language_model.norm.")),
)
_TARGETS = {(36, 2560): "Qwen/Qwen3-4B", (36, 4096): "Qwen/Qwen3-8B", (40, 5120): "Qwen/Qwen3-14B"}
_HEADS = {"vanilla": "MarkovHead", "gated": "GatedMarkovHead", "rnn": "RnnMarkovHead"}


class Op(NamedTuple):
    """A call that a decoder makes in every round."""

    op: str
    options: str
    why: str


def examine(directory: str) -> dict:
    """What there is to say of a directory, as `--json` prints it.

    Raises FileNotFoundError, ValueError and ImportError as dspark_kernels.checkpoint does, and ValueError for an unknown directory.
    """
    config = checkpoint.read_config(directory)
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str) else None
    found = {"directory": directory, "architecture": name}
    tensors = None
    if formats.is_eagle3(config):
        try:
            tensors = checkpoint.stored_tensors(directory)
        except FileNotFoundError:  # its authors publish pytorch_model.bin, which is not opened: unpickling runs code
            tensors = {}
        found |= _eagle3(config, tensors)
    elif name in formats.DRAFTERS:
        config, form = checkpoint.check(directory)
        found |= {"title": form.title, "runs": "python -m bench.decode --target TARGET --drafter " + directory}
        found |= _drafter(config)
    elif name in formats.TARGETS or (_is_language_model(name) and not formats.other(config)):
        own = name in formats.TARGETS
        if own:
            checkpoint.check(directory)
        found |= {"title": formats.TARGETS[name].title if own else "language model, run by its own class of transformers"}
        found["runs"] = f"python -m bench.decode --target {directory}" + ("" if own else " --transformers")
        found |= _target(config, Path(directory))
    else:
        known = ", ".join([*formats.DRAFTERS, *formats.TARGETS])
        raise ValueError(
            f"{directory}: expected a checkpoint of a known architecture ({known}, an EAGLE-3 drafter, or a language model), got"
            f" {formats.described(config)}; {formats.PUBLISHED_DRAFTERS}; {formats.PUBLISHED_TARGETS}"
        )
    tensors = checkpoint.stored_tensors(directory) if tensors is None else tensors
    return found | {"files": sorted({tensor.file.name for tensor in tensors.values()}), "parts": _parts(tensors)}


def _is_language_model(name: str | None) -> bool:
    return name is not None and name.endswith(("ForCausalLM", "ForConditionalGeneration"))


def _layers(config: Mapping) -> dict:
    gemma = "global_head_dim" in config
    return {
        "layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "query_heads": config["num_attention_heads"],
        "key_value_heads": config[formats.gemma4_kv_heads(config)] if gemma else config["num_key_value_heads"],
        "head_size": config["global_head_dim"] if gemma else config["head_dim"],
        "vocabulary": config["vocab_size"],
    }


def _drafter(config: Mapping) -> dict:
    """A block drafter, from its config in DSpark's words."""
    rank, first = config["markov_rank"], config.get("anchor_first", True)
    kind = config["markov_head_type"] if rank else None
    confidence = bool(config["enable_confidence_head"])
    markov = confidence and bool(config["confidence_head_with_markov"])
    count, hidden = config["num_target_layers"], config["hidden_size"]
    known = _TARGETS.get((count, hidden))
    if count == 48 and str(config.get("target_model_type", config.get("model_type"))).startswith("gemma4"):
        known = "google/gemma-4-12B-it"
    return {
        **_layers(config),
        "block_size": config["block_size"],
        "anchor_first": first,
        "mask_token_id": config["mask_token_id"],
        "head": kind,
        "rank": rank,
        "confidence": {"reads_markov": markov, "calibrated": config.get("sts_temperatures") is not None} if confidence else None,
        "logit_cap": config.get("final_logit_softcapping"),
        "expects": {
            "layers": count, "layers_read": config["target_layer_ids"], "hidden_size": hidden, "vocabulary": config["vocab_size"],
            "shares_embedding": config.get("architectures") == ["DFlashDraftModel"], "known": known,
        },
        "ops": [op._asdict() for op in _block_ops(config, kind, confidence, markov)],
    }  # fmt: skip


def _block_ops(config: Mapping, kind: str | None, confidence: bool, markov: bool) -> list[Op]:
    drafts, layers, rank, first = config["block_size"], _layers(config), config["markov_rank"], config.get("anchor_first", True)
    rows = drafts if first else drafts + 1
    layout = f"block_size={drafts}, mask_token_id={config['mask_token_id']}, anchor_first={first}"
    ops = [Op("draft_layout", layout, f"the block's {rows} rows: the anchor and {rows - 1} masks")]
    scale = ", scale=1.0" if "global_head_dim" in config else ""
    why = "the block's rows in every draft layer, over the injected context"
    ops.append(_attention(layers["head_size"], f'mask="full"{scale}', why))
    head = f"head={_HEADS[kind]}(rank {rank})" if kind else "head=None"
    options = [head] + (["hidden"] if kind in ("gated", "rnn") or confidence else [])
    if confidence:
        options.append(f"confidence=ConfidenceHead([{config['hidden_size']}{f' + {rank}' if markov else ''}])")
    cap = config.get("final_logit_softcapping")
    why = f"{drafts} drafts in one launch" + (f"; base logits capped at {cap:g} before" if cap else "")
    ops.append(Op("draft_block", ", ".join(options), why))
    why = "the same over each position's C best base logits: a sparse proposal"
    ops.append(Op("draft_block", f"{head}, candidates=C", why))
    if hasattr(dk, "draft_tree"):
        why = "instead: a tree of drafts (tree_layout, accept_tree, compact_kv)"
        ops.append(Op("draft_tree", f'{head}, method="conditioned"', why))
    if confidence:
        ops.append(Op("schedule_prefixes", 'cost, policy="causal" or "budget"', "how many drafts to verify, by confidence"))
    why = "without scheduling" if confidence else "no confidence to schedule by"
    ops.append(Op("fixed_layout", f"draft_lens up to {drafts}", why))
    ops.append(Op("accept_chain", "proposal of draft_block", "lossless acceptance of the target's logits"))
    return ops


def _attention(head_size: int, options: str, why: str) -> Op:
    if head_size > MAX_HEAD_DIM:
        return Op("(the engine's attention)", options, f"{why}; heads of {head_size} exceed tree_attention's {MAX_HEAD_DIM}")
    return Op("tree_attention", options, why)


def _eagle3(config: Mapping, tensors: Mapping) -> dict:
    vocab, hidden, own = config.get("vocab_size"), config.get("hidden_size"), config.get("draft_vocab_size")
    wide = tensors["fc.weight"].shape[1] if "fc.weight" in tensors else None
    read = config.get("target_layer_ids")
    target_hidden = config.get("target_hidden_size", hidden)
    count = len(read) if read else (wide // target_hidden if wide and target_hidden else None)
    mapped = "d2t" in tensors
    options = "K' = 1, first_draft=k, head=None" + (", draft_to_target=arange + d2t" if mapped else "")
    ops = [Op("draft_block", options, "one draft per pass of the drafter")]
    if hasattr(dk, "expand_tree"):
        ops.append(Op("expand_tree", "depth", "a tree of drafts, one depth per pass"))
    ops += [
        Op("fixed_layout", "draft_lens", "no confidence to schedule by"),
        Op("accept_chain", "proposal" + (", over the draft vocabulary" if mapped else ""), "lossless acceptance"),
    ]
    return {
        "title": "EAGLE-3 drafter",
        "runs": None,
        "reason": formats.other(config),
        "layers": config.get("num_hidden_layers"),
        "hidden_size": hidden,
        "vocabulary": vocab,
        "draft_vocabulary": own,
        "drafts": config.get("ttt_length"),
        "expects": {
            "layers": config.get("num_target_layers"), "layers_read": read, "num_layers_read": count, "hidden_size": target_hidden,
            "vocabulary": vocab, "shares_embedding": "embed_tokens.weight" not in tensors,
            "known": config.get("target_model_name_or_path"),
        },
        "ops": [op._asdict() for op in ops],
    }  # fmt: skip


def _target(config: Mapping, directory: Path) -> dict:
    text = {**config, **(config.get("text_config") or {})}
    window, kinds = text.get("sliding_window"), text.get("layer_types") or []
    sizes = [text.get("head_dim")] + ([text.get("global_head_dim")] if text.get("global_head_dim") else [])
    options = 'mask="chain"' + (f" (window={window} in the sliding layers)" if "sliding_attention" in kinds else "")
    why = "the verified rows in every layer, over the paged context"
    ops = [
        _attention(max((size for size in sizes if size), default=0), options, why),
        Op("accept_chain", "target_logits", "lossless acceptance; SamplingTensors for temperature and filters"),
    ]
    return {
        "layers": text.get("num_hidden_layers"),
        "hidden_size": text.get("hidden_size"),
        "vocabulary": text.get("vocab_size"),
        "stop_tokens": list(checkpoint.stop_tokens(directory)),
        "tokenizer": any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")),
        "chat_template": _has_template(directory),
        "ops": [op._asdict() for op in ops],
    }


def _has_template(directory: Path) -> bool:
    """A file of its own, as newer directories have it, or an entry of the tokenizer's config."""
    if any((directory / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        return "chat_template" in json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _parts(tensors: Mapping) -> list[dict]:
    parts = {title: [] for title, _ in _PARTS} | {"other": []}
    for name, tensor in tensors.items():
        title = next((title for title, starts in _PARTS if name.startswith(starts)), "other")
        parts[title].append(tensor)
    order = ["embedding", "context projection", "layers", "final norm", "output head", *parts]
    rows = [_part(title, parts[title]) for title in dict.fromkeys(order) if parts[title]]
    return [*rows, _part("in all", tensors.values())] if rows else []


def _part(title: str, tensors) -> dict:
    tensors = list(tensors)
    sizes = [math.prod(tensor.shape) for tensor in tensors]
    return {
        "part": title,
        "tensors": len(tensors),
        "parameters": sum(sizes),
        "bytes": sum(size * _BYTES.get(tensor.dtype, 1) for size, tensor in zip(sizes, tensors, strict=True)),
        "dtypes": sorted({tensor.dtype for tensor in tensors}),
    }


def report(found: Mapping) -> str:
    """The text for a person."""
    lines = [f"{found['directory']}: {found['title']} ({found['architecture']})", ""]
    lines += [f"  {name:<14}{value}" for name, value in _facts(found) if value is not None]
    rows = [("part", "tensors", "parameters", "bytes", "dtype")]
    rows += [
        (p["part"], str(p["tensors"]), f"{p['parameters']:,}", _size(p["bytes"]), ", ".join(p["dtypes"])) for p in found["parts"]
    ]
    lines += ["", *_table(rows, numbers=(1, 2, 3))] if found["parts"] else []
    lines += ["", "ops of a round"]
    lines += _table([tuple(op.values()) for op in found["ops"]])
    if found["runs"] is None:
        return "\n".join([*lines, "", f"not run by bench.decode: {found['reason']}"])
    return "\n".join([*lines, "", f"run it: {found['runs']}"])


def _facts(found: Mapping):
    layers = f"{found['layers']} of hidden size {found['hidden_size']}"
    if "head_size" in found:
        layers += f", {found['query_heads']} query and {found['key_value_heads']} key-value heads of {found['head_size']}"
    yield "layers", layers
    own = found.get("draft_vocabulary")
    mapped = own not in (None, found["vocabulary"])
    yield "vocabulary", f"{found['vocabulary']}" + (f", of which {own} can be drafted" if mapped else "")
    if "block_size" in found:
        drafts, mask = found["block_size"], found["mask_token_id"]
        masks = f"{drafts} masks after the anchor predict"
        if found["anchor_first"]:
            masks = f"the anchor and {drafts - 1} masks, all predict"
        yield "block", f"{drafts} drafts per pass: {masks} (mask token {mask})"
        yield "head", f"{found['head']}, rank {found['rank']}" if found["head"] else "none: positions are independent"
        confidence = found["confidence"]
        if confidence is None:
            yield "confidence", "none"
        else:
            reads = "hidden state and W1 of the token before" if confidence["reads_markov"] else "hidden state alone"
            yield "confidence", f"from {reads}, {'with' if confidence['calibrated'] else 'without'} STS temperatures"
    if "expects" in found:
        yield "target", _expected(found["expects"])
    if "stop_tokens" in found:
        yield "stop tokens", ", ".join(map(str, found["stop_tokens"])) or "none named by generation_config.json"
        template = "with a chat template" if found["chat_template"] else "without a chat template"
        yield "tokenizer", template if found["tokenizer"] else "none"
    files = ", ".join(found["files"]) if len(found["files"]) < 4 else f"{len(found['files'])} shards"
    yield "files", files or "no safetensors: the tensors are not looked at"


def _expected(expects: Mapping) -> str:
    count = f"{expects['layers']} layers, " if expects["layers"] else ""
    read, number = expects["layers_read"], expects.get("num_layers_read")
    reads = f"; reads layers {', '.join(map(str, read))}" if read else f"; reads {number} layers" if number else ""
    shares = "its embedding is" if number else "its embedding and head are"
    shares = f"; {shares} the drafter's too" if expects["shares_embedding"] else ""
    known = f": {expects['known']}" if expects["known"] else ""
    return f"{count}hidden size {expects['hidden_size']}, vocabulary {expects['vocabulary']}{known}{reads}{shares}"


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _table(rows: Sequence[tuple], numbers: Sequence[int] = ()) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.rjust(w) if i in numbers else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def run(arguments) -> int:
    """0: described. Raises BadArgument for a directory that is missing, broken or unknown."""
    try:
        found = examine(arguments.directory)
    except (OSError, ValueError, ImportError) as error:
        raise BadArgument(first_line(error)) from None
    print(json.dumps(found, indent=2) if arguments.json else report(found))
    return 0
