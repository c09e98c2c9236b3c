"""A target run by its own class of Hugging Face transformers, in the shape that the decoding loop takes.

    logits = cap * tanh(head(hidden) / cap), or head(hidden) where the config has no cap

The interface is that of reference/model.Target, for any causal language model whose cache can give up rows: full or sliding-window
attention. Every slot has its own cache and every request of a pass is a call of its own, so that nothing depends on the batch. A
layer's output is what the layer returns, also for the last layer (transformers' own `hidden_states` end with the final norm
instead). When a model is loaded, the logits of its head are compared once with those of the whole model.

transformers is imported on demand (the extra `transformers`). Nothing is downloaded, and no code from a directory is run.

Symbols: S slots, n rows, d hidden size, V vocabulary. Source: Hugging Face transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dspark_kernels.checkpoint import files, rope

from .model import Output, Rows

_ATTENTION = {"full_attention", "sliding_attention"}
_HEAD_ERROR = 1e-2  # of the largest logit; what another head computes is off by more than a rounding of bf16


class Sizes(NamedTuple):
    hidden: int
    layers: int
    vocab: int


class SlotCaches:
    """A transformers cache for each of S slots."""

    def __init__(self, make: Callable, slots: int):
        self._make, self._caches = make, [make() for _ in range(slots)]

    @property
    def lengths(self) -> list[int]:
        """Cached positions of every slot."""
        return [cache.get_seq_length() for cache in self._caches]

    def __getitem__(self, slot: int):
        return self._caches[slot]

    def crop(self, slot: int, length: int) -> None:
        """Keep the first `length` positions of a slot. Raises ValueError where fewer are cached."""
        cached = self._caches[slot].get_seq_length()
        if not 0 <= length <= cached:
            raise ValueError(f"length: expected 0 to {cached} (cached), got {length}")
        if length == 0:
            self._caches[slot] = self._make()
        elif length < cached:
            self._caches[slot].crop(length - cached)  # from the end: newer versions of transformers take nothing else


class HuggingFaceTarget:
    """A causal language model of transformers.

    Raises ValueError for a model whose cache cannot be cut, or whose logits are more than its head (and cap) of its last state.
    """

    def __init__(self, model):
        self._model, self._decoder, self._layers = model.eval(), model.get_decoder(), _layers(model)
        text = model.config.get_text_config(decoder=True)
        self.config = text.to_dict()
        kinds = set(self.config.get("layer_types") or _ATTENTION)
        if getattr(model, "_is_stateful", False) or not kinds <= _ATTENTION:
            kinds = ", ".join(sorted(kinds - _ATTENTION)) or "a recurrent state"
            raise ValueError(f"{type(model).__name__}: expected full or sliding attention, which can forget drafts, got {kinds}")
        self._head, self._cap = model.get_output_embeddings(), self.config.get("final_logit_softcapping")
        self.head = self._head.weight
        self.device, self.dtype = self.head.device, self.head.dtype
        self.shape = Sizes(self.head.shape[1], len(self._layers), self.head.shape[0])
        self._seen: dict[int, Tensor] = {}
        self._layers[0].register_forward_pre_hook(self._see_embedding, with_kwargs=True)
        for index, layer in enumerate(self._layers):
            layer.register_forward_hook(lambda module, inputs, output, index=index: self._see(index, output))
        self._check_head()

    @property
    def embedding(self) -> Tensor:
        """The embedding, for drafters without one of their own. Raises ValueError where the class does more than look it up."""
        module = self._model.get_input_embeddings()
        if type(module) is not torch.nn.Embedding:
            raise ValueError(f"drafter: expected an embedding of its own, for the target's is a {type(module).__name__}")
        return module.weight

    def new_cache(self, slots: int, new_cache=None) -> SlotCaches:
        """new_cache: what the loop gives to models that attend through its ops; a class of transformers brings its own."""
        return SlotCaches(_transformers().DynamicCache, slots)

    @torch.no_grad()
    def forward(self, token_ids: Tensor, rows: Rows, cache: SlotCaches, feature_layers: Sequence[int] = ()) -> Output:
        """One pass, as reference.model.Target.forward."""
        if rows.ancestors is not None:
            raise ValueError("rows: expected chains, got the rows of draft trees, for which transformers has no mask")
        hidden, pre_norm, features = [], [], []
        for slot, start, begin, end in rows.segments:
            cache.crop(slot, start)
            self._seen.clear()
            result = self._decoder(
                input_ids=token_ids[None, begin:end],
                position_ids=rows.positions[None, begin:end],
                past_key_values=cache[slot],
                use_cache=True,
            )
            hidden.append(result.last_hidden_state[0])
            pre_norm.append(self._seen[self.shape.layers - 1][0])
            if feature_layers:
                features.append(torch.cat([self._seen[layer][0] for layer in feature_layers], -1))
        return Output(torch.cat(hidden), torch.cat(pre_norm), torch.cat(features) if features else None)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """[n, d] (after the final norm) -> [n, V]."""
        logits = self._head(hidden)
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap

    def _see_embedding(self, module, inputs, named):
        self._seen[-1] = inputs[0] if inputs else named["hidden_states"]

    def _see(self, index: int, output):
        self._seen[index] = output if isinstance(output, Tensor) else output[0]

    @torch.no_grad()
    def _check_head(self) -> None:
        token_ids = torch.arange(min(4, self.shape.vocab), device=self.device)
        rows = Rows.of([(0, 0, len(token_ids))], self.device)
        own = self.logits(self.forward(token_ids, rows, self.new_cache(1)).hidden)
        whole = self._model(input_ids=token_ids[None], position_ids=rows.positions[None]).logits[0]
        if own.shape != whole.shape or not (own - whole).abs().max() <= _HEAD_ERROR * whole.abs().max():
            raise ValueError(f"{type(self._model).__name__}: expected logits that are the head of the last state, got others")


def load(directory, device="cpu", dtype=torch.float32) -> HuggingFaceTarget:
    """The causal language model of a directory.

    Raises:
        FileNotFoundError: no such directory, no config.json, or a shard is missing.
        ValueError: a directory that no class of transformers reads, tensors missing from it, places of its config that
            contradict each other about RoPE, files that contradict its index, and what HuggingFaceTarget refuses.
        ImportError: transformers is not installed.
    """
    directory, transformers = Path(directory), _transformers()
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory")
    # transformers reads RoPE from one place and tensors from whole files: what it does not look at has to say the same.
    rope.check(files.read_json(directory / "config.json"), directory / "config.json")
    files.check_whole_files(directory)
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:  # what transformers raises for directories it cannot read
        raise ValueError(f"{directory}: transformers {transformers.__version__} cannot read it: {error}") from None
    # transformers initialises at random what a directory lacks.
    missing = sorted(found["missing_keys"])
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ValueError(f"{directory}: expected the tensor {missing[0]}{more} of {type(model).__name__}, found none")
    return HuggingFaceTarget(model.to(device))


class Text(NamedTuple):
    """A tokenizer's two directions; chat: ids of a conversation up to where the model answers, None without a chat template."""

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    chat: Callable[[list[dict]], list[int]] | None
    stop_token: int | None


def load_text(directory, thinking: bool = False) -> Text | None:
    """The tokenizer of a directory, None where it has none. thinking: the value of `enable_thinking` for templates that use it.

    Raises ImportError where transformers is not installed, ValueError for a tokenizer that it cannot read.
    """
    directory, transformers = Path(directory), _transformers()
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ValueError(f"{directory}: transformers {transformers.__version__} cannot read its tokenizer: {error}") from None

    def chat(messages):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
        return tokenizer(text, add_special_tokens=False).input_ids  # the template writes special tokens itself

    template = getattr(tokenizer, "chat_template", None)
    return Text(lambda text: tokenizer(text).input_ids, tokenizer.decode, chat if template else None, tokenizer.eos_token_id)


def _layers(model):
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, torch.nn.ModuleList):
        raise ValueError(f"{type(model).__name__}: expected a decoder with a list of layers, found none")
    return layers


def _transformers():
    try:
        import transformers
    except ImportError:
        raise ImportError(
            "running a target by its own class needs transformers: pip install dspark_kernels[transformers]"
        ) from None
    return transformers
