"""What `hf-moe check` tries on this machine: the host, texts with and without a cache, a saved folder, a step.

Each check is a function from a scratch folder to a word of what it found; it raises Failed, or whatever goes wrong.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .demo import DEMO_MODEL
from .generation.cached import with_and_without_cache
from .kernels.auto import fastest
from .model import host
from .model.configuration_hf_moe import HfMoeConfig
from .model.decoding import recordable
from .model.modeling_hf_moe import HfMoeForCausalLM
from .version import __version__

PACKAGES = (
    *("torch", "transformers", "accelerate", "safetensors", "huggingface_hub", "tokenizers"),
    *("trl", "peft", "datasets", "triton", "liger_kernel", "bitsandbytes", "torchao", "kernels"),
)
SIZES = {
    **{"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32},
    **{"num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"], "num_attention_heads": 4},
    **{"num_experts": 7, "num_experts_per_tok": 2, "n_shared_experts": 1, "max_position_embeddings": 128},
    **{"initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0},
}
GROUPED = {"num_key_value_heads": 2, "router_type": "sigmoid_topk", "router_args": {"selection_bias": True}}
LATENT = {
    **{"attention_type": "mla", "q_lora_rank": None, "kv_lora_rank": 16},
    **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
}

# Prints a text of the saved model in argv[1], which begins as argv[2] says, where hf_moe can't be imported.
WITHOUT_HF_MOE = """
import json, sys
class NoHfMoe:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_moe":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoHfMoe())
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
ids = torch.tensor(json.loads(sys.argv[2]))
text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
print(json.dumps(text.tolist()))
"""


class Failed(Exception):
    """A check whose result is wrong."""


def run() -> Iterator[dict[str, Any]]:
    """The checks, one after the other: name, ok, seconds, and what was found or went wrong in one line."""
    with tempfile.TemporaryDirectory() as folder:
        for name, check in CHECKS.items():
            start, ok = time.perf_counter(), True
            try:
                found = check(Path(folder))
            except Exception as error:  # whatever it is, it is what this command is to tell
                ok, found = False, f"{type(error).__name__}: {' '.join(str(error).split())}"
            seconds = round(time.perf_counter() - start, 1)
            yield {"check": name, "ok": ok, "seconds": seconds, "found": found}


def machine() -> dict[str, Any]:
    """Versions, device and kernels: what a report of a bug should hold."""
    found = {"hf_moe": __version__, "python": platform.python_version(), "system": platform.platform(terse=True)}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    oldest, newest = (".".join(map(str, x)) for x in host.TESTED)
    found["tested with transformers"] = f"{oldest} to {newest}"
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {cores()} threads"
    model = tiny(GROUPED)
    rows = torch.zeros(1, SIZES["hidden_size"], device=device(), dtype=torch.bfloat16)
    found["experts in training"] = fastest(model.to(torch.bfloat16).model.layers[-1].mlp.experts, rows)
    found["experts by default"] = model.config._experts_implementation
    found["decoding"] = "recorded as a CUDA graph" if recordable(model) else "step by step"
    return found


def cores() -> int:
    return torch.get_num_threads()


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def tiny(fields: dict) -> HfMoeForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return HfMoeForCausalLM(HfMoeConfig(**SIZES, **fields)).eval().to(device())


def prompts(rows: int = 2, length: int = 9) -> torch.Tensor:
    drawn = torch.randint(1, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(0))
    return drawn.to(device())


def same_text(fields: dict, attention_mask: torch.Tensor | None = None, **options) -> str:
    found = with_and_without_cache(tiny(fields), prompts(), 12, attention_mask, **options)
    if not found.same:
        raise Failed(f"with a cache the logits of a text differ by up to {found.difference:.3g} from those without")
    return f"largest difference of a logit {found.difference:.1e}"


def host_is_known(folder: Path) -> str:
    """What is overridden of Transformers takes the arguments that it was written against."""
    if found := host.differences():
        raise Failed("; ".join(found))
    return f"{sum(map(len, host.PRIVATE.values()))} methods of Transformers take what they did"


def left_padding(folder: Path) -> str:
    mask = torch.ones_like(prompts())
    mask[0, :4] = 0
    return same_text(GROUPED, mask)


def upcycled_text(folder: Path) -> str:
    """The mixture made of the demo's dense model tells the dense model's story."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_moe.conversion import upcycle

    report = upcycle(DEMO_MODEL, folder / "upcycled", experts=4, top_k=2, progress=False)
    tokenizer, texts = AutoTokenizer.from_pretrained(DEMO_MODEL), []
    for source in (DEMO_MODEL, folder / "upcycled"):
        model = AutoModelForCausalLM.from_pretrained(source).eval().to(device())
        inputs = tokenizer("Once upon a time", return_tensors="pt").to(device())
        output = model.generate(**inputs, do_sample=False, max_new_tokens=40)
        texts.append(tokenizer.decode(output[0], skip_special_tokens=True))
    if texts[0] != texts[1] or not report["cached_text_equal"]:
        raise Failed(f"the dense model writes {texts[0]!r}, its mixture of experts {texts[1]!r}")
    return f"{texts[0][:44]}..."


def saved_folder(folder: Path) -> str:
    """A saved folder writes the same text in a process without hf_moe."""
    model, ids = tiny(GROUPED).to("cpu"), prompts().cpu()
    model.save_pretrained(folder / "saved")
    expected = with_and_without_cache(model, ids, 8)
    env = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", WITHOUT_HF_MOE, str(folder / "saved"), json.dumps(ids.tolist())]
    result = subprocess.run(command, env=env, capture_output=True, text=True, cwd=folder)
    if result.returncode:
        raise Failed(result.stderr.strip().splitlines()[-1])
    if json.loads(result.stdout.splitlines()[-1]) != expected.text.tolist():
        raise Failed("without hf_moe the saved folder writes another text")
    return "loaded where hf_moe is not installed, the same text"


def training(folder: Path) -> str:
    """Three steps with a balance loss: the loss falls."""
    from hf_moe import MoeTrainer, MoeTrainingArguments

    ids = prompts(8, 16).cpu()
    rows = [{"input_ids": row, "labels": row} for row in ids]
    args = MoeTrainingArguments(
        str(folder / "trained"),
        **{"max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "router_aux_loss_coef": 1e-2},
        **{"logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True},
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = MoeTrainer(tiny(GROUPED).train(), args, train_dataset=rows)
    trainer.log = lambda logs, *args, **kwargs: trainer.state.log_history.append(logs)  # and prints nothing
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if not losses[-1] < losses[0]:
        raise Failed(f"the loss of three steps went from {losses[0]:.3f} to {losses[-1]:.3f}")
    return f"loss {losses[0]:.3f} to {losses[-1]:.3f} in three steps"


def fast_experts(folder: Path) -> str:
    """The kernels, or where there is no GPU what Transformers has, compute what eager experts do, backward too."""
    model = tiny(GROUPED).to(torch.bfloat16)
    fast, results = "hf_moe" if device() == "cuda" else model.config._experts_implementation, []
    experts, drawn = model.model.layers[-1].mlp.experts, torch.Generator().manual_seed(0)
    rows = torch.randn(24, SIZES["hidden_size"], generator=drawn).to(device(), torch.bfloat16)
    index = torch.rand(24, SIZES["num_experts"], generator=drawn).topk(2).indices.to(device())
    for implementation in ("eager", fast):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        output = experts(rows, index, torch.full(index.shape, 0.5, device=device()))
        output.float().square().sum().backward()
        results.append((output.detach(), experts.gate_up_proj.grad.clone(), experts.down_proj.grad.clone()))
    for eager, other in zip(*results, strict=True):
        difference = ((eager - other).abs().max() / eager.abs().max()).item()
        if not difference < 0.05:
            raise Failed(f"{fast} and eager experts differ by {difference:.1%} of the largest value")
    return f"{fast} as eager in bfloat16, forward and backward, on {device()}"


CHECKS: dict[str, Callable[[Path], str]] = {
    "host": host_is_known,
    "cached text": lambda folder: same_text(GROUPED),
    "left padding": left_padding,
    "static cache": lambda folder: same_text(GROUPED, cache_implementation="static", disable_compile=True),
    "latent attention": lambda folder: same_text(LATENT),
    "sliding window": lambda folder: same_text(
        GROUPED | {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    ),
    "multi-token drafts": lambda folder: same_text(GROUPED | {"num_mtp_layers": 1}, use_mtp=True),
    "fast experts": fast_experts,
    "upcycled text": upcycled_text,
    "saved folder": saved_folder,
    "training": training,
}
