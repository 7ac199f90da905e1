"""A tiny DeepSeek-V3 after ten minutes on two cores: what it learned, its experts' loads, what its drafts save.

    python benchmarks/tiny_v3.py --stories FOLDER --tokenizer FOLDER --out benchmarks/results/tiny_v3.json

Latent attention, sigmoid router with a selection bias that MoeTrainer moves, sequence-wise balance loss, a shared
expert, one module for multi-token prediction. FOLDER holds train.jsonl and val.jsonl, whose rows have a "text";
the held-out stories are those of val.jsonl. A .md with the tables comes to stand beside the .json.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer, TrainerCallback

from hf_moe import HfMoeConfig, HfMoeForCausalLM, MoeTrainer, MoeTrainingArguments
from hf_moe.version import __version__

EXPERTS, TOP_K = 8, 2
V3 = {
    "attention_type": "mla",
    "num_attention_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "rope_interleave": True,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "n_shared_experts": 1,
    "router_type": "sigmoid_topk",
    "router_args": {"selection_bias": True},
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "router_aux_loss_coef": 0.0,
    "seq_aux_loss_coef": 1e-4,
    "num_mtp_layers": 1,
    "mtp_loss_coef": 0.3,
    "tie_word_embeddings": True,
    "pad_token_id": None,
}


class Deadline(TrainerCallback):
    """Ends training after so many seconds of computing, summed over cores: what else runs there does not count."""

    def __init__(self, seconds: float):
        self.end = time.process_time() + seconds

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= time.process_time() > self.end


def read(path: Path, tokenizer) -> list[torch.Tensor]:
    """Each story's tokens, the first of them the one that begins a story."""
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    return [torch.tensor([tokenizer.bos_token_id, *tokenizer.encode(x, add_special_tokens=False)]) for x in texts]


def rows(stories: list[torch.Tensor], length: int) -> torch.Tensor:
    """[N, length]: one story after another, cut."""
    text = torch.cat(stories)
    return text[: len(text) // length * length].view(-1, length)


def build(args: argparse.Namespace, vocab_size: int, bos: int) -> HfMoeForCausalLM:
    torch.manual_seed(args.seed)
    config = HfMoeConfig(
        vocab_size=vocab_size,
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        moe_intermediate_size=args.hidden // 2,
        num_hidden_layers=args.layers,
        mlp_layer_types=["dense"] + ["sparse"] * (args.layers - 1),
        max_position_embeddings=512,
        router_bias_update_speed=args.bias_speed,
        bos_token_id=bos,
        eos_token_id=bos,  # a story ends where the next begins
        **V3,
    )
    return HfMoeForCausalLM(config)


@torch.no_grad()
def look(model: HfMoeForCausalLM, text: torch.Tensor) -> dict:
    """Losses and accuracies of the head and of the module on `text` [N, S], and each router's load.

    The module's accuracy is that of its guess of the token after next; `agreement` says how often this is the head's
    own choice one token later.
    """
    model.eval()
    sums, counts = torch.zeros(5, dtype=torch.float64), 0
    for batch in text.split(32):
        out = model.model(batch, output_mtp_hidden_states=True, output_router_indices=True, use_cache=False)
        head, module = model.project(out.last_hidden_state), model.project(out.mtp_hidden_states[0])
        head, module, truth = head[:, 1:-1], module[:, :-2], batch[:, 2:]  # all three of the token at i + 2
        losses = [torch.nn.functional.cross_entropy(x.mT, truth, reduction="sum") for x in (head, module)]
        choices = head.argmax(-1), module.argmax(-1)
        pairs = (choices[0], truth), (choices[1], truth), choices
        sums += torch.tensor([*losses, *((a == b).sum() for a, b in pairs)], dtype=torch.float64)
        counts += torch.stack([index.flatten().bincount(minlength=EXPERTS) for index in out.router_indices])
    names = ("loss", "mtp_loss", "accuracy", "mtp_accuracy", "agreement")
    result = dict(zip(names, (sums / (text.shape[0] * (text.shape[1] - 2))).tolist(), strict=True))
    load = counts * EXPERTS / counts.sum(dim=-1, keepdim=True)
    return result | {"load": load}


def routers(model: HfMoeForCausalLM, load: torch.Tensor) -> list[dict]:
    gates = [(name, part) for name, part in model.named_modules() if hasattr(part, "e_score_correction_bias")]
    return [
        {
            "router": name.removeprefix("model.").removesuffix(".mlp.gate"),
            "load_max": row.max().item(),
            "load_min": row.min().item(),
            "dead_experts": int((row == 0).sum()),
            "bias_min": gate.e_score_correction_bias.min().item(),
            "bias_max": gate.e_score_correction_bias.max().item(),
        }
        for (name, gate), row in zip(gates, load, strict=True)
    ]


def speculate(model: HfMoeForCausalLM, stories: list[torch.Tensor], prompt: int, tokens: int) -> dict:
    """Greedy text after the first `prompt` tokens of each story, plain and with drafts, one story at a time."""
    model.eval()
    options = {"max_new_tokens": tokens, "do_sample": False, "return_dict_in_generate": True, "disable_compile": True}
    total = dict.fromkeys(("prompts", "tokens", "identical", "passes_plain", "passes_mtp", "drafted", "accepted"), 0)
    seconds = {"plain": 0.0, "mtp": 0.0}
    for story in stories:
        ids = story[None, :prompt]
        start = time.perf_counter()
        plain = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        middle = time.perf_counter()
        out = model.generate(ids, attention_mask=torch.ones_like(ids), use_mtp=True, **options)
        seconds = {"plain": seconds["plain"] + middle - start, "mtp": seconds["mtp"] + time.perf_counter() - middle}
        new = out.sequences.shape[1] - prompt
        total["prompts"] += 1
        total["tokens"] += new
        total["identical"] += torch.equal(plain.sequences, out.sequences)
        total["passes_plain"] += plain.sequences.shape[1] - prompt  # one a token
        total["passes_mtp"] += out.forward_passes
        total["drafted"] += out.drafted_tokens
        total["accepted"] += out.accepted_tokens
    return total | {
        "acceptance": total["accepted"] / total["drafted"],
        "passes_per_token": total["passes_mtp"] / total["tokens"],
        "milliseconds_per_token": {name: 1000 * x / total["tokens"] for name, x in seconds.items()},
    }


def train(model: HfMoeForCausalLM, text: torch.Tensor, args: argparse.Namespace) -> dict:
    wall, cores = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        trainer = MoeTrainer(
            model=model,
            args=MoeTrainingArguments(
                output_dir=folder,
                max_steps=args.steps,
                per_device_train_batch_size=args.batch,
                learning_rate=args.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=args.steps // 50,
                weight_decay=0.1,
                adam_beta2=0.95,
                router_bias_update_until=0.9,
                logging_steps=50,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                seed=args.seed,
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in text],
            callbacks=[Deadline(60 * args.core_minutes)],
        )
        trainer.train()
    names = {"step", "loss", "mtp_loss", "router_max_violation", "router_dead_experts", "router_bias_range"}
    log = [{key: value for key, value in x.items() if key in names} for x in trainer.state.log_history if "loss" in x]
    seconds = {"wall_seconds": time.monotonic() - wall, "core_seconds": time.process_time() - cores}
    return {**seconds, "steps": trainer.state.global_step, "log": log}


def table(report: dict) -> str:
    setting, training, drafts = report["setting"], report["training"], report["speculation"]
    lines = [
        "# A tiny DeepSeek-V3 on TinyStories",
        "",
        f"{report['parameters'] / 1e6:.1f} million parameters ({report['active_parameters'] / 1e6:.1f} active), "
        f"{setting['layers']} layers, {EXPERTS} experts of which {TOP_K} are active and one shared; "
        f"{training['steps']} of {setting['steps']} steps of {setting['batch']} x {setting['length']} tokens "
        f"in {training['core_seconds'] / 60:.1f} core-minutes, {training['epochs']:.1f} times through the text.",
        "",
        "| text | loss, start | loss, end | MTP loss, start | MTP loss, end | accuracy | MTP accuracy | agreement |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in ("train", "held-out"):
        first, last = report["start"][name], report["end"][name]
        numbers = (first["loss"], last["loss"], first["mtp_loss"], last["mtp_loss"])
        shares = (last["accuracy"], last["mtp_accuracy"], last["agreement"])
        cells = [*(f"{x:.3f}" for x in numbers), *(f"{x:.1%}" for x in shares)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Accuracy is that of the head's guess of a token from all before it, MTP accuracy that of the module's guess "
        "from the same tokens; agreement says how often the two guesses are the same.",
        "",
        "| router | largest load | smallest load | dead experts | selection bias |",
        "|---|---:|---:|---:|---:|",
    ]
    for x in report["routers"]:
        lines.append(
            f"| {x['router']} | {x['load_max']:.2f} | {x['load_min']:.2f} | {x['dead_experts']} | "
            f"{x['bias_min']:+.3f} to {x['bias_max']:+.3f} |"
        )
    milliseconds = drafts["milliseconds_per_token"]
    lines += [
        "",
        "Load is on the held-out text, beside a fair share of 1.",
        "",
        "| greedy text from held-out prompts | plain | use_mtp |",
        "|---|---:|---:|",
        f"| forward passes a token | {drafts['passes_plain'] / drafts['tokens']:.3f} | "
        f"{drafts['passes_per_token']:.3f} |",
        f"| milliseconds a token | {milliseconds['plain']:.1f} | {milliseconds['mtp']:.1f} |",
        f"| accepted drafts | | {drafts['acceptance']:.1%} |",
        "",
        f"{drafts['identical']} of {drafts['prompts']} texts are identical, {drafts['tokens']} tokens after "
        f"{setting['prompt']} of the story.",
        "",
        f"- {report['device']}, {report['cores']} cores, threads: {report['threads']}; training took "
        f"{training['wall_seconds'] / 60:.0f} minutes by the clock at a load average of {report['load_average']:.1f}.",
        f"- {', '.join(f'{name} {version}' for name, version in report['versions'].items())}.",
    ]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--core-minutes", type=float, default=20.0, help="at most so much training: 10 on 2 cores")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--bias-speed", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each held-out story that are given")
    parser.add_argument("--new-tokens", type=int, default=128)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    stories = {"train": read(args.stories / "train.jsonl", tokenizer)}
    stories["held-out"] = read(args.stories / "val.jsonl", tokenizer)
    text = {name: rows(x, args.length) for name, x in stories.items()}
    model = build(args, len(tokenizer), tokenizer.bos_token_id)
    shown = {"train": text["train"][:256], "held-out": text["held-out"][:256]}
    start = {name: look(model, x) for name, x in shown.items()}
    training = train(model, text["train"], args)
    training["epochs"] = training["steps"] * args.batch / len(text["train"])
    end = {name: look(model, x) for name, x in shown.items()}
    load = end["held-out"]["load"]
    for result in (*start.values(), *end.values()):
        del result["load"]
    prompts = [story for story in stories["held-out"] if len(story) > args.prompt][: args.prompts]
    parameters = sum(x.numel() for x in model.parameters())
    idle = sum(x.numel() for name, x in model.named_parameters() if ".experts." in name) * (EXPERTS - TOP_K) // EXPERTS
    report = {
        "setting": {name: x for name, x in vars(args).items() if not isinstance(x, Path)},
        "model": V3,
        "parameters": parameters,
        "active_parameters": parameters - idle,
        "training": training,
        "start": start,
        "end": end,
        "routers": routers(model, load),
        "speculation": speculate(model, prompts, args.prompt, args.new_tokens),
        "device": platform.processor() or "CPU",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "versions": {
            "hf_moe": __version__,
            "Python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    print(table(report))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n")
        args.out.with_suffix(".md").write_text(table(report))


if __name__ == "__main__":
    main()
