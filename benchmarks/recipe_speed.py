"""What a user gets: recipes as they are, through `hf-moe train`, beside TRL's SFTTrainer on Transformers' own model.

    python benchmarks/recipe_speed.py --work DIR --out benchmarks/results/recipe_speed.json
    python benchmarks/recipe_speed.py --work DIR --runs "sft" "sft, fsdp2" --profile

Random weights in the shape of the recipe's model, stored in bf16, with routers that spread tokens as trained ones do.
Conversations of random words whose lengths are log-normal, as those of instruction sets are: half of them are below
160 tokens. Nothing of a recipe is touched, unless --rows and --accumulation make a step smaller; the peer's steps are
short. With --unsaved a run is the beginning of one of a thousand steps, whose rate has yet to rise. Seconds are those
between two lines of the command's log. Memory is what nvidia-smi shows at the most, read five times a second. The peer
has its best settings: fused AdamW, grouped_mm, padding-free packs, flash attention where that is installed, Liger's
kernels.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import psutil
import torch
from hf_moe.training.launch import find_launch_file

PACKAGES = ("torch", "triton", "transformers", "trl", "peft", "accelerate", "liger-kernel", "flash-attn", "hf_moe")
MEDIAN, SPREAD, SHORTEST, LONGEST = 160, 0.8, 16, 4096  # tokens of a conversation
WORDS = ("the", "dog", "cat", "hat", "village", "warm", "kite", "bush", "glue", "brave")
HF_MOE = [sys.executable, "-m", "hf_moe_cli"]
TRAIN = [*HF_MOE, "train"]
PEER = [sys.executable, __file__, "peer"]
OLMOE, QWEN = "olmoe-1b-7b", "qwen3-30b-a3b, Transformers' own"
# Fields of a preset that Transformers' own configuration has by the same name; what it calls the experts' width.
SHAPE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "num_experts")
SHAPE += ("num_experts_per_tok", "norm_topk_prob", "tie_word_embeddings")
HOSTS = {
    "olmoe-1b-7b": lambda preset: {"model_type": "olmoe", "intermediate_size": preset.moe_intermediate_size},
    "qwen3-30b-a3b": lambda preset: {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": preset.moe_intermediate_size,
        "head_dim": preset.head_dim,
    },
}
# Name -> the model that it trains, on how many GPUs (of several, --gpus may say more), the command.
RUNS = {
    "sft": (OLMOE, 1, [*TRAIN, "olmoe-1b-7b/sft"]),
    "sft_bf16": (OLMOE, 1, [*TRAIN, "olmoe-1b-7b/sft_bf16"]),
    "sft, fp8": (OLMOE, 1, [*TRAIN, "olmoe-1b-7b/sft", "--fp8", "true"]),
    "sft, fsdp2": (OLMOE, 2, [*TRAIN, "olmoe-1b-7b/sft", "--accelerate", "fsdp2"]),
    "sft, expert parallel": (
        OLMOE,
        2,
        [*TRAIN, "olmoe-1b-7b/sft", "--accelerate", "expert_parallel", "--expert_parallel_size", "GPUS"],
    ),
    "lora_experts": (OLMOE, 1, [*TRAIN, "olmoe-1b-7b/lora_experts"]),
    "Qwen3-30B, sft, fsdp2": (QWEN, 2, [*TRAIN, "qwen3-30b-a3b/sft", "--accelerate", "fsdp2"]),
    "Qwen3-30B, lora_experts": (QWEN, 1, [*TRAIN, "qwen3-30b-a3b/lora_experts"]),
    "TRL": (
        f"{OLMOE}, Transformers' own",
        1,
        [*PEER, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"],
    ),
    "TRL, LoRA": (f"{OLMOE}, Transformers' own", 1, [*PEER, "--lora", "--gradient_accumulation_steps", "2"]),
}
STEP = re.compile(r"step +(\d+)/(\d+): loss")
WHOLE = 1000  # steps of the run of which --unsaved takes the beginning: rate and routers move as in one of that length
FAILED = re.compile(r"(\[rank\d+\]: ?)?([\w.]+(Error|Exception)|hf-moe):? ")  # the line that says why
# Part of a step -> kernels by name, the first that matches.
PARTS = {
    "experts": r"^(product|up|weight_gradient|combine|bias_gradient|activation_backward|count|place|gather|add|tiles"
    r"|turned|blocks)_kernel"
    r"$|grouped_mm|GroupedGemm",
    "attention": r"flash|fmha|sdpa|attention|cudnn_generated",
    "optimizer": r"[Aa]dam|multi_tensor|lpnorm|LpNorm",
    "communication": r"nccl",
    "casts, copies": r"copy|Memcpy|Memset|CatArray",
    "other products": r"gemm|cutlass|nvjet|cublas|matmul",
}


def shape(model: str):
    """The configuration of `model`: hf_moe's preset, or Transformers' own of the same shape."""
    from transformers import AutoConfig

    from hf_moe import HfMoeConfig

    name, _, own = model.partition(", ")
    preset = HfMoeConfig.from_preset(name)
    if not own:
        return preset
    return AutoConfig.for_model(**{x: getattr(preset, x) for x in SHAPE}, **HOSTS[name](preset))


def build(model: str, folder: Path) -> None:
    """A checkpoint of random weights in bf16, of the shape of `model`, with the demo's tokenizer."""
    from hf_moe.training.data.chat_templates import find_template
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_moe.demo import DEMO_MODEL

    torch.manual_seed(0)
    config = shape(model)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        even_routers(made, some_tokens(tokenizer))
    made.save_pretrained(folder)
    tokenizer.chat_template = Path(find_template("olmoe")).read_text()
    tokenizer.save_pretrained(folder)


def some_tokens(tokenizer, rows: int = 16, length: int = 512) -> torch.Tensor:
    """Tokens of random words, [rows, length]."""
    draw = np.random.default_rng(1)
    text = [" ".join(draw.choice(WORDS, length)) for _ in range(rows)]
    return torch.tensor([ids[:length] for ids in tokenizer(text)["input_ids"]])


@torch.no_grad()
def even_routers(model, ids: torch.Tensor) -> None:
    """Make routers of random weights spread tokens as trained ones do, of which a balance loss took care.

    Hidden states of random weights are nearly one vector, so that nearly all tokens would go to the same K experts of
    a layer, which on several GPUs may all be one's. Each router loses what it says of its tokens' mean.
    """
    from hf_moe.routers import find_routers

    def centre(module, arguments) -> None:
        mean = arguments[0].flatten(0, -2).float().mean(0)
        mean, weight = mean / mean.norm(), module.weight.float()
        module.weight.copy_(weight - torch.outer(weight @ mean, mean))

    hooks = [router.module.register_forward_pre_hook(centre) for router in find_routers(model).values()]
    model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()


def write_data(path: Path, rows: int, tokenizer) -> None:
    """Conversations of random words, of random lengths."""
    draw = np.random.default_rng(0)
    tokens = len(tokenizer(" ".join(WORDS))["input_ids"]) / len(WORDS)
    lengths = np.exp(draw.normal(np.log(MEDIAN), SPREAD, rows)).clip(SHORTEST, LONGEST) / tokens
    with path.open("w", encoding="utf-8") as file:
        for length in lengths.astype(int):
            said = [" ".join(draw.choice(WORDS, max(2, int(length * share)))) for share in (0.3, 0.7)]
            messages = [
                {"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=True)
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def devices(gpus: int) -> dict[str, str]:
    """The first so many of the cards that this process may use, for the environment of another."""
    if not torch.cuda.is_available():
        return {}
    given = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    return {"CUDA_VISIBLE_DEVICES": ",".join(given.split(",")[:gpus])}


def used_memory(cards: str) -> list[int]:
    """MiB of each of the cards."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id", cards]
    return [int(line) for line in subprocess.run(command, capture_output=True, text=True).stdout.split()]


def folder_of(name: str, args: argparse.Namespace) -> Path:
    return args.work / RUNS[name][0].replace(", Transformers' own", "-transformers")


def gpus_of(name: str, args: argparse.Namespace) -> int:
    return args.gpus if args.gpus is not None and RUNS[name][1] > 1 else RUNS[name][1]


def words_of(name: str, steps: int, args: argparse.Namespace) -> list[str]:
    """The command line of a run of so many steps."""
    given = {
        "model_name_or_path": folder_of(name, args),
        "train_data": args.work / "chats.jsonl",
        "output_dir": args.work / "output",
        "max_steps": steps,
        "save_strategy": "no",
        "per_device_train_batch_size": args.rows,
        "gradient_accumulation_steps": args.accumulation,
    }
    said = (str(word) for key, value in given.items() if value is not None for word in (f"--{key}", value))
    command = [str(gpus_of(name, args)) if word == "GPUS" else word for word in RUNS[name][2]]
    return [*command, *said, *args.further]


def end(pid: int) -> None:
    """Kill a process and all that it started, and theirs: the processes of several GPUs are no group of one."""
    processes = [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=60)


def run(name: str, args: argparse.Namespace) -> dict:
    """Run the command; what it took."""
    gpus, output = gpus_of(name, args), args.work / "output"
    words = words_of(name, WHOLE if args.unsaved else args.steps, args)
    environment = {**os.environ, **devices(gpus)}
    shutil.rmtree(output, ignore_errors=True)
    peaks, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            peaks.append(max(used_memory(environment["CUDA_VISIBLE_DEVICES"]), default=0))

    watching = threading.Thread(target=watch, daemon=True)
    if torch.cuda.is_available():
        watching.start()
    start, times, said = time.perf_counter(), [], []
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    ended = False
    for line in process.stdout:
        said.append(line.rstrip())
        if STEP.search(line):
            times.append(time.perf_counter())
            took = f"{times[-1] - (times[-2:-1] or [start])[0]:.2f} s"
            print(f"{name}: {said[-1].split(chr(13))[-1].strip()} ({took})", file=sys.stderr, flush=True)
        if args.unsaved and len(times) == args.steps:
            time.sleep(1)  # its last line of the log
            end(process.pid)
            ended = True
            break
    code = process.wait()
    done.set()
    if (code and not ended) or len(times) < 3:
        print("\n".join(said[-250:]), file=sys.stderr, flush=True)
        return {"failed": next((line for line in said if FAILED.match(line)), "\n".join(said[-5:]))[-800:]}
    logs = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    tokens = [entry["num_tokens"] for entry in logs if "loss" in entry and "num_tokens" in entry]
    seconds = np.diff(times)
    ran = next((entry["train_runtime"] for entry in logs if "train_runtime" in entry), None)
    shutil.rmtree(output, ignore_errors=True)
    later = args.skip  # steps that warm up
    return {
        "gpus": gpus,
        "command": " ".join(words[len(HF_MOE) - 1 :]).replace(str(args.work), "DIR"),
        "took": next((line for line in said if line.startswith("on this GPU")), None),
        "tokens_per_second": round((tokens[-1] - tokens[later]) / float(seconds[later:].sum())),
        "step_seconds": [round(float(x), 3) for x in seconds],
        "first_step_seconds": None if ran is None else round(ran - float(seconds.sum()), 3),
        "until_first_step_seconds": round(times[0] - start, 1),
        "peak_gib": round(max(peaks) / 1024, 1),
        "tokens_per_step": round(statistics.mean(np.diff(tokens))),
        "last_losses": [entry["loss"] for entry in logs if "loss" in entry][-20:],
    }


def profiled(name: str, args: argparse.Namespace) -> dict:
    """The command again with a profile of two steps: milliseconds of the first card by part, a step."""
    gpus, found = gpus_of(name, args), args.work / "profile.json"
    words = words_of(name, args.skip + 3, args)[len(TRAIN) :]
    command = [sys.executable]
    if "--accelerate" in words:
        at = words.index("--accelerate")
        command += ["-m", "accelerate.commands.launch", "--config_file", str(find_launch_file(words[at + 1]))]
        command += ["--num_processes", str(gpus)]
        del words[at : at + 2]
    shutil.rmtree(args.work / "output", ignore_errors=True)
    command += [__file__, "profile", str(found), str(args.skip), *words]
    subprocess.run(command, check=True, env={**os.environ, **devices(gpus)}, stdout=subprocess.DEVNULL)
    shutil.rmtree(args.work / "output", ignore_errors=True)
    return json.loads(found.read_text())


def profile(out: str, skip: str, *words: str) -> None:
    """`hf-moe train` with these words, and two steps after `skip` under a profiler, into the file `out`."""
    from hf_moe_cli import main
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiling
    from transformers import Trainer, TrainerCallback

    class Profile(TrainerCallback):
        def on_step_begin(self, arguments, state, control, **kwargs):
            if state.global_step == int(skip):
                torch.cuda.synchronize()
                self.profile = profiling(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU])
                self.profile.__enter__()
                self.start = time.perf_counter()

        def on_step_end(self, arguments, state, control, **kwargs):
            if state.global_step == int(skip) + 2:
                torch.cuda.synchronize()
                wall = time.perf_counter() - self.start
                self.profile.__exit__(None, None, None)
                if state.is_world_process_zero:
                    Path(out).write_text(json.dumps(shares(self.profile, wall)))
                if torch.distributed.is_initialized():
                    torch.distributed.barrier()
                os._exit(0)  # saves no model

    begin = Trainer.__init__

    def with_profile(self, *arguments, **options):
        begin(self, *arguments, **options)
        self.add_callback(Profile())

    Trainer.__init__ = with_profile
    main(["train", *words])


def covered(spans: list[tuple[float, float]]) -> float:
    """How long at least one of the spans of time lasts."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def shares(profile, wall: float) -> dict:
    """Of two steps: milliseconds a step by part, of kernels on the card; and those that take the most."""
    parts, spans, kernels = dict.fromkeys([*PARTS, "rest"], 0.0), {name: [] for name in [*PARTS, "rest"]}, {}
    for event in profile.events():
        if event.device_type.name != "CUDA" or event.name.startswith(
            ("ProfilerStep", "Optimizer", "##", "FSDP", "nccl:")
        ):
            continue
        took = event.time_range.elapsed_us() / 2000
        part = next((part for part, names in PARTS.items() if re.search(names, event.name)), "rest")
        parts[part] += took
        spans[part].append((event.time_range.start / 2000, event.time_range.end / 2000))
        kernels[event.name[:80]] = kernels.get(event.name[:80], 0.0) + took
    computing = covered([span for part, found in spans.items() if part != "communication" for span in found])
    busy = covered([span for found in spans.values() for span in found])
    alone = {"communication alone": busy - computing, "idle": wall * 500 - busy}
    most = sorted(kernels.items(), key=lambda item: -item[1])[:25]
    syncs = [e for e in profile.key_averages() if e.key in ("cudaStreamSynchronize", "cudaDeviceSynchronize")]
    return {
        "milliseconds": {name: round(x, 1) for name, x in (parts | alone).items()},
        "step_milliseconds": round(wall * 500, 1),
        "synchronisations": sum(e.count for e in syncs) / 2,
        "longest_kernels": {name: round(x, 1) for name, x in most},
    }


def peer(words: list[str]) -> None:
    """TRL's SFTTrainer, with the recipe's numbers."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    parser = argparse.ArgumentParser()
    for word in ("model_name_or_path", "train_data", "output_dir"):
        parser.add_argument(f"--{word}")
    for word, of_recipe in {
        "max_steps": -1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 8,
    }.items():
        parser.add_argument(f"--{word}", type=int, default=of_recipe)
    parser.add_argument("--save_strategy")
    parser.add_argument("--lora", action="store_true")
    given = parser.parse_args(words)

    class Lines(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                with (Path(args.output_dir) / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(state.log_history[-1], default=float) + "\n")
                print(f"step {state.global_step}/{state.max_steps}: loss {logs['loss']}", file=sys.stderr, flush=True)

    Path(given.output_dir).mkdir(parents=True)
    from transformers.utils import is_flash_attn_2_available

    attention = "flash_attention_2" if is_flash_attn_2_available() else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(
        given.model_name_or_path,
        dtype=torch.bfloat16 if given.lora else torch.float32,
        attn_implementation=attention,
        experts_implementation="grouped_mm",
    )
    adapter = None
    if given.lora:
        from peft import LoraConfig

        targets = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
        adapter = LoraConfig(r=8, lora_alpha=32, target_modules=[], target_parameters=targets)
    arguments = SFTConfig(
        output_dir=given.output_dir,
        max_steps=given.max_steps,
        per_device_train_batch_size=given.per_device_train_batch_size,
        gradient_accumulation_steps=given.gradient_accumulation_steps,
        bf16=True,
        gradient_checkpointing=True,
        max_length=4096,
        packing=True,
        packing_strategy="bfd",
        assistant_only_loss=True,
        optim="adamw_torch_fused",
        learning_rate=2e-5,
        use_liger_kernel=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=load_dataset("json", data_files=given.train_data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(given.model_name_or_path),
        callbacks=[Lines()],
        peft_config=adapter,
    ).train()


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def main() -> None:
    if sys.argv[1:2] == ["peer"]:
        return peer(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="for models of 14 GB and what runs write")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=["sft", "TRL"])
    parser.add_argument("--rows", type=int, help="packs of a micro-batch, default the recipe's")
    parser.add_argument("--accumulation", type=int, help="micro-batches of a step, default the recipe's")
    parser.add_argument("--gpus", type=int, help="of runs on several, default two")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--skip", type=int, default=3, help="first steps that are not counted")
    parser.add_argument("--unsaved", action="store_true", help="end after --steps what begins as a longer run")
    parser.add_argument("--profile", action="store_true", help="of our runs, two steps again under a profiler")
    parser.add_argument("--further", nargs=argparse.REMAINDER, default=[], help="further words of hf-moe train")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "chats.jsonl").exists():
        from transformers import AutoTokenizer

        from hf_moe.demo import DEMO_MODEL

        packs = (args.rows or 4) * (args.accumulation or 8) * (args.steps + 1) * (args.gpus or 2)
        write_data(args.work / "chats.jsonl", 20 * packs, AutoTokenizer.from_pretrained(DEMO_MODEL))
    said = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": versions(),
        "setting": f"steps {args.skip + 2} to {args.steps}; conversations of random words, half below {MEDIAN} tokens",
        "runs": {},
    }
    last = None
    for name in args.runs:  # one model at a time is on the disk
        folder = folder_of(name, args)
        if last not in (None, folder):
            shutil.rmtree(last)
        last = folder
        if not folder.exists():
            subprocess.run([sys.executable, __file__, "build", RUNS[name][0], folder], check=True)
        said["runs"][name] = run(name, args)
        print(json.dumps({name: said["runs"][name]}, indent=1), flush=True)
        if args.profile and RUNS[name][2][: len(TRAIN)] == TRAIN:
            said["runs"][name]["profile"] = profiled(name, args)
            print(json.dumps(said["runs"][name]["profile"], indent=1), flush=True)
        if args.out:
            args.out.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["build"]:
        build(sys.argv[2], Path(sys.argv[3]))
    elif sys.argv[1:2] == ["profile"]:
        profile(*sys.argv[2:])
    else:
        main()
