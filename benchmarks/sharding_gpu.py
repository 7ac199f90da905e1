"""A mixture of experts trained on one GPU and on two: losses side by side, tokens a second, memory of each GPU.

One layout at a time, into OUT/LAYOUT-TYPE.json:

    python benchmarks/sharding_gpu.py OUT one
    accelerate launch --config_file training/accelerate/LAYOUT.yaml --num_processes 2 \
        benchmarks/sharding_gpu.py OUT LAYOUT        with LAYOUT fsdp2 or expert_parallel
"""

import gc
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import TrainerCallback
from transformers.distributed import DistributedConfig

from hf_moe import HfMoeConfig, HfMoeForCausalLM, MoeTrainer, MoeTrainingArguments

STEPS, BATCH, LENGTH = 12, 16, 512  # 8192 tokens a step, whatever the number of GPUs
CONFIG = {
    "vocab_size": 4096,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "max_position_embeddings": LENGTH,
    "router_type": "sigmoid_topk",
    "norm_topk_prob": True,
    "router_args": {"selection_bias": True},
    "router_aux_loss_coef": 0.01,
    "router_bias_update_speed": 1e-3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


class Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self):
        self.times = []

    def on_step_end(self, args, state, control, **kwargs):
        torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def build(layout: str, folder: Path) -> HfMoeForCausalLM:
    torch.manual_seed(0)
    model = HfMoeForCausalLM(HfMoeConfig(**CONFIG))
    if layout != "expert_parallel":
        return model
    state = PartialState()
    if state.is_main_process:
        model.save_pretrained(folder)
    state.wait_for_everyone()
    spread = DistributedConfig(fsdp_size=state.num_processes, ep_size=state.num_processes)
    return HfMoeForCausalLM.from_pretrained(folder, distributed_config=spread)


def rows() -> list[dict]:
    """A Markov chain with few successors: something to learn."""
    generator = torch.Generator().manual_seed(0)
    successors = torch.randint(1, CONFIG["vocab_size"], (CONFIG["vocab_size"], 4), generator=generator)
    token = torch.randint(1, CONFIG["vocab_size"], (STEPS * BATCH,), generator=generator)
    tokens = [token]
    for _ in range(LENGTH - 1):
        token = successors[token, torch.randint(4, token.shape, generator=generator)]
        tokens.append(token)
    return [{"input_ids": row, "labels": row} for row in torch.stack(tokens, dim=1).tolist()]


def train(out: Path, layout: str, dtype: str) -> None:
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    processes, clock = PartialState().num_processes, Clock()
    arguments = MoeTrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // 2 // processes,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        bf16=dtype == "bfloat16",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    model = build(layout, out / f".start-{dtype}")
    trainer = MoeTrainer(model, arguments, train_dataset=rows(), callbacks=[clock])
    trainer.train()
    seconds = (clock.times[-1] - clock.times[3]) / (STEPS - 4)
    history = trainer.state.log_history[:-1]
    result = {
        "layout": layout,
        "processes": processes,
        "computes_in": dtype,
        "gpu": torch.cuda.get_device_name(),
        "loss": [entry["loss"] for entry in history],
        "grad_norm": [entry["grad_norm"] for entry in history],
        "aux_loss": [entry["aux_loss"] for entry in history],
        "router_bias": [bias.tolist() for bias in trainer.selection_bias.biases.values()],
        "tokens_per_second": round(BATCH * LENGTH / seconds),
        "peak_gib_per_gpu": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }
    everywhere = [None] * processes
    if processes > 1:
        torch.distributed.all_gather_object(everywhere, result["router_bias"])
        result["router_bias_equal_on_all"] = all(bias == everywhere[0] for bias in everywhere)
    if trainer.is_world_process_zero():
        path = out / f"{layout}-{dtype}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps({key: value for key, value in result.items() if key != "router_bias"}))


def main(out: str, layout: str) -> None:
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    for dtype in ("float32", "bfloat16"):
        train(out, layout, dtype)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
