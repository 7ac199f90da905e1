"""Tokens a second through generate() on a GPU, with the drafts of an MTP module and without, by how many are right.

    python benchmarks/mtp_decode_gpu.py --out benchmarks/results/mtp_decode_gpu.json

The shape of OLMoE-1B-7B, and that with a dense network as wide as its experts of a token, with one module each, in
bf16, batch 1, greedy. Nothing is trained; still the module is right about a share of tokens that is chosen. The head's
rows are the embeddings in another order, and attention and experts, which are computed in full, add little to the
residual stream: each token is followed by its successor in that order. The module's projection passes on the embedding
that it reads, and with it noise of the hidden state, as much as the share leaves room for. Acceptance is counted on
the texts that are timed. Tokens are as good as random and choose experts of their own: a round reads nearly twice
those of a step, the most that it can cost. A dense network is read once.

Decoding speed is that of `new` tokens after a prefill: the time of generating 1 + new tokens less the time of
generating 1, over several prompts, after a text that records what is needed.
"""

import argparse
import gc
import json
from pathlib import Path

import torch
import transformers
from mla_decode_gpu import seconds

from hf_moe import HfMoeConfig, HfMoeForCausalLM
from hf_moe.version import __version__

SHAPE = HfMoeConfig.from_preset("olmoe-1b-7b")
DENSE = {
    "mlp_layer_types": ["dense"] * SHAPE.num_hidden_layers,
    "intermediate_size": SHAPE.num_experts_per_tok * SHAPE.moe_intermediate_size,
}
SHAPES = {"olmoe-1b-7b": {}, "dense": DENSE}
SHARES = (0.5, 0.7, 0.9)
LITTLE = 1e-3  # of what attention and experts with random weights would add


def build(config: HfMoeConfig, device: str, dtype: torch.dtype) -> HfMoeForCausalLM:
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = HfMoeForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
            weight.data.mul_(LITTLE)
    embeddings = model.get_input_embeddings().weight.data
    model.lm_head.weight.data.copy_(embeddings[torch.randperm(len(embeddings), device=device)])
    return model


def normed(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:])


@torch.no_grad()
def amount(model: HfMoeForCausalLM, noise: torch.Tensor, share: float) -> float:
    """How much of `noise` [D, D] leaves the module right about a `share` of random tokens; by bisection."""
    embeddings = model.get_input_embeddings().weight
    ids = torch.randint(3, len(embeddings), (2, 2048), device=embeddings.device)
    last, read = (normed(embeddings[row].float()) for row in ids)
    right, of_last = model.project(read.to(embeddings.dtype)).argmax(-1), last @ noise.T
    low, high = 0.0, 100.0
    for _ in range(16):
        middle = (low + high) / 2
        drafts = model.project(normed(read + middle * of_last).to(embeddings.dtype)).argmax(-1)
        low, high = (middle, high) if (drafts == right).float().mean() > share else (low, middle)
    return low


@torch.no_grad()
def teach(model: HfMoeForCausalLM, share: float) -> None:
    """Make the module right about a `share` of tokens."""
    weight = model.model.mtp_layers[0].eh_proj.weight  # of the embedding first, then of the hidden state
    size, generator = len(weight), torch.Generator(weight.device).manual_seed(1)
    noise = torch.randn(size, size, generator=generator, device=weight.device) / size**0.5
    weight[:, :size] = torch.eye(size, device=weight.device)
    weight[:, size:] = amount(model, noise, share) * noise


def measure(model: HfMoeForCausalLM, prompts: list[torch.Tensor], new: int, **options) -> float:
    """Seconds of `new` tokens behind all prompts."""
    seconds(model, prompts[0], 1 + new, **options)  # records
    return sum(seconds(model, ids, 1 + new, **options) - seconds(model, ids, 1, **options) for ids in prompts)


def counted(model: HfMoeForCausalLM, prompts: list[torch.Tensor], new: int) -> tuple[int, float]:
    """Rounds, and accepted drafts of all drafts, over the prompts' texts."""
    options = {"max_new_tokens": 1 + new, "do_sample": False, "use_mtp": True, "return_dict_in_generate": True}
    outs = [model.generate(ids, attention_mask=torch.ones_like(ids), **options) for ids in prompts]
    accepted, drafted = (sum(getattr(out, f"{name}_tokens") for out in outs) for name in ("accepted", "drafted"))
    return sum(out.forward_passes - 1 for out in outs), accepted / drafted


def compared(model: HfMoeForCausalLM, prompts: list[torch.Tensor], new: int) -> dict[str, dict[str, float]]:
    """Without drafts, and with those of which each share is right."""
    plain, tokens = measure(model, prompts, new), new * len(prompts)
    row = {"tokens_per_second": round(tokens / plain, 1), "step_microseconds": round(plain / tokens * 1e6, 1)}
    results = {"plain": row}
    for share in SHARES:
        teach(model, share)
        took = measure(model, prompts, new, use_mtp=True)
        rounds, acceptance = counted(model, prompts, new)
        row = {"acceptance": round(acceptance, 3), "tokens_per_second": round(tokens / took, 1)}
        row |= {"speedup": round(plain / took, 2), "round_microseconds": round(took / rounds * 1e6, 1)}
        row["round_in_steps"] = round(took / rounds / (plain / tokens), 3)
        results[f"drafts, {share:.0%} right"] = row
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--new", type=int, default=384)
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    args = parser.parse_args()
    versions = {"hf_moe": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    report = {"device": torch.cuda.get_device_name(), "versions": versions}
    report |= {"context": args.context, "new": args.new, "results": {}}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name in args.shapes:
        config = HfMoeConfig.from_preset("olmoe-1b-7b", num_mtp_layers=1, eos_token_id=None, **SHAPES[name])
        model = build(config, "cuda", torch.bfloat16)
        prompts = [torch.randint(3, config.vocab_size, (1, args.context), device="cuda") for _ in range(args.prompts)]
        report["results"][name] = compared(model, prompts, args.new)
        for title, row in report["results"][name].items():
            print(f"{name:12s} {title:20s} {row}", flush=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n")
        del model
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
