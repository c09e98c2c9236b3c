"""What a checkpoint directory contains, which ops of the package a decoder with it calls and with what, and the target it expects.

Knows DSpark and DFlash drafters, EAGLE-3 drafters (docs/checkpoints.md) and language models. Only config.json and the headers of the
weight files are read.
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
from dspark_kernels.checkpoint import attention, formats
from dspark_kernels.ops.attention.tree import MAX_HEAD_DIM

_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2}
# Beginnings of tensor names, in the order of the table; the first that fits.
_PARTS = (
    ("sequential head, W1", ("markov_head.markov_w1", "markov_w1")),
    ("sequential head, W2", ("markov_head.markov_w2", "markov_w2")),
    ("sequential head, gate", ("markov_head.gate_proj", "markov_head.joint_proj", "gate_proj", "joint_proj")),
    ("confidence head", ("confidence_head.", "confidence_proj.")),
    ("context projection", ("fc.", "fc_norm.", "input_norm.", "hidden_norm.")),
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
    tensors, run = None, "python -m bench.decode --target TARGET --drafter " + directory
    if formats.is_eagle3(config):
        try:
            tensors = checkpoint.stored_tensors(directory)
        except FileNotFoundError:  # its authors publish pytorch_model.bin, which is not opened: unpickling runs code
            tensors = {}
        config, runs = _readable_eagle3(directory, config, tensors, run)
        found |= {**_eagle3(config, tensors), **runs}
    elif formats.of(config, formats.DRAFTERS) is not None:
        config, form = checkpoint.check(directory)
        tensors = checkpoint.stored_tensors(directory)
        found |= {"title": form.title, "runs": run, **_drafter(config, tensors)}
    elif name in formats.TARGETS or formats.is_language_model(config):
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


def _readable_eagle3(directory: str, config: Mapping, tensors: Mapping, run: str) -> tuple[Mapping, dict]:
    """The config in the words of its loader, and how it is run; or as it is, and why it is not."""
    if not tensors:
        return config, {
            "runs": None,
            "reason": "its tensors are no safetensors: pickles are not opened; save them as model.safetensors",
        }
    try:
        return checkpoint.check(directory)[0], {"runs": run, "reason": None}
    except ValueError as error:
        return config, {"runs": None, "reason": first_line(error)}


def _round_cost(config: Mapping, tensors: Mapping, passes: int) -> dict:
    """What a round of one request reads in the drafter, in bytes: a pass reads all layers and the head, every draft W2. A head that is
    the target's counts as wide as the layers' values are."""
    layers, vocab = _layers(config), config["vocab_size"]
    sizes = {part["part"]: part["bytes"] for part in _parts(tensors)}
    width = next((_BYTES.get(tensor.dtype, 1) for name, tensor in tensors.items() if "layers." in name or "midlayer." in name), 2)
    output = sizes.get("output head", (config.get("draft_vocab_size") or vocab) * config["hidden_size"] * width)
    drafts = config.get("block_size", passes)
    weights = passes * (sizes.get("layers", 0) + output) + sizes.get("context projection", 0)
    return {
        "passes": passes,
        "bytes": weights + drafts * sizes.get("sequential head, W2", 0),
        "context_bytes_per_token": 2 * layers["layers"] * layers["key_value_heads"] * layers["head_size"] * width,
    }


def _adapters(config: Mapping) -> list[str]:
    """Which integrations take a block drafter: by what each of their pages says, not by a run with this directory."""
    kind, rank = config.get("markov_head_type"), config["markov_rank"]
    qwen3 = "global_head_dim" not in config
    found = ["model.generate of transformers"]
    if rank and kind == "vanilla" and qwen3:
        found.append("vLLM: parts accept and draft")
    elif qwen3:
        found.append("vLLM: part accept, where vLLM itself runs the drafter")
    if rank:
        found.append("SGLang: parts draft, accept, schedule (off unless asked for), where SGLang itself reads the directory")
    return found


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


def _drafter(config: Mapping, tensors: Mapping) -> dict:
    """A block drafter, from its config in DSpark's words."""
    rank, first = config["markov_rank"], config.get("anchor_first", True)
    kind = config["markov_head_type"] if rank else None
    confidence = bool(config["enable_confidence_head"])
    markov = confidence and bool(config["confidence_head_with_markov"])
    count, hidden = config.get("num_target_layers"), config["hidden_size"]
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
        "draft_vocabulary": config.get("draft_vocab_size"),
        "windows": [sight.window for sight in attention.sights(config)],
        "causal": [sight.causal for sight in attention.sights(config)],
        "round": _round_cost(config, tensors, 1),
        "adapters": _adapters(config),
        "expects": {
            "layers": count, "layers_read": config["target_layer_ids"], "hidden_size": hidden, "vocabulary": config["vocab_size"],
            "shares_embedding": "embed_tokens.weight" not in tensors, "shares_head": "lm_head.weight" not in tensors, "known": known,
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
    for sight in dict.fromkeys(attention.sights(config)):
        if sight.window is None:
            ops.append(_attention(layers["head_size"], f'mask="{"chain" if sight.causal else "full"}"{scale}', why))
        else:
            own = f"window of {sight.window} before the anchor, block {'causal' if sight.causal else 'in both directions'}"
            ops.append(Op("(the engine's attention)", own, f"{why}; tree_attention counts a window from every row"))
    head = f"head={_HEADS[kind]}(rank {rank})" if kind else "head=None"
    mapped = config.get("draft_vocab_size") not in (None, config["vocab_size"])
    head += ", draft_to_target" if mapped else ""
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
        # Trees that choose their shape know no draft vocabulary.
        ops.append(Op("draft_tree", f'{head}, method="top_k", branching' if mapped else f'{head}, method="conditioned"', why))
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
    wide = next((tensor.shape[1] for name, tensor in tensors.items() if name.removeprefix("model.") == "fc.weight"), None)
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
        "layers": config.get("num_hidden_layers"),
        "hidden_size": hidden,
        "vocabulary": vocab,
        "draft_vocabulary": own,
        "drafts": config.get("ttt_length"),
        "norms": [key for key in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output") if config.get(key)],
        "round": _round_cost(config, tensors, 4) if tensors and "head_norms" in config else None,
        "adapters": ["bench.decode alone; vLLM's part accept, where vLLM itself runs the drafter"],
        "expects": {
            "layers": config.get("num_target_layers"), "layers_read": read, "num_layers_read": count, "hidden_size": target_hidden,
            "vocabulary": vocab, "shares_embedding": not any("embed_tokens.weight" in name for name in tensors), "shares_head": False,
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
        windows, causal = found["windows"], found["causal"]
        if any(windows):
            inside = "causal inside the block" if any(causal) else "both directions inside the block"
            yield "windows", f"{', '.join(str(window or 'none') for window in windows)} by layer, {inside}"
        yield "head", f"{found['head']}, rank {found['rank']}" if found["head"] else "none: positions are independent"
        confidence = found["confidence"]
        if confidence is None:
            yield "confidence", "none"
        else:
            reads = "hidden state and W1 of the token before" if confidence["reads_markov"] else "hidden state alone"
            yield "confidence", f"from {reads}, {'with' if confidence['calibrated'] else 'without'} STS temperatures"
    if found.get("norms"):
        yield "norms", ", ".join(found["norms"])
    if found.get("round"):
        cost = found["round"]
        passes = f"{cost['passes']} pass" + ("es" if cost["passes"] > 1 else "")
        context = f"{_size(cost['context_bytes_per_token'])} of keys and values per token"
        yield "a round", f"{passes}, {_size(cost['bytes'])} of weights read, {context}"
    for adapter in found.get("adapters", ()):
        yield "taken by", adapter
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
    own = [what for what in ("embedding", "head") if expects[f"shares_{what}"]]
    shares = f"; its {' and '.join(own)} {'is' if len(own) == 1 else 'are'} the drafter's too" if own else ""
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
