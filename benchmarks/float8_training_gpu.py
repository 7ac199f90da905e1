"""Training with linear layers in float8 beside bfloat16, on one GPU: losses, tokens a second, memory.

python benchmarks/float8_training_gpu.py OUT
"""

import gc
import json
import sys
import tempfile
from pathlib import Path

import torch
from hf_moe.training.weights.float8 import compute_in_float8
from sharding_gpu import BATCH, CONFIG, LENGTH, STEPS, Clock, rows

from hf_moe import HfMoeConfig, HfMoeForCausalLM, MoeTrainer, MoeTrainingArguments

# Wide, with large shared experts: the linear layers are most of the work.
WIDE = {"hidden_size": 4096, "intermediate_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 32}
WIDE |= {"num_key_value_heads": 8, "num_experts": 16, "n_shared_experts": 16}


def train(float8: bool) -> dict:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    model, clock = HfMoeForCausalLM(HfMoeConfig(**CONFIG | WIDE)).cuda(), Clock()
    said = compute_in_float8(model) if float8 else "bfloat16"
    arguments = MoeTrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        bf16=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    trainer = MoeTrainer(model, arguments, train_dataset=rows(), callbacks=[clock])
    trainer.train()
    seconds = (clock.times[-1] - clock.times[3]) / (STEPS - 4)
    return {
        "computes": said,
        "loss": [entry["loss"] for entry in trainer.state.log_history[:-1]],
        "tokens_per_second": round(BATCH * LENGTH / seconds),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def main(out: str) -> None:
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    results = {"gpu": torch.cuda.get_device_name(), "bfloat16": train(False), "float8": train(True)}
    (out / "float8_training.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
