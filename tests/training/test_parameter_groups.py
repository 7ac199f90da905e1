"""What each group trains: exactly its parameters, bit for bit, and no gradient or optimizer state beside them."""

import pytest
import torch
from hf_moe.training.main import main
from hf_moe.training.weights.groups import GROUPS, PARTS, part_of, part_sizes, train_group

from hf_moe import HfMoeConfig, HfMoeForCausalLM

from .balance_worker import train_one_step
from .conftest import SIZES as TINY
from .conftest import tiny_tokenizer
from .models import BIASED, hf_moe, hf_moe_biased
from .models import MODELS as PUBLISHED

# One model with every part; sandwiched norms, biases, sinks and gates have names of their own.
EVERY_PART = {
    "num_hidden_layers": 3,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "n_shared_experts": 1,
    "shared_expert_gate": True,
    "moe_latent_size": 8,
    "qk_norm": "head",
    "attention_sinks": True,
    "attention_bias": True,
    "mlp_bias": True,
    "layer_norm_placement": "sandwich",
    "num_mtp_layers": 1,
}
# Group -> endings of the names that it trains in that model, written out by hand.
ATTENTION = ["q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"]
ATTENTION += ["q_proj.bias", "k_proj.bias", "v_proj.bias", "self_attn.sinks"]
MLP = [f"{name}_proj.{kind}" for name in ("gate", "up", "down") for kind in ("weight", "bias")]
FFN = [f"{where}.{name}" for where in ("mlp", "shared_experts") for name in MLP] + ["shared_expert_gate.weight"]
FFN += ["fc1_latent_proj.weight", "fc2_latent_proj.weight"]
ROUTER = ["mlp.gate.weight"]
EXPERTS = [f"experts.{name}_proj{kind}" for name in ("gate_up", "down") for kind in ("", "_bias")]
REST = ["norm.weight", "embed_tokens.weight", "lm_head.weight", "eh_proj.weight"]
TRAINED = {
    "all": ATTENTION + FFN + ROUTER + EXPERTS + REST,
    "dense_only": ATTENTION + FFN + REST,
    "attention_only": ATTENTION,
    "ffn_only": FFN,
    "moe_only": EXPERTS + ROUTER,
    "router_only": ROUTER,
    "router_frozen": ATTENTION + FFN + EXPERTS + REST,
}
RUN = {"learning_rate": 1e-2, "weight_decay": 0.1, "router_aux_loss_coef": 0.1, "max_steps": 5}


def every_part():
    return hf_moe(**EVERY_PART)


def snapshot(model):
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


@pytest.mark.parametrize("group", GROUPS)
def test_five_steps_change_exactly_the_group(group):
    assert TRAINED.keys() == GROUPS.keys()
    model = every_part()
    expected = {name for name, _ in model.named_parameters() if name.endswith(tuple(TRAINED[group]))}
    train_group(model, group)
    before = snapshot(model)
    gradient, trainer = train_one_step(model, 2, **RUN)
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == expected
    assert gradient.keys() == expected
    names = {id(x): name for name, x in model.named_parameters()}
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert {names[id(x)] for x in optimizer.state} == expected
    assert {names[id(x)] for entry in optimizer.param_groups for x in entry["params"]} == expected
    held = sum(x.numel() for state in optimizer.state.values() for name, x in state.items() if name != "step")
    assert held == 2 * sum(model.get_parameter(name).numel() for name in expected)  # Adam's moments, and no more


# Endings of what the experts' groups hold in Transformers' own families.
EXPERT_SIDE = ("mlp.gate.weight", "mlp.router.weight", "experts.gate_up_proj", "experts.down_proj")


@pytest.mark.parametrize("group", ["dense_only", "moe_only"])
@pytest.mark.parametrize("name", ["deepseek_v3", "mixtral"])
def test_five_steps_change_exactly_the_group_of_a_published_family(name, group):
    model = PUBLISHED[name]()
    moe = {parameter for parameter, _ in model.named_parameters() if parameter.endswith(EXPERT_SIDE)}
    assert len(moe) == 3 * 2
    expected = moe if group == "moe_only" else {name for name, _ in model.named_parameters()} - moe
    train_group(model, group)
    before = snapshot(model)
    train_one_step(model, 1, **RUN)
    assert {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])} == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_parts_hold_every_parameter_once(name):
    model = PUBLISHED[name]()
    sizes = part_sizes(model)
    assert sum(size.parameters for size in sizes.values()) == sum(x.numel() for x in model.parameters())
    assert {"embeddings", "norms", "attention", "routed_experts", "router"} <= sizes.keys() <= PARTS.keys()


@pytest.mark.parametrize(
    ("changes", "part", "names"),
    [
        ({"attention_type": "moa", "num_attention_heads": 2}, "router", {"self_attn.gate.weight"}),
        (
            {"attention_type": "moa", "num_attention_heads": 2},
            "routed_experts",
            {"self_attn.q_experts", "self_attn.o_experts"},
        ),
        (
            {"router_type": "topk_softmax", "router_args": {"noise": True}},
            "router",
            {"mlp.gate.noise_weight", "mlp.gate.weight"},
        ),
        ({"tie_word_embeddings": True}, "embeddings", {"model.embed_tokens.weight"}),
    ],
    ids=["moa-router", "moa-experts", "noise", "tied"],
)
def test_part_of_unusual_parameters(changes, part, names):
    found = {name for name, _ in hf_moe(**changes).named_parameters() if part_of(name) == part}
    assert all(any(name.endswith(ending) for name in found) for ending in names)


def test_description_counts_by_hand():
    model = hf_moe()
    sizes = {name: x.numel() for name, x in model.named_parameters()}
    routers = [name for name in sizes if name.endswith("gate.weight")]
    share = sum(sizes[name] for name in routers) / sum(sizes.values())
    text = train_group(model, "router_only")
    assert f"router_only: 2 of {len(sizes)} tensors, 384 of {sum(sizes.values()):,} parameters ({share:.2%})" in text
    assert text.endswith("router 384; frozen: embeddings, norms, attention, routed_experts")


def test_empty_group_and_unknown_group_and_unknown_parameter():
    model = hf_moe()
    with pytest.raises(ValueError, match="trainable ffn_only has no parameter in this model: it takes dense_mlp"):
        train_group(model, "ffn_only")
    assert all(x.requires_grad for x in model.parameters())
    with pytest.raises(ValueError, match=r"trainable is 'denseonly'; it can be all, dense_only"):
        train_group(model, "denseonly")
    model.model.adapter = torch.nn.Linear(2, 2)
    assert ", other 6; frozen: routed_experts, router" in train_group(model, "dense_only")


@pytest.mark.parametrize("group", ["dense_only", "router_frozen", "attention_only"])
def test_frozen_router_still_balances(group):
    """The loss is logged, and its gradient reaches the trained layers below the router through the router's input."""
    gradients = []
    for coefficient in (0.0, 10.0):
        model = hf_moe()
        train_group(model, group)
        gradient, trainer = train_one_step(model, 1, router_aux_loss_coef=coefficient, balance_over="step")
        gradients.append(gradient)
        assert ("aux_loss" in trainer.state.log_history[0]) == bool(coefficient)
    name = "model.layers.0.self_attn.o_proj.weight"
    assert (gradients[0][name] - gradients[1][name]).abs().max() > 1e-3


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_frozen_routers_train_under_checkpointing(checkpointing):
    model = hf_moe_biased()
    train_group(model, "dense_only")
    gradient, _ = train_one_step(model, 2, gradient_checkpointing=checkpointing, router_aux_loss_coef=0.1)
    assert all(x.abs().max() > 0 for x in gradient.values())


def biased_folder(folder, **changes):
    """A tiny model with selection biases that would move, and its tokenizer."""
    torch.manual_seed(0)
    model = HfMoeForCausalLM(HfMoeConfig(**TINY, **BIASED, router_bias_update_speed=1e-2, **changes))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


@pytest.fixture
def command(data_folder, tmp_path):
    def arguments(*extra):
        places = {"--model_name_or_path": tmp_path / "model", "--output_dir": tmp_path / "out"}
        places["--train_data"] = data_folder / "train.jsonl"
        words = [str(word) for pair in places.items() for word in pair]
        return ["tiny/sft", *words, "--max_steps", "2", "--save_strategy", "no", *extra]

    return arguments


@pytest.mark.parametrize(
    ("group", "extra", "moves"),
    [("dense_only", (), False), ("dense_only", ("--router_bias_update_speed", "0.01"), True), ("moe_only", (), True)],
    ids=["frozen", "frozen-speed", "trained"],
)
def test_recipe_trains_the_group_and_a_frozen_router_keeps_its_bias(group, extra, moves, command, tmp_path, capsys):
    before = biased_folder(tmp_path / "model").state_dict()
    main(command("--trainable", group, *extra))
    after = HfMoeForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    changed = {name for name, x in after.items() if not torch.equal(x, before[name])}
    moved = {part_of(name) for name in changed if not name.endswith("correction_bias")}
    assert moved == set(GROUPS[group]) & {part_of(name) for name in before}
    assert any(name.endswith("e_score_correction_bias") for name in changed) == moves
    assert f"trainable {group}: " in capsys.readouterr().err
