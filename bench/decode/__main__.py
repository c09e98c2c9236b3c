"""Compare ways of decoding on real text: plain, speculative with a draft model, MTP, blockwise parallel, DSpark.

All systems run the same loop, target, prompts and sampling; they differ in the drafter and in whether it drafts a chain or a tree.
The nodes of a tree are chosen deterministically and verified by the walk, or drawn ("sampled"); beside each tree is the chain that
verifies as many rows. Without arguments the embedded demo models continue held-out Python source. The command prints a table per
temperature, then whether each system's output is the target's own. To see what a checkpoint holds: python -m bench.inspect DIR.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench.decode.settings import DEFAULTS, INTERPRETED, LIVE, LIVE_PACE, LIVE_SECONDS, PACES, POLICIES, RULES, SYSTEMS, check
from bench.shared import command, summary
from bench.shared.source import literal


def parser() -> command.Parser:
    p = command.Parser("bench.decode", f"{__doc__}\ncolumns:\n{summary.legend()}")
    models = p.add_argument_group("models")
    models.add_argument(
        "--model", "--target", metavar="DIR",
        help="target checkpoint (Qwen3ForCausalLM; any causal language model with --transformers; default: the embedded one)",
    )  # fmt: skip
    models.add_argument(
        "--transformers", action="store_true",
        help="run the target by its own class of Hugging Face transformers (pip install dspark_kernels[transformers])",
    )  # fmt: skip
    models.add_argument(
        "--drafter", metavar="DIR", action="append", default=[],
        help="drafter checkpoint for --model: DSpark, DFlash, EAGLE-3 (docs/checkpoints.md), or a causal language model as draft model"
        " (repeatable)",
    )  # fmt: skip
    models.add_argument("--device", default="cpu", help="where the models run (default: %(default)s)")
    models.add_argument(
        "--dtype",
        choices=literal("bench.decode.models", "DTYPES"),
        default="float32",
        help="what they compute in (default: %(default)s)",
    )
    work = p.add_argument_group("what is decoded")
    work.add_argument(
        "--prompts", metavar="FILE",
        help="a text file, which is one prompt, or a JSON list of token-id lists or of strings; text needs a tokenizer (default:"
        " embedded text)",
    )  # fmt: skip
    work.add_argument(
        "--chat", action="store_true",
        help="strings are a user's messages: the model's chat template is put around them (needs transformers; a list of objects"
        " with role and content is a conversation)",
    )  # fmt: skip
    work.add_argument("--thinking", action="store_true", help="what --chat tells a template that knows enable_thinking")
    work.add_argument(
        "--ignore-stop-tokens", action="store_true",
        help="go on to --max-new-tokens (default: end at what the model's generation_config.json names, or with --chat its"
        " tokenizer)",
    )  # fmt: skip
    work.add_argument(
        "--num-prompts", type=int, metavar="N",
        help=f"use the first N (default: {DEFAULTS['num_prompts']}, with --kernels on a CPU {INTERPRETED['num_prompts']}, with --live"
        f" {LIVE['num_prompts']}; all of --prompts)",
    )  # fmt: skip
    work.add_argument(
        "--max-new-tokens", type=int, metavar="N",
        help=f"default: {DEFAULTS['max_new_tokens']}, with --kernels on a CPU {INTERPRETED['max_new_tokens']}, with --live"
        f" {LIVE['max_new_tokens']}",
    )  # fmt: skip
    work.add_argument(
        "--temperature", type=float, action="append", metavar="T", help="0 is greedy (repeatable; default: 1 and 0, with --live 0)"
    )
    work.add_argument("--seed", type=int, default=0, help="of all noise (default: %(default)s)")
    how = p.add_argument_group("how")
    how.add_argument(
        "--systems", metavar="NAME[,NAME]",
        help=f"any of {', '.join(SYSTEMS)} (default: all there are; of --model, trees only where named)",
    )  # fmt: skip
    how.add_argument("--rule", choices=RULES, default="token", help="acceptance rule of chains (default: %(default)s)")
    how.add_argument(
        "--tree-nodes", type=int, action="append", metavar="M",
        help="nodes of trees, the anchor included (repeatable; default: 16, of dspark-tree 16 and 32, with --kernels on a CPU 16)",
    )  # fmt: skip
    how.add_argument(
        "--confidence-threshold", type=float, action="append", metavar="T",
        help="of dspark: 0 verifies the whole block, T up to the first draft whose confidence is below T"
        " (repeatable, a row each; default: 0 and 0.3, with --live 0)",
    )  # fmt: skip
    how.add_argument(
        "--cost", metavar="FILE",
        help="a row of dspark scheduled by these times of a step (JSON of CostTable.save; default: measured ones of the embedded"
        " models on two CPU cores, none with --model)",
    )  # fmt: skip
    how.add_argument("--policy", choices=POLICIES, default="causal", help="how that row is scheduled (default: %(default)s)")
    how.add_argument(
        "--batch-size", type=int, metavar="N",
        help=f"requests at once (default: {DEFAULTS['batch_size']}, with --live {LIVE['batch_size']})",
    )  # fmt: skip
    how.add_argument(
        "--kernels", action="store_true",
        help="run dspark and trees through the Triton ops too, and compare with the reference (on a CPU: in Triton's interpreter)",
    )  # fmt: skip
    out = p.add_argument_group("output")
    out.add_argument(
        "--out",
        "--json",
        metavar="FILE",
        help="write every run as JSON: output_ids, acceptance_lengths, proposal_lengths, and what engines report"
        " (mean_acceptance_length, draft_acceptance_rate, acceptance_histogram)",
    )
    out.add_argument(
        "--show", action="store_true", help="print the texts of the last system: accepted drafts green, the target's own red"
    )
    live = p.add_argument_group("live")
    live.add_argument(
        "--live", action="store_true",
        help="then show the tokens as they came, plain decoding beside the first other system (default: dspark), with accepted drafts"
        " green and the target's own tokens red, or in brackets where there is no colour (pip install dspark_kernels[live])",
    )  # fmt: skip
    live.add_argument(
        "--pace", choices=PACES,
        help="measured: rounds last as long as they did, in proportion; passes: all rounds equally long, as where the target's pass is"
        f" all that takes time (default: {LIVE_PACE})",
    )  # fmt: skip
    live.add_argument("--seconds", type=float, metavar="S", help=f"how long the slower column takes (default: {LIVE_SECONDS:g})")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """0: done and lossless; 1: a system's output is not the target's; 2: a bad argument; 130: stopped."""
    return command.run(parser, check, "bench.decode.work", argv)


if __name__ == "__main__":
    sys.exit(main())
