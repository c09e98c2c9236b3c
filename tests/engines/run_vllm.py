"""vLLM with DSpark on a CPU: its own sampling, and the ops through the plug-in, in one engine. Run by run_vllm.sh.

Compares greedy ids with the golden ids, rounds and emitted tokens, a batch of greedy and sampled requests, seeds, and the distribution of
sampled tokens (own against ours, and both against the target's exact distribution).
"""

import argparse
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_USE_V2_MODEL_RUNNER="1", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_NO_USAGE_STATS="1", VLLM_DO_NOT_TRACK="1", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", OMP_NUM_THREADS="1",
    TRITON_INTERPRET="1", VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
)  # fmt: skip
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("models", type=Path, help="directory with target/, draft/ and greedy_cases.json")
parser.add_argument("--samples", type=int, default=64, help="sampled requests per combination")
arguments = parser.parse_args()
started = time.time()

import triton.backends  # noqa: E402


class _Inactive:
    @staticmethod
    def is_active():
        return False


# vLLM asks Triton for a backend of this name; the interpreter needs none.
triton.backends.backends["cpu"] = SimpleNamespace(driver=_Inactive, compiler=None)

import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton.language as tl  # noqa: E402
import triton.runtime.interpreter as interpreter  # noqa: E402

from dspark_kernels.testing.interpreter import repair  # noqa: E402

torch.set_num_threads(1)
repair()


def _with_bool_mask(function, place):
    """Some kernels of vLLM have masks of integers, which Triton compiles and its interpreter refuses."""

    def wrapped(self, *args):
        mask = args[place]
        if mask.data.dtype != np.bool_:
            mask.data = mask.data.astype(np.bool_)
        return function(self, *args)

    return wrapped


builder = interpreter.InterpreterBuilder
builder.create_masked_store = _with_bool_mask(builder.create_masked_store, 2)
builder.create_masked_load = _with_bool_mask(builder.create_masked_load, 1)

import vllm  # noqa: E402
import vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils as own_kernels  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402

import dspark_kernels.integrations.vllm as adapter  # noqa: E402

# The interpreter has no libdevice, of which vLLM's own kernels use this.
own_kernels.tldevice = SimpleNamespace(log1p=lambda x: tl.log(1.0 + x))

print("vllm", vllm.__version__, "torch", torch.__version__, "triton", triton.__version__, flush=True)
counts = dict.fromkeys(("accept_chain", "draft_block", "rounds", "emitted"), 0)


def _counted(name, function):
    def wrapped(*args, **kwargs):
        counts[name] += 1
        return function(*args, **kwargs)

    return wrapped


adapter.accept_chain = _counted("accept_chain", adapter.accept_chain)
adapter.draft_block = _counted("draft_block", adapter.draft_block)
models = arguments.models
llm = LLM(
    model=str(models / "target"), skip_tokenizer_init=True, dtype="float32", max_model_len=256, max_num_seqs=8,
    max_num_batched_tokens=256, enforce_eager=True, enable_prefix_caching=False, seed=0,
    speculative_config=dict(
        method="dspark", model=str(models / "draft"), num_speculative_tokens=7, draft_sample_method="probabilistic"
    ),
)  # fmt: skip
runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
sampler = runner.rejection_sampler
print(f"engine started in {time.time() - started:.0f} s; rejection sampler: {type(sampler).__name__}", flush=True)
parts = {"accept": sampler.part, "draft": adapter._parts["draft"]}
verify = type(sampler)._verify


def _verify(self, *args):
    result = verify(self, *args)
    counts["rounds"] += len(result[2])
    counts["emitted"] += int(result[2].sum())
    return result


type(sampler)._verify = _verify


def generate(title, requests, params, ours):
    """Token ids of every request; a part that is switched off is the engine's own."""
    for name, part in parts.items():
        part.failed = name not in ours
    for name in counts:
        counts[name] = 0
    begun = time.time()
    outputs = llm.generate([dict(prompt_token_ids=prompt) for prompt in requests], params, use_tqdm=False)
    kind = " and ".join(ours) or "nothing"
    for name in ours:
        assert not parts[name].failed, f"{name} fell back"
        assert counts["accept_chain" if name == "accept" else "draft_block"], f"{name} was never called"
    print(f"{title} [ours: {kind}]: {counts}, {time.time() - begun:.0f} s", flush=True)
    return [list(output.outputs[0].token_ids) for output in outputs]


def params(temperature, tokens, seed=None, **more):
    return SamplingParams(temperature=temperature, max_tokens=tokens, ignore_eos=True, detokenize=False, seed=seed, **more)


cases = json.loads((models / "greedy_cases.json").read_text())
cases = cases if isinstance(cases, list) else cases["cases"]
cases = cases[2:6:2]
prompts = [case["prompt"] for case in cases]
golden = [case["output_ids"][len(case["prompt"]) :][:16] for case in cases]
good = True


def say(what, holds):
    global good
    good = good and holds
    print(f"  {what}: {holds}", flush=True)


emitted = {}
for ours in ((), ("accept",), ("draft",), ("accept", "draft")):
    say("greedy ids equal the golden ids", generate("greedy", prompts, params(0, 16), ours) == golden)
    emitted[ours] = counts["rounds"], counts["emitted"]
say("rounds and emitted tokens are the same in all four", len(set(emitted.values())) == 1)

both = ("accept", "draft")
mixed = [params(0.0, 8), *(params(0.9, 8, seed=5) for _ in range(3))]
first = generate("greedy and sampled", [prompts[0]] + [prompts[1]] * 3, mixed, both)
again = generate("the sampled ones in other rows", [prompts[1], prompts[0]], [mixed[1], mixed[0]], both)
say("the greedy request has the golden ids", first[0] == golden[0][:8] == again[1])
say("one seed gives one text, in any row and batch", first[1] == first[2] == first[3] == again[0])
other = generate("other seeds", [prompts[1]] * 3, [params(0.9, 8, seed=seed) for seed in (6, 7, 8)], both)
say("other seeds give other texts", len({tuple(text) for text in other}) > 1)

# The first token comes from the prefill, which is the engine's own; the second and third are verified.
samples = arguments.samples
texts_by = {}
for ours in ((), both):
    settings = [params(0.9, 3, seed=1000 + i, top_k=12) for i in range(samples)]
    texts_by[ours] = generate("sampled", [prompts[1]] * samples, settings, ours)


def exact(prefixes):
    """The target's distribution after each prefix, temperature 0.9 and top-k 12: [n, V] float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models / "target", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = torch.stack([model(torch.tensor([prefix])).logits[0, -1].double() for prefix in prefixes]) / 0.9
    edge = logits.topk(12).values[:, -1:]
    return torch.where(logits >= edge, logits, -torch.inf).softmax(-1)


for ours, texts in texts_by.items():
    # Of every verified token, given its own prefix: the randomised distribution function, uniform where the tokens are right.
    generator = torch.Generator().manual_seed(0)
    prefixes = [prompts[1] + text[:n] for text in texts for n in (1, 2)]
    tokens = torch.tensor([text[n] for text in texts for n in (1, 2)])
    probs = exact(prefixes)
    chosen = probs.gather(1, tokens[:, None])[:, 0]
    before = probs.cumsum(1).gather(1, tokens[:, None])[:, 0] - chosen
    uniform = (before + chosen * torch.rand(len(tokens), generator=generator, dtype=torch.float64)).clamp(0, 1 - 1e-12)
    bins = torch.bincount((uniform * 8).long(), minlength=8).double()
    expected = len(tokens) / 8
    chi_square = float(((bins - expected) ** 2 / expected).sum())
    name = " and ".join(ours) or "the engine's own"
    print(f"  {name}: {len(tokens)} verified tokens, chi-square {chi_square:.1f} of 7 degrees", flush=True)
    say("no token outside the support", bool((chosen > 0).all()))
    say("chi-square below 24.3 (1 in 1000)", chi_square < 24.3)
print(f"done in {time.time() - started:.0f} s; all hold: {good}")
raise SystemExit(0 if good else 1)
