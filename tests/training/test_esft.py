"""ESFT: the scores and the choice beside slow ones; training moves the chosen rows alone; merging is exact."""

import copy

import pytest
import torch
from hf_moe.training.main import main
from hf_moe.training.weights.esft import (
    ROWS_FILE,
    chosen_experts,
    load_rows,
    merge_rows,
    save_rows,
    score_experts,
    select_experts,
    split_experts,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from .balance_worker import train_one_step
from .models import collate, deepseek_v3, hf_moe, mixtral, olmoe, rows

MODELS = {
    "hf_moe": lambda: hf_moe(mlp_layer_types=["dense", "sparse"], n_shared_experts=1, mlp_bias=True),
    "deepseek_v3": deepseek_v3,
    "mixtral": mixtral,
    "olmoe": olmoe,
}
BATCHES = [collate(rows(7, seed=seed)) for seed in (1, 2, 3)]


@pytest.mark.parametrize("score", ["token", "gate"])
@pytest.mark.parametrize("name", MODELS)
def test_scores_token_by_token(name, score):
    model = MODELS[name]().eval()
    scores = score_experts(model, BATCHES, score)
    assert len(scores) == sum(hasattr(layer.mlp, "experts") for layer in model.model.layers)
    for router, values in scores.items():
        outputs = []
        handle = model.get_submodule(router).register_forward_hook(lambda m, a, out, seen=outputs: seen.append(out))
        total = [0.0] * len(values)
        for batch in BATCHES:
            with torch.no_grad():
                model(**batch)
            _, weights, index, *_ = outputs.pop()
            for token, counts in enumerate(batch["attention_mask"].flatten().tolist()):
                for weight, expert in zip(weights[token].tolist(), index[token].tolist(), strict=True):
                    total[expert] += counts * (1 if score == "token" else weight)
        handle.remove()
        torch.testing.assert_close(values, torch.tensor(total).double() / sum(total), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("p", "expected"), [(0.01, [3]), (0.4, [3]), (0.41, [1, 3]), (0.7, [1, 3]), (0.75, [0, 1, 3]), (1.0, [0, 1, 2, 3])]
)
def test_fewest_experts_that_reach_p_in_each_layer(p, expected):
    """A layer with fewer tokens is not chosen from less."""
    scores = {"a": torch.tensor([0.2, 0.3, 0.1, 0.4]).double(), "b": torch.tensor([1.0, 0, 0, 0]).double()}
    chosen = select_experts(scores, p)
    assert (chosen["a"].tolist(), chosen["b"].tolist()) == (expected, [0])


@pytest.mark.parametrize("p", [0.0, -0.1, 1.1])
def test_p_out_of_range(p):
    with pytest.raises(ValueError, match=f"esft_p is {p}; it must be above 0 and at most 1"):
        select_experts({}, p)


def split(name):
    model = MODELS[name]()
    chosen = select_experts(score_experts(model, BATCHES), 0.4)
    assert any(len(index) < 6 for index in chosen.values())
    return model, chosen, split_experts(model, chosen)


@pytest.mark.parametrize("name", MODELS)
def test_split_model_computes_what_the_whole_one_does(name):
    model, chosen, said = split(name)
    with torch.no_grad():
        assert torch.equal(model.eval()(**BATCHES[0]).logits, MODELS[name]().eval()(**BATCHES[0]).logits)
    assert f"ESFT trains {sum(map(len, chosen.values()))} experts in {len(chosen)} layers" in said
    assert {router: index.tolist() for router, index in chosen_experts(model).items()} == {
        router: index.tolist() for router, index in chosen.items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_five_steps_move_the_chosen_rows_alone(name, tmp_path):
    """And the saved file gives them back to a whole model, bit for bit; the optimizer knows rows alone."""
    model, chosen, _ = split(name)
    before = MODELS[name]().state_dict()
    _, trainer = train_one_step(model, 2, max_steps=5, learning_rate=1e-2, weight_decay=0.1, router_aux_loss_coef=0.1)
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    trained = {id(x) for x in model.parameters() if x.requires_grad}
    assert {id(x) for x in optimizer.state} == trained
    lengths = {len(index) for index in chosen.values()}
    assert all(len(state["exp_avg"]) in lengths for state in optimizer.state.values())

    save_rows(model, tmp_path)
    split_logits = model.eval()(**BATCHES[0]).logits
    loaded = MODELS[name]()
    load_rows(loaded, tmp_path)
    merge_rows(model)
    after = model.state_dict()
    assert after.keys() == before.keys() and not chosen_experts(model)
    for key, value in before.items():
        assert torch.equal(loaded.state_dict()[key], after[key]), key
        router = next((r for r in chosen if key.startswith(r.replace("gate", "experts"))), None)
        rows_moved = [i for i in range(len(value)) if not torch.equal(value[i], after[key][i])]
        assert rows_moved == (chosen[router].tolist() if router else []), key
    torch.testing.assert_close(loaded.eval()(**BATCHES[0]).logits, split_logits, rtol=1e-5, atol=1e-5)


def test_file_of_another_model_or_choice(tmp_path):
    model, chosen, _ = split("olmoe")
    save_rows(model, tmp_path)
    with pytest.raises(ValueError, match="does not fit the model: "):
        load_rows(MODELS["hf_moe"](), tmp_path)
    other = MODELS["olmoe"]()
    split_experts(other, {router: (index + 1) % 6 for router, index in chosen.items()})
    with pytest.raises(ValueError, match="rows of other experts"):
        load_rows(other, tmp_path)
    saved = load_file(tmp_path / ROWS_FILE)
    lost = next(key for key in saved if key.endswith("down_proj"))
    save_file({key: x for key, x in saved.items() if key != lost}, tmp_path / ROWS_FILE)
    with pytest.raises(ValueError, match=f"1 tensors, the first of them {lost}"):
        load_rows(copy.deepcopy(model), tmp_path)
    with pytest.raises(FileNotFoundError, match="has no expert_rows"):
        load_rows(model, tmp_path / "absent")


@pytest.fixture
def command(model_folder, data_folder, tmp_path):
    def words(*extra, output="out"):
        places = {"--model_name_or_path": model_folder, "--output_dir": tmp_path / output}
        places |= {"--train_data": data_folder / "train.jsonl", "--eval_data": data_folder / "val.jsonl"}
        given = [str(word) for pair in places.items() for word in pair]
        return ["tiny/sft", *given, "--esft_p", "0.3", "--esft_batches", "2", "--max_steps", "6", *extra]

    return words


def test_run_saves_rows_alone_and_the_merged_model(command, model_folder, tmp_path, capsys):
    metrics = main(command("--esft_merge", "--learning_rate", "1e-2"))
    said = capsys.readouterr().err
    assert "ESFT trains" in said and "trainable all" not in said  # which would not be true
    assert metrics["eval_loss"] < metrics["eval_loss_before"]
    out = tmp_path / "out"
    assert [path.name for path in out.glob("*.safetensors")] == [ROWS_FILE] and not list(out.glob(".*"))
    merged, loaded = (AutoModelForCausalLM.from_pretrained(path) for path in (out / "merged", model_folder))
    before = copy.deepcopy(loaded.state_dict())
    load_rows(loaded, out)
    changed = {key for key, x in merged.state_dict().items() if not torch.equal(x, before[key])}
    assert changed and all(".experts." in key for key in changed)
    assert all(torch.equal(x, loaded.state_dict()[key]) for key, x in merged.state_dict().items())


def test_resumed_run_ends_bitwise_where_the_unbroken_one_ends(command, tmp_path):
    main(command("--save_steps", "2", output="whole"))
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    main(command("--save_steps", "2", "--resume_from_checkpoint", str(checkpoint), output="resumed"))
    whole, resumed = (load_file(tmp_path / name / ROWS_FILE) for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], x) for key, x in resumed.items())
    start = load_file(checkpoint / ROWS_FILE)
    assert not all(torch.equal(start[key], x) for key, x in whole.items())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--trainable", "moe_only"], "esft_p is 0.3 and trainable is moe_only: each says what trains"),
        (["--lora_parts", "attention"], r"esft_p is 0.3 and lora_parts is \['attention'\]"),
        (["--esft_batches", "0"], "esft_batches is 0; it must be at least 1"),
        (["--esft_p", "1.5"], "esft_p is 1.5; it must be above 0"),
        (["--esft_score", "loss"], "esft_score: invalid choice: 'loss'"),
    ],
)
def test_arguments_that_contradict_each_other(command, extra, message):
    with pytest.raises(ValueError, match=message):
        main(command(*extra))
