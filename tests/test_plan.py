"""The plan beside what PyTorch allocates for small models that really train; and the scaling laws beside the paper."""

import importlib.util
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_moe.training.weights.groups import GROUPS, train_group

from hf_moe import HfMoeForCausalLM
from hf_moe.kernels.copies import HOLDERS
from hf_moe.routers import find_routers
from hf_moe.sizes import scaling_laws
from hf_moe.sizes.counts import sizes
from hf_moe.sizes.plan import (
    MEASURED,
    Rate,
    Run,
    flops_per_token,
    meta_model,
    model_to_train,
    plan,
    run_of_recipe,
    state_memory,
)
from hf_moe.sizes.speed import COSTS, count

from .conftest import tiny_config, tiny_model

SHARED = {"n_shared_experts": 1, "shared_expert_intermediate_size": 16}
SMALL = {"max_length": 24, "per_device_train_batch_size": 2, "bf16": False, "gradient_checkpointing": False}


def allocated(model) -> dict[str, int]:
    """Bytes of weights, gradients and AdamW's state after one step."""
    trained = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    model.train()
    ids = torch.arange(2, 26).unsqueeze(0)
    model(ids, labels=ids).loss.backward()
    for parameter in trained:  # an expert without a token
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    optimizer.step()
    states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    return {
        "weights": sum(x.nbytes for x in [*model.parameters(), *model.buffers()]),
        "gradients": sum(x.grad.nbytes for x in model.parameters() if x.grad is not None),
        "optimizer": sum(x.nbytes for x in states),
    }


def assert_planned(run: Run, config, model):
    found = state_memory(model_to_train(config, run), config, run)
    for part, size in allocated(model).items():
        assert found[part] == pytest.approx(size, rel=0.05), part


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("group", GROUPS)
def test_memory_of_a_group_is_what_pytorch_allocates(group, dtype):
    config = tiny_config(**SHARED)
    model = HfMoeForCausalLM(config).to(getattr(torch, dtype))
    train_group(model, group)
    assert_planned(Run(trainable=group, dtype=dtype, **SMALL), config, model)


@pytest.mark.parametrize("parts", [["attention"], ["routed_experts", "shared_experts"]], ids=" ".join)
def test_memory_of_an_adapter(parts):
    adapters = pytest.importorskip("hf_moe.training.weights.adapters")
    config = tiny_config(**SHARED)
    model, _ = adapters.add_adapter(HfMoeForCausalLM(config), adapters.AdapterArguments(lora_parts=parts, lora_r=3))
    assert_planned(Run(lora_parts=parts, lora_r=3, **SMALL), config, model)


def test_memory_of_chosen_experts():
    esft = pytest.importorskip("hf_moe.training.weights.esft")
    config = tiny_config()
    model = HfMoeForCausalLM(config)
    esft.split_experts(model, dict.fromkeys(find_routers(model), torch.tensor([0, 4, 6])))  # a share of 0.4 of seven
    assert_planned(Run(esft_p=0.4, **SMALL), config, model)


@pytest.mark.parametrize(("stored", "bytes_each"), [("nf4", 0.516), ("int4", 0.531), ("fp8", 1.0002)])
def test_weights_in_fewer_bits(stored, bytes_each):
    runs = [Run(lora_parts=["attention"], lora_base=base, **SMALL) for base in (None, stored)]
    plain, packed = (state_memory(model_to_train(tiny_config(), run), tiny_config(), run) for run in runs)
    model = meta_model(tiny_config(), "float32")
    kept = sum(x.numel() for name, x in model.named_parameters() if x.dim() == 1 or "gate.weight" in name)
    kept += 2 * model.lm_head.weight.numel()
    matrices = sum(x.numel() for x in model.parameters()) - kept
    saved = plain["weights"] - packed["weights"]
    assert saved == pytest.approx(matrices * (4 - bytes_each), rel=1e-3)


def saved_bytes(model, rows: int, length: int) -> int:
    """What autograd really keeps in a forward of the decoder, weights apart."""
    own, kept = {x.untyped_storage().data_ptr() for x in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model.train().base_model(input_ids=torch.randint(1, 97, (rows, length)), use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    "changes",
    [{}, SHARED, {"router_type": "sigmoid_topk"}, {"num_key_value_heads": 6, "qk_norm": "head"}],
    ids=["plain", "shared", "sigmoid", "mha"],
)
@pytest.mark.parametrize("group", ["all", "router_only"])
@pytest.mark.parametrize("experts", ["grouped_mm", "hf_moe"])
def test_activations_are_what_autograd_keeps(changes, group, experts):
    if experts == "hf_moe":
        interpreted = pytest.importorskip("triton").knobs.runtime.interpret
        if not interpreted:
            pytest.skip("needs TRITON_INTERPRET=1 before torch")
    model = tiny_model(**changes)
    model.set_experts_implementation(experts)
    train_group(model, group)
    run = Run(trainable=group, **SMALL, experts_implementation=experts)
    assert plan(model.config, run)["memory_per_gpu"]["activations"] == pytest.approx(
        saved_bytes(model, 2, 24), rel=0.02
    )


def test_checkpointing_keeps_the_input_of_each_layer():
    def activations(layers: int, checkpointing: bool = True):
        config = tiny_config(num_hidden_layers=layers, mlp_layer_types=["sparse"] * layers)
        run = Run(**SMALL | {"gradient_checkpointing": checkpointing})
        return plan(config, run)["memory_per_gpu"]["activations"]

    assert activations(3) - activations(2) == 2 * 24 * 48 * 4
    assert activations(3, False) > 2 * activations(3)


def test_copies_are_held_for_the_count_alone():
    report = plan(tiny_config(), Run(**SMALL | {"bf16": True, "gradient_accumulation_steps": 2}))
    assert report["memory_per_gpu"]["copies"] and not HOLDERS


def test_what_the_data_decide_is_not_guessed():
    report = plan(
        tiny_config(router_type="base", router_args={"solver": "auction"}, num_experts_per_tok=1), Run(**SMALL)
    )
    assert report["memory_per_gpu"]["activations"] is None and not report["activations_known"]


def test_sharding_cuts_what_it_says():
    def memory(**changes):
        run = Run(**SMALL | changes)
        return state_memory(model_to_train(tiny_config(), run), tiny_config(), run)

    none, zero1, zero2, zero3 = (memory(gpus=3, sharding=name) for name in ("none", "zero1", "zero2", "zero3"))
    whole = memory()
    assert none == whole | {"gradient_buckets": whole["gradients"]}
    third = {name: -(-whole[name] // 3) for name in ("weights", "gradients", "optimizer")}
    assert zero1 == whole | {"optimizer": third["optimizer"]}
    assert zero2 == whole | {"optimizer": third["optimizer"], "gradients": third["gradients"]}
    model = model_to_train(tiny_config(), Run(**SMALL))
    experts = sum(x.numel() for name, x in model.named_parameters() if ".experts." in name)
    assert zero3.keys() == third.keys() | {"gathered"} and {name: zero3[name] for name in third} == third
    cast = memory(gpus=3, sharding="zero3", bf16=True)
    assert cast["gathered"] == sum(x.nbytes for x in model.parameters()) - 2 * experts
    steps = memory(gpus=3, sharding="zero3", gradient_accumulation_steps=2)
    assert steps["whole_gradients"] == whole["gradients"]
    split = memory(gpus=3, sharding="expert_parallel", gradient_accumulation_steps=2, bf16=True)
    assert {name: split[name] for name in third} == third
    assert split["gathered"] == cast["gathered"] - 2 * experts + round(2 * experts / 3)
    assert split["whole_gradients"] == whole["gradients"] - 4 * experts + round(4 * experts / 3)


def test_experts_of_a_gpu_see_the_tokens_of_all():
    def activations(gpus: int) -> tuple[int, int]:
        run = Run(**SMALL | {"gradient_checkpointing": True}, gpus=gpus, sharding="expert_parallel")
        parts = plan(tiny_config(), run)["memory_per_gpu"]
        return parts["activations"], parts["backward"]

    (alone, layer), (three, layers) = activations(1), activations(3)
    assert layers == 3 * layer and three - alone == 2 * layer


def test_what_gpus_send_each_other():
    config = tiny_config()

    def sent(**changes) -> float:
        run = Run(**SMALL | changes)
        model = model_to_train(config, run)
        return count(model, config, run, flops_per_token(model, config, run)).sent_bytes

    model = model_to_train(config, Run(**SMALL))
    all_weights = sum(x.nbytes for x in model.parameters())
    experts = sum(x.nbytes for name, x in model.named_parameters() if ".experts." in name)
    assert sent() == 0
    assert sent(gpus=2) == sent(gpus=2, sharding="zero2") == all_weights
    assert sent(gpus=2, sharding="zero3") == (2 * all_weights + all_weights) / 2  # forward, backward; gradients
    assert sent(gpus=2, sharding="zero3", bf16=True) == (all_weights - experts / 2 + all_weights) / 2
    sparse, tokens = config.mlp_layer_types.count("sparse"), 2 * 24
    exchanged = 2 * sparse * 2 * tokens * config.hidden_size * 4  # there and back, in both passes
    assert sent(gpus=2, sharding="expert_parallel") == 3 * (all_weights - experts) / 2 + exchanged


def test_an_adapter_is_planned_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        plan(tiny_config(), Run(**SMALL, lora_parts=["attention"]))


def test_time_from_a_rate():
    config, run = tiny_config(), Run(**SMALL | {"gradient_checkpointing": True}, gpus=2, train_tokens=1e6)
    forward = sizes(config, 24)["flops_per_token"]
    sparse, width = config.mlp_layer_types.count("sparse"), config.moe_intermediate_size * config.hidden_size
    second = 2 * sparse * config.num_experts_per_tok * width  # what kernels' experts need not compute again
    report = plan(config, run, Rate(1e9, "mine"))
    assert report["memory_per_gpu_total"] == sum(report["memory_per_gpu"].values())
    assert report["trained_params"] == report["total_params"] == sizes(config)["total_params"]
    assert report["tokens_per_second"] == pytest.approx(2 * 1e9 / (4 * forward - second))
    others = plan(config, replace(run, experts_implementation="grouped_mm"), Rate(1e9, "mine"))
    assert others["tokens_per_second"] == pytest.approx(2 * 1e9 / (4 * forward))
    assert report["days"] == pytest.approx(1e6 / report["tokens_per_second"] / 86400)
    model_rate = plan(config, run, Rate(1e9, "mine", counts_recomputation=False))
    assert model_rate["tokens_per_second"] == pytest.approx(2 * 1e9 / (3 * forward))
    frozen = plan(config, Run(**SMALL, trainable="router_only"), Rate(1e9, "mine"))
    assert 1 / 2.1 < frozen["tokens_per_second"] * forward / 1e9 < 1 / 2


def test_default_rate_of_a_budget_is_the_measured_one():
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "moe_layer.json"
    measured = json.loads(path.read_text(encoding="utf-8"))["results"]["OLMoE-1B-7B"]["grouped_mm"]
    assert MEASURED.flops == measured["forward_backward_tflops"] * 1e12


def test_a_forward_that_counts_is_planned_where_there_is_one():
    def planned(**changes):
        return plan(tiny_config(), Run(**SMALL | {"router_aux_loss_coef": 0.1} | changes), Rate(1e9, "mine"))

    forward = sizes(tiny_config(), 24)["flops_per_token"]
    counted = planned(gradient_accumulation_steps=2)
    assert counted["flops_per_token"]["counting"] == forward
    assert counted["tokens_per_second"] == pytest.approx(1e9 / (4 * forward))
    held = planned(gradient_accumulation_steps=2, gradient_checkpointing=True)
    without = planned(gradient_accumulation_steps=2, router_aux_loss_coef=0.0)
    assert [x["flops_per_token"]["counting"] for x in (planned(), held, without)] == [0, 0, 0]


def test_selective_checkpointing_repeats_the_up_projections_of_latent_attention():
    ranks = {"q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
    config = tiny_config(attention_type="mla", num_key_value_heads=6, num_mtp_layers=1, **ranks)

    def planned(checkpointing, config=config):
        return plan(config, Run(**SMALL | {"gradient_checkpointing": checkpointing}), Rate(1e9, "mine"))

    selective = planned("selective")["flops_per_token"]
    up_projections = 6 * (12 * (8 + 4) + 8 * (8 + 6))
    assert selective["recomputation"] == 2 * 3 * up_projections
    assert selective["forward"] == planned(False)["flops_per_token"]["forward"]
    assert planned("selective", tiny_config())["flops_per_token"]["recomputation"] == 0
    none, some, full = (planned(x)["memory_per_gpu"]["activations"] for x in (False, "selective", True))
    assert full < some < none


def test_time_of_experts_that_are_not_computed_again():
    """By the work that is counted: full checkpointing adds the experts' first product, selective none of theirs."""
    config = tiny_config()
    works = {}
    for checkpointing in (False, "selective", True):
        run = Run(**SMALL | {"gradient_checkpointing": checkpointing})
        model = model_to_train(config, run)
        work = count(model, config, replace(run, bf16=True), flops_per_token(model, config, run))
        works[checkpointing] = work.products
    assert works["selective"] == pytest.approx(works[False]) and works[True] > works[False]


def fit_speed():
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "fit_speed.py"
    spec = importlib.util.spec_from_file_location("fit_speed", path)
    script = importlib.util.module_from_spec(spec)
    sys.modules["fit_speed"] = script  # which its dataclasses are looked up in
    spec.loader.exec_module(script)
    return script


def test_time_is_near_what_the_tables_measured():
    """Tokens a second of each training run in the tables of benchmarks/results, within 15%."""
    points = fit_speed().points()
    assert len(points) == 16
    for point in points:
        assert 0.85 <= point.speed() <= 1.15, f"{point.name}: {point.speed():.3f}"


def test_memory_is_near_what_runs_of_recipes_took():
    """The most that nvidia-smi showed, within 15%."""
    script = fit_speed()
    for name, config, run, measured in script.recipe_runs():
        said = plan(config, run)["memory_per_gpu_total"] / 2**30
        assert 0.85 <= said / measured["peak_gib"] <= 1.15, f"{name}: {said:.1f} of {measured['peak_gib']} GiB"


def test_costs_are_those_of_the_fit():
    script = fit_speed()
    measured = script.points()
    costs = script.fit(measured, first=COSTS, steps=100)
    for point in measured:
        assert point.speed(costs) == pytest.approx(point.speed(), rel=0.02), point.name


def test_time_of_a_plan():
    config, run = tiny_config(), Run(**SMALL, gpus=2, gradient_accumulation_steps=3)
    report = plan(config, run)
    assert report["tokens_per_second"] == pytest.approx(2 * 3 * 48 / report["seconds_per_step"])
    low, high = report["tokens_per_second_range"]
    assert low < report["tokens_per_second"] < high
    # Of so small a model all is the host's: launches of three layers, forward and backward, and the trainer's.
    host = 3 * (3 * 2 * COSTS.layer + 2 * COSTS.balance + COSTS.batch)
    update = 4 * report["trained_params"] * COSTS.trained_byte
    sent = 4 * report["trained_params"] * COSTS.sent_byte  # gradients: half there, half back
    assert report["seconds_per_step"] == pytest.approx(host + update + sent)
    assert plan(config, Run(**SMALL | {"gradient_checkpointing": True}))["seconds_per_step"] > host / 3


def test_a_recipe_says_what_it_says():
    stages = pytest.importorskip("hf_moe.training.main")
    run = run_of_recipe(stages.arguments_of("olmoe-1b-7b/dense_only"), gpus=4)
    assert (run.trainable, run.dtype, run.bf16, run.stage, run.gpus) == ("dense_only", "float32", True, "sft", 4)
    assert (run.per_device_train_batch_size, run.max_length, run.gradient_checkpointing) == (4, 4096, True)
    assert run.optim == "adamw_torch_fused" and run.lora_parts is None
    config = tiny_config()
    assert plan(config, run_of_recipe({"stage": "distil"}, **SMALL))["not_counted"] == "the teacher"
    assert "logits" not in plan(config, run_of_recipe({"stage": "sft"}, **SMALL))["memory_per_gpu"]
    assert plan(config, Run(**SMALL))["memory_per_gpu"]["logits"] == 2 * 24 * 97 * 8
    assert plan(config, Run(**SMALL, ema_decay=0.99))["cpu_memory_ema"] == 4 * plan(config, Run())["trained_params"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sharding": "fsdp"}, "sharding is fsdp; plan knows none, zero1"),
        ({"optim": "lion"}, "optim is lion; plan knows adamw_torch"),
        ({"dtype": "int3"}, "dtype is int3; plan knows auto, float32"),
        ({"gpus": 0}, "gpus is 0; it must be at least 1"),
        ({"experts_implementation": "eager"}, "experts_implementation is eager; plan knows the speed of grouped_mm"),
        ({"train_tokens": -1.0}, "train_tokens is -1; it must be above 0"),
        ({"trainable": "moe"}, "trainable is 'moe'"),
        ({"lora_parts": ["router"]}, "lora_parts is"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_refused(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        plan(tiny_config(), Run(**SMALL | changes))
    assert "\n" not in str(error.value)


def test_nothing_is_allocated():
    model = model_to_train(tiny_config(), Run())
    assert {x.device.type for x in model.parameters()} == {"meta"}


# ---- the laws ----

# DeepSeek LLM, table 2: layers, hidden size, learning rate, batch in sequences of 4096; both saw 2T tokens.
PUBLISHED = {"7B": (30, 4096, 4.2e-4, 2304), "67B": (95, 8192, 3.2e-4, 4608)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_laws_give_the_settings_of_the_models_they_were_made_for(name):
    layers, hidden, rate, batch = PUBLISHED[name]
    compute = (72 * layers * hidden**2 + 12 * layers * hidden * 4096) * 2e12
    assert scaling_laws.learning_rate(compute) == pytest.approx(rate, rel=0.03)
    assert scaling_laws.batch_tokens(compute) == pytest.approx(batch * 4096, rel=0.1)


@pytest.mark.parametrize("compute", [1e17, 3e20, 1e24])
def test_model_and_data_make_the_compute(compute):
    report = scaling_laws.planned(compute)
    assert report["model_flops_per_token"] * report["train_tokens"] == pytest.approx(compute, rel=1e-3)


def test_no_compute():
    for compute in (0, float("inf")):
        with pytest.raises(ValueError, match=f"flops is {compute}; it must be above 0, and a number"):
            scaling_laws.planned(compute)


def test_model_scale_of_a_dense_transformer_is_the_papers():
    """Eq. 2, with a gated MLP of 8/3 the hidden size."""
    config = tiny_config(mlp_layer_types=["dense"] * 3, intermediate_size=128, num_key_value_heads=6)
    m = sizes(config, 64)["non_embedding_training_flops_per_token"]
    assert m == 72 * 3 * 48**2 + 12 * 3 * 48 * 64


@pytest.mark.parametrize("checkpointing", [False, True], ids=["apart", "at once"])
def test_the_bubbles_are_those_of_the_work_that_is_counted(checkpointing):
    run = Run(**SMALL | {"gradient_checkpointing": checkpointing}, gradient_accumulation_steps=8, pipeline=2)
    found = plan(tiny_config(), run, MEASURED)
    counted = found["flops_per_token"]
    forward, backward = counted["forward"], counted["backward"] + counted["recomputation"]
    assert backward == 2 * forward or checkpointing
    # (N - 1) F / 2, as gradients of inputs and of weights are a forward each; and, not taken apart, (N - 1) B.
    bubble = backward if checkpointing else forward / 2
    assert found["pipeline_bubbles"]["zbv"] == pytest.approx(bubble / (bubble + 8 * (forward + backward)))
    assert found["pipeline_bubbles"]["1f1b"] == pytest.approx(1 / 9)
    assert list(found["pipeline_bubbles"]) == ["1f1b", "interleaved", "zbv", "dualpipev"]
    assert "pipeline_bubbles" not in plan(tiny_config(), replace(run, pipeline=None), MEASURED)


@pytest.mark.parametrize("processes", [1, 9])
def test_a_pipeline_has_processes_and_a_micro_batch_for_each(processes):
    with pytest.raises(ValueError, match=f"pipeline is {processes}, and a step has 8 micro-batches"):
        plan(tiny_config(), Run(**SMALL, gradient_accumulation_steps=8, pipeline=processes))
