"""Each shipped recipe, end to end, on a tiny model of its architecture: what it changed is what it says it trains."""

import pytest
import torch
from hf_moe.training.main import arguments_of, main
from hf_moe.training.recipes.files import read_recipe, shipped_recipes
from hf_moe.training.weights.adapters import LORA_PARTS
from hf_moe.training.weights.groups import GROUPS, part_of
from transformers import AutoModelForCausalLM

from hf_moe.sizes.presets import preset_config
from tests.recipes import NEED_TORCHAO

from .conftest import tiny_tokenizer
from .models import LATENT, hf_moe, mixtral, olmoe, qwen3_moe

BYTES = {"vocab_size": 259, "max_position_embeddings": 256}
MLA = {name: size for name, size in LATENT.items() if name != "q_lora_rank"} | {"num_key_value_heads": 4}
ARCHITECTURES = {
    "tiny": lambda: hf_moe(**BYTES),
    "smollm2-135m": lambda: hf_moe(**BYTES, router_type="topk_softmax", tie_word_embeddings=True),
    "olmoe-1b-7b": lambda: olmoe(**BYTES),
    "mixtral-8x7b": lambda: mixtral(**BYTES),
    "qwen3-30b-a3b": lambda: qwen3_moe(**BYTES),
    "deepseek-v2-lite": lambda: hf_moe(
        **BYTES, **MLA, attention_type="mla", mlp_layer_types=["dense", "sparse"], n_shared_experts=2
    ),
}
TRAINED = {
    "sft": GROUPS["all"],
    "large_sft": GROUPS["all"],
    "sft_bf16": GROUPS["all"],
    "dense_only": GROUPS["dense_only"],
    "lora_attention": ("attention",),
    "lora_experts": tuple(part for part in LORA_PARTS if part != "attention"),
    "esft": ("routed_experts",),
    "pretrain": GROUPS["all"],
    "continue": GROUPS["all"],
    "distil": GROUPS["all"],
}
OTHERWISE = {"olmoe-1b-7b/distil": GROUPS["moe_only"]}
# A few seconds without a GPU; no warm-up, which would leave the first step without a change.
SMALL = {"bf16": "false", "use_cpu": "true", "max_steps": 2, "max_length": 256, "per_device_train_batch_size": 2}
SMALL |= {"gradient_accumulation_steps": 2, "save_strategy": "no", "warmup_steps": 0}
# What a stage wants beside it, or instead.
PRETRAIN = {"gradient_accumulation_steps": 1, "max_steps": -1, "train_tokens": 1024, "batch_tokens": 512}


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name.split("/")[1] in TRAINED])
def test_recipe_runs_and_trains_its_parts(name, data_folder, text_folder, tmp_path):
    architecture, kind = name.split("/")
    stage = read_recipe(name).get("stage")
    model = ARCHITECTURES[architecture]()
    for weight in model.parameters():  # as releases are: recipes of adapters load them in bfloat16
        weight.data = weight.data.bfloat16().float()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    places = {"model_name_or_path": tmp_path / "model", "train_data": data_folder, "eval_data": data_folder}
    given = SMALL | places | {"output_dir": tmp_path / "out"}
    if stage == "pretrain":
        given |= PRETRAIN | {"train_data": text_folder, "eval_data": text_folder}
        given |= {"from_scratch": kind == "pretrain"}
    if (
        read_recipe(name).get("optim") in NEED_TORCHAO
    ):  # whose rounding is its own, and moves norms by small steps, too
        given |= {"optim": "adamw_torch_fused", "optim_args": "null", "learning_rate": 1e-2}
    if architecture == "qwen3-30b-a3b":
        given |= {"chat_template_path": "plain"}  # this tokenizer has none of its own
    if stage == "distil":
        given |= {"teacher_model_name_or_path": tmp_path / "model"}
    metrics = main([name, *(f"--{key}={value}" for key, value in given.items())])
    losses = [name for name in metrics if f"{name}_before" in metrics]  # of each source, where the recipe says so
    assert metrics["train_loss"] > 0 and losses and all(metrics[name] != metrics[f"{name}_before"] for name in losses)
    whole = tmp_path / "out" / ("merged" if kind.startswith("lora") or kind == "esft" else ".")
    after = AutoModelForCausalLM.from_pretrained(whole).state_dict()
    before = model.state_dict()
    assert after.keys() == before.keys()
    changed = {part_of(key) for key, x in after.items() if not torch.equal(x, before[key])}
    assert changed == set(OTHERWISE.get(name, TRAINED[kind])) & {part_of(key) for key in before}


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name.startswith("deepseek-v2-lite/")])
def test_the_releases_own_balance_loss_is_off(name):
    """DeepSeek-V2-Lite's configuration has a loss within sequences, which a recipe that is silent on it would keep."""
    assert preset_config("deepseek-v2-lite").seq_aux_loss_coef > 0
    given = arguments_of(name)
    assert given["seq_aux_loss_coef"] == 0
    sparse_layers = 26  # DeepSeek adds its loss in each, hf_moe takes their mean
    expected = 0.001 * sparse_layers if name.endswith("/pretrain") else 0
    assert given["router_aux_loss_coef"] == pytest.approx(expected)
