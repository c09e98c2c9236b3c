"""Token ids of the prompts: embedded text, or what --prompts holds."""

from __future__ import annotations

from bench import assets
from bench.decode.models import Models, naming
from bench.shared.command import BadArgument


def read_prompts(arguments, models: Models) -> list[list[int]]:
    """Token ids of every prompt. Raises BadArgument."""
    if arguments.prompts is None:
        prompts = assets.prompts()
        if models.encode is None:
            raise BadArgument(
                "--prompts: expected a JSON list of token-id lists, for --model has no tokenizer.json that can be read"
                " (reading one needs: pip install tokenizers)"
            )
    else:
        prompts = arguments.prompts
    count = arguments.num_prompts
    if count is not None and count > len(prompts):
        raise BadArgument(f"--num-prompts: expected at most {len(prompts)}, which is all there are, got {count}")
    vocab = models.target.shape.vocab
    result = []
    for index, prompt in enumerate(prompts[:count]):
        if arguments.chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if arguments.chat and isinstance(prompt, list) and prompt and all(isinstance(turn, dict) for turn in prompt):
            with naming("--prompts", f"prompt {index}: "):
                prompt = models.chat(prompt)
        if isinstance(prompt, str):
            if models.encode is None:
                raise BadArgument(f"--prompts: prompt {index} is text, but the model has no tokenizer that can be read")
            prompt = models.encode(prompt)
        if not isinstance(prompt, list) or not prompt or not all(type(t) is int and 0 <= t < vocab for t in prompt):
            raise BadArgument(f"--prompts: prompt {index}: expected text or a list of ids from 0 to {vocab - 1}, at least one")
        result.append(prompt)
    return result
