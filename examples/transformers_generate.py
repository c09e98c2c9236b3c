"""Speculative decoding in Hugging Face transformers: model.generate with a DSpark drafter, and what it accepted.

    python examples/transformers_generate.py                                     the embedded models of bench/assets
    python examples/transformers_generate.py Qwen3-4B dspark_qwen3_4b_block7     directories of a target and its drafter

Needs pip install dspark_kernels[transformers]. Without a GPU the kernels run in Triton's interpreter, slowly.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # set before Triton is imported

import transformers  # noqa: E402

from dspark_kernels.integrations.transformers import DSpark  # noqa: E402

PROMPTS = ["    def __repr__(self):\n        return ", "import os\nimport "]


# docs/engine-transformers.md: begin
def generate(model, drafter_directory, inputs, **options):
    dspark = DSpark.from_pretrained(drafter_directory, target=model)
    texts = model.generate(**inputs, **options, custom_generate=dspark)
    return texts, dspark.statistics


# docs/engine-transformers.md: end


def directories(target: str, drafter: str):
    """A model, its tokenizer's two directions, and a drafter's directory."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=dtype).to(DEVICE).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    return model, lambda text: tokenizer(text).input_ids, tokenizer.decode, drafter


def embedded(folder: Path):
    """The same of the models in this repository, whose drafter is written into a folder as published ones are."""
    from safetensors.torch import save_file

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from bench import assets

    config, tensors = assets.weights("target")
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config, eos_token_id=None, bos_token_id=None))
    model.load_state_dict({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    config, own = assets.weights("dspark")
    embedding = tensors["model.embed_tokens.weight"]
    (folder / "config.json").write_text(assets.json.dumps({"tie_word_embeddings": False, **config}))
    save_file({**own, "embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}, folder / "model.safetensors")
    tokenizer = assets.tokenizer()
    return model.to(DEVICE).eval(), tokenizer.encode, tokenizer.decode, folder


def main(arguments: list[str], max_new_tokens: int = 24) -> list[str]:
    """Prints and returns the texts of PROMPTS, one batch."""
    with tempfile.TemporaryDirectory() as folder:
        model, encode, decode, drafter = directories(*arguments) if arguments else embedded(Path(folder))
        ids = [encode(prompt) for prompt in PROMPTS]
        width = max(map(len, ids))
        inputs = dict(
            input_ids=torch.tensor([[0] * (width - len(row)) + row for row in ids], device=DEVICE),
            attention_mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=DEVICE),
        )
        texts, statistics = generate(model, drafter, inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0)
    decoded = [decode(text[width - len(row) :].tolist()) for text, row in zip(texts, ids, strict=True)]
    for text in decoded:
        print(f"--- {text}")
    print(f"--- {statistics.tokens_per_round:.2f} tokens a round; accepted by position:", end="")
    print("".join(f" {share:.0%}" for share in statistics.acceptance_by_position))
    return decoded


if __name__ == "__main__":
    main(sys.argv[1:])
