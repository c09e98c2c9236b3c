"""Models for bench.decode: the embedded ones, or checkpoint directories with their tokenizer, chat template and stop tokens."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench import assets
from bench.shared.command import BadArgument, first_line
from dspark_kernels.checkpoint import formats, load_drafter, load_eagle3, load_target, read_config, stop_tokens
from dspark_kernels.types import CostTable
from reference import huggingface
from reference.drafters import MTP, Block, Drafter, DraftModel, DSpark, Eagle3
from reference.model import Target

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


class naming:
    """Turn every error inside into a BadArgument of this option."""

    def __init__(self, option: str, what: str = ""):
        self.option, self.what = option, what

    def __enter__(self):
        pass

    def __exit__(self, kind, error, trace):
        if isinstance(error, (OSError, ValueError, ImportError)):
            raise BadArgument(f"{self.option}: {self.what}{first_line(error)}") from None


@dataclasses.dataclass(frozen=True)
class Models:
    """A target and the drafters that serve it."""

    target: Target
    exact: Callable[[], Target]  # the target in fp64, made when asked for
    drafters: list[tuple[str, str, Callable[[], Drafter]]]  # (system, where it comes from, how it is made)
    encode: Callable[[str], list[int]] | None
    decode: Callable[[Sequence[int]], str]
    chat: Callable[[list[dict]], list[int]] | None = None  # ids of a conversation, where there is a chat template
    stop_tokens: tuple[int, ...] = ()
    cost: CostTable | None = None  # times of the target's step, on its device


def load(arguments) -> Models:
    """The models that the arguments ask for. Raises BadArgument."""
    device, dtype = arguments.device, DTYPES[arguments.dtype]
    if arguments.model is None:
        config, tensors = assets.weights("target")
        target = Target(config, tensors, device, dtype)
        kinds = {"draft-model": DraftModel, "mtp": MTP, "block": Block, "dspark": DSpark}
        drafters = [
            (name, "", lambda kind=kind, name=name: kind(*assets.weights(name.replace("-", "_")), target))
            for name, kind in kinds.items()
        ]
        tokenizer = assets.tokenizer()
        return Models(
            target,
            lambda: Target(config, tensors, device, torch.float64),
            drafters,
            tokenizer.encode,
            tokenizer.decode,
            cost=_cost(arguments.cost or assets.COST, device),
        )
    with naming("--model"):
        make_target = _target(arguments, device)
        target = make_target(dtype)
    drafters = []
    for path in arguments.drafter:
        with naming("--drafter"):
            system, make = _drafter(path, target)
        several = len(arguments.drafter) > 1
        drafters.append((system, Path(path).name if several else "", make))
    with naming("--model"):
        text = _text(arguments)
        stops = stop_tokens(arguments.model)
    if arguments.chat and not stops and text.stop_token is not None:
        stops = (text.stop_token,)
    return Models(
        target,
        lambda: make_target(torch.float64),
        drafters,
        text.encode,
        text.decode,
        text.chat,
        () if arguments.ignore_stop_tokens else stops,
        None if arguments.cost is None else _cost(arguments.cost, device),
    )


def _target(arguments, device) -> Callable[[torch.dtype], Target]:
    """The target of a directory, to be made in any dtype: by transformers' class or by the reference's."""
    path = arguments.model
    if not arguments.transformers:
        checkpoint = load_target(path)
        return lambda dtype: Target(checkpoint.config, checkpoint.tensors, device, dtype)
    config = read_config(path)
    names = config.get("architectures") or [None]
    # transformers would read a drafter as the language model that its model_type names.
    if names[0] in formats.DRAFTERS or formats.other(config):
        raise ValueError(f"{path}: expected a causal language model, got {formats.described(config)}")
    return lambda dtype: huggingface.load(path, device, dtype)


def _cost(path, device) -> CostTable:
    with naming("--cost"):
        return CostTable.load(path, device)


def _drafter(path: str, target: Target) -> tuple[str, Callable[[], Drafter]]:
    """What a drafter directory holds: a language model, an EAGLE-3 drafter, or a block drafter with or without a sequential head."""
    try:
        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
        config = config if isinstance(config, dict) else {}
    except (OSError, ValueError):
        config = {}  # load_drafter says what is wrong
    if formats.is_eagle3(config):
        checkpoint = load_eagle3(path)
        drafter = Eagle3(checkpoint.config, checkpoint.tensors, target)
        return "eagle3", lambda: drafter
    if formats.of(config, formats.TARGETS) is not None:
        checkpoint = load_target(path)
        drafter = DraftModel(checkpoint.config, checkpoint.tensors, target)
        return "draft-model", lambda: drafter
    if formats.is_language_model(config):
        drafter = DraftModel.of(huggingface.load(path, target.device, target.dtype), target)
        return "draft-model", lambda: drafter
    checkpoint = load_drafter(path)
    kind = DSpark if checkpoint.head is not None or checkpoint.confidence is not None else Block
    drafter = kind(checkpoint.config, checkpoint.tensors, target)
    return ("dspark" if kind is DSpark else "block"), lambda: drafter


def _text(arguments) -> huggingface.Text:
    """The tokenizer of a checkpoint directory; without one, no encoder, and ids as text."""
    if arguments.transformers or arguments.chat:
        text = huggingface.load_text(arguments.model, arguments.thinking)
        if arguments.chat and (text is None or text.chat is None):
            raise ValueError(f"{arguments.model}: expected a tokenizer with a chat template for --chat, found none")
        if text is not None:
            return text
    return huggingface.Text(*_tokenizer(Path(arguments.model)), None, None)


def _tokenizer(model: Path):
    """Encoder and decoder of a tokenizer.json; without one, none, and ids as text."""
    file = model / "tokenizer.json"
    if file.is_file():
        try:
            from tokenizers import Tokenizer
        except ImportError:
            pass
        else:
            with naming("--model"):
                tokenizer = Tokenizer.from_file(str(file))
            return (lambda text: tokenizer.encode(text).ids), tokenizer.decode
    return None, lambda token_ids: "".join(f" {token}" for token in token_ids)
