"""Tokens a second through generate() on a GPU, with the drafts of an MTP module and without, by how many are right.

    python benchmarks/mtp_decode_gpu.py --out benchmarks/results/mtp_decode_gpu.json

The shape of OLMoE-1B-7B with one module in bf16, batch 1, greedy. Nothing is trained; still the module is right about
a share of tokens that is chosen. The head's rows are the embeddings in another order, and attention and experts, which
are computed in full, add little to the residual stream: each token is followed by its successor in that order. The
module's projection passes on the embedding that it reads, and with it noise of the hidden state, as much as the share
leaves room for. Acceptance is counted on the texts that are timed. Tokens are as good as random and choose experts of
their own: a round reads nearly twice those of a step, which is the most that it can cost.

Decoding speed is that of `new` tokens after a prefill: the time of generating 1 + new tokens less the time of
generating 1, over several prompts, after a text that records what is needed.
"""

import argparse
import json
from pathlib import Path

import torch
import transformers
from mla_decode_gpu import seconds

from hf_moe import HfMoeConfig, HfMoeForCausalLM
from hf_moe.version import __version__

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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--new", type=int, default=384)
    parser.add_argument("--prompts", type=int, default=5)
    args = parser.parse_args()
    config = HfMoeConfig.from_preset("olmoe-1b-7b", num_mtp_layers=1, eos_token_id=None)
    model = build(config, "cuda", torch.bfloat16)
    prompts = [torch.randint(3, config.vocab_size, (1, args.context), device="cuda") for _ in range(args.prompts)]
    plain, tokens = measure(model, prompts, args.new), args.new * args.prompts
    row = {"tokens_per_second": round(tokens / plain, 1), "step_microseconds": round(plain / tokens * 1e6, 1)}
    results = {"plain": row}
    print("plain", row, flush=True)
    for share in SHARES:
        teach(model, share)
        took = measure(model, prompts, args.new, use_mtp=True)
        rounds, acceptance = counted(model, prompts, args.new)
        row = {"acceptance": round(acceptance, 3), "tokens_per_second": round(tokens / took, 1)}
        row |= {"speedup": round(plain / took, 2), "round_microseconds": round(took / rounds * 1e6, 1)}
        row["round_in_steps"] = round(took / rounds / (plain / tokens), 3)
        results[f"drafts, {share:.0%} right"] = row
        print(f"drafts, {share:.0%} right", row, flush=True)
    versions = {"hf_moe": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    report = {"device": torch.cuda.get_device_name(), "versions": versions}
    report |= {"context": args.context, "new": args.new, "results": results}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
