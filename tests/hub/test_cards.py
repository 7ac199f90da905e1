"""Model cards: what each kind of folder says of itself, what the user adds, and nothing besides."""

import json
import math
import sys

import pytest
import torch
from hf_moe.training.output.record import describe, write_record
from hf_moe.training.weights.esft import save_rows, split_experts
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM

from hf_moe import HfMoeConfig
from hf_moe.hub import inherited, push, write_model_card
from hf_moe.hub.curves import curve_table
from tests.conftest import tiny_model

HUB = {"source": "someone/dense", "revision": "0" * 40, "method": "upcycle", "strategy": "copy"}


def saved(folder, provenance=None, **changes):
    model = tiny_model(**changes)
    model.config.provenance = provenance
    model.save_pretrained(folder)
    return folder


def card_of(folder, **told) -> ModelCard:
    path = write_model_card(folder, **told)
    text = path.read_text()
    assert "None" not in text and "\n\n\n" not in text and "{{" not in text
    return ModelCard.load(path)


def test_what_yaml_makes_no_text_is_not_inherited(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\nlanguage: [en, no]\ndatasets: [2020-01-01]\n---\n")
    assert inherited(tmp_path) == {"source_card": {"license": "mit", "language": ["en"]}}


def test_what_the_user_tells_comes_first_and_stays(tmp_path, command):
    folder = saved(tmp_path, HUB | {"source_card": {"license": "apache-2.0", "datasets": ["a/b"], "language": ["en"]}})
    data = card_of(folder).data
    assert (data.base_model, data.license, data.datasets, data.language) == (
        "someone/dense",
        "apache-2.0",
        ["a/b"],
        ["en"],
    )
    words = [
        "--license",
        "mit",
        "--dataset",
        "c/d",
        "--dataset",
        "e/f",
        "--base-model",
        "me/other",
        "--language",
        "de",
    ]
    assert command("card", folder, *words).code == 0
    told = ModelCard.load(folder / "README.md")
    for _ in range(2):
        data = told.data
        assert (data.base_model, data.license, data.datasets, data.language) == (
            "me/other",
            "mit",
            ["c/d", "e/f"],
            ["de"],
        )
        assert (
            data.base_model_relation == "finetune"
            and "[someone/dense](https://huggingface.co/someone/dense)" in told.text
        )
        told = card_of(folder)
    code, _, err = command("card", folder, "--base-model", "/home/someone/dense")
    assert code == 2 and "/home/someone/dense" in err and err.count("\n") == 1


def test_a_merged_model_names_all_its_bases(tmp_path):
    sibling = {"source": "someone/maths", "revision": "1" * 40, "sha256": {}}
    local = {"source": "code", "revision": None, "sha256": {"model.safetensors": "ab"}}
    card = card_of(saved(tmp_path, HUB | {"strategy": "merge", "siblings": [sibling, local]}))
    assert card.data.base_model == ["someone/dense", "someone/maths"] and card.data.base_model_relation == "merge"
    assert "- [someone/maths](https://huggingface.co/someone/maths)\n- code\n" in card.text
    assert "| SHA-256 of model.safetensors of code | ab |" in card.text


def test_a_family_of_transformers_has_a_card_too(tmp_path):
    sizes = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2}
    config = OlmoeConfig(**sizes, num_attention_heads=3, num_key_value_heads=1, num_experts=5, num_experts_per_tok=2)
    model = OlmoeForCausalLM(config)
    model.save_pretrained(tmp_path)
    card = card_of(tmp_path, license="mit")
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 2 * 3 * 3 * 24 * 20
    assert (
        f"| Parameters | {total:,} |" in card.text
        and f"| Active parameters per token | {total - idle:,} |" in card.text
    )
    assert "trust_remote_code" not in card.text and "AutoModelForCausalLM.from_pretrained" in card.text
    assert "The folder records no origin and no training" in card.text
    assert card.data.tags == ["olmoe", "mixture-of-experts"]
    files = push(tmp_path, "me/olmoe", dry_run=True)["files"]
    assert files.keys() == {"README.md", "config.json", "generation_config.json", "model.safetensors"}


def log(steps: int) -> list[dict]:
    entries = [
        {"step": step, "loss": 3 / step, "learning_rate": 1e-3, "router_load_max": 1.5} for step in range(1, steps)
    ]
    return [
        {"step": 0, "eval_loss": 3.5},
        *entries,
        {"step": steps - 1, "eval_loss": 0.25},
        {"step": steps - 1, "train_loss": 1.0},
    ]


def test_a_trained_model_shows_its_stages_its_curves_and_its_loss(tmp_path):
    first = saved(tmp_path / "upcycled", HUB)
    (first / "README.md").write_text("---\nlicense: apache-2.0\ndatasets: some/pages\n---\n")
    given = {"model_name_or_path": str(first), "train_data": [str(first / "config.json"), "some/chats"], "seed": 7}
    facts = describe(given | {"eval_data": ["some/other"], "stage": "sft"})
    model = AutoModelForCausalLM.from_pretrained(first)
    second = tmp_path / "tuned"
    model.save_pretrained(second)
    write_record(facts, model, second)
    (second / "trainer_state.json").write_text(json.dumps({"log_history": log(30)}))
    (second / "eval_results.json").write_text(json.dumps({"eval_loss": 0.25, "eval_loss_before": 3.5}))
    third = tmp_path / "aligned"
    model.save_pretrained(third)
    write_record(
        describe({"model_name_or_path": str(second), "stage": "dpo", "train_data": ["some/pairs"]}), model, third
    )

    card = card_of(second)
    assert card.data.base_model == "someone/dense" and card.data.license == "apache-2.0"
    assert card.data.datasets == ["some/pages", "some/chats", "some/other"]
    for row in ("Stage | sft", "Started from | upcycled", "Training data | config.json, some/chats", "Seed | 7"):
        assert f"| {row} |" in card.text
    assert "| Held-out loss before | 3.5 |" in card.text
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("some/other", "loss", 0.25)
    assert "| Step | Training loss | Held-out loss | Learning rate | Busiest expert, 1 at balance |" in card.text
    assert "| 0 |  | 3.5 |  |  |\n| 4 | 0.75 |" in card.text and "| 29 | 0.1034 | 0.25 | 0.001 | 1.5 |" in card.text
    assert str(tmp_path) not in (second / "README.md").read_text() + (second / "training.json").read_text()

    card = card_of(third)
    assert [line for line in card.text.splitlines() if line.startswith("| Stage")] == [
        "| Stage | sft |",
        "| Stage | dpo |",
    ]
    assert card.data.license == "apache-2.0" and card.data.tags[-2:] == ["sft", "dpo"]


def test_the_curves_are_a_picture_with_matplotlib_and_a_table_without(tmp_path, monkeypatch, capsys):
    folder = saved(tmp_path)
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "trainer_state.json").write_text(json.dumps({"log_history": log(4)}))
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        assert "![" not in card_of(folder).text
    assert capsys.readouterr().err == "no picture of the training curves: pip install 'hf_moe[plots]'\n"
    assert "| 3 | 1 | 0.25 |" in (folder / "README.md").read_text()
    pytest.importorskip("matplotlib")
    pictures = []
    for _ in range(2):
        assert "![Training curves](figures/training_curves.png)" in card_of(folder).text
        pictures.append((folder / "figures" / "training_curves.png").read_bytes())
    assert pictures[0] == pictures[1] and pictures[0].startswith(b"\x89PNG")


def test_a_table_of_curves_is_short_and_has_both_ends():
    titles, table = curve_table(log(1000))
    assert len(table) == 8 and [table[0][0], table[-1][0]] == ["0", "999"] and len(titles) == len(table[0])
    assert curve_table([{"step": 1, "loss": 1.0}]) == ([], [])


LM_EVAL = {
    "results": {
        "arc_easy": {"alias": "arc_easy", "acc,none": 0.4375, "acc_stderr,none": 0.01, "acc_norm,none": 0.4},
        "gsm8k": {"alias": " - gsm8k", "exact_match,strict-match": 0.125, "exact_match_stderr,strict-match": "N/A"},
    },
    "configs": {
        "arc_easy": {"dataset_path": "allenai/ai2_arc", "dataset_name": "ARC-Easy", "test_split": "test"},
        "gsm8k": {"dataset_path": "openai/gsm8k", "dataset_name": "main", "test_split": "test"},
    },
    "n-shot": {"arc_easy": 0, "gsm8k": 5},
    "config": {"model_args": "pretrained=/home/someone/model"},
}


def test_results_of_lm_eval_become_the_model_index(tmp_path, command):
    folder, results = saved(tmp_path / "model"), tmp_path / "results.json"
    results.write_text(json.dumps(LM_EVAL))
    card = card_of(folder, evaluations=[results])
    found = {(r.dataset_type, r.dataset_config, r.metric_type): r for r in card.data.eval_results}
    assert set(found) == {
        ("allenai/ai2_arc", "ARC-Easy", "acc"),
        ("allenai/ai2_arc", "ARC-Easy", "acc_norm"),
        ("openai/gsm8k", "main", "exact_match"),
    }
    gsm8k = found["openai/gsm8k", "main", "exact_match"]
    assert (gsm8k.metric_value, gsm8k.metric_args, gsm8k.dataset_name) == (0.125, {"num_few_shot": 5}, "gsm8k")
    assert (
        "| arc_easy | acc | 0 | 0.4375 ± 0.01 |" in card.text
        and "| gsm8k | exact_match (strict-match) | 5 | 0.125 |" in card.text
    )
    assert "No evaluation" not in card.text and "/home" not in card.text
    LM_EVAL["results"]["gsm8k"]["exact_match,strict-match"] = 0.25
    results.write_text(json.dumps({**LM_EVAL, "results": {"gsm8k": LM_EVAL["results"]["gsm8k"]}}))
    values = [r.metric_value for r in card_of(folder, evaluations=[results]).data.eval_results]
    assert values == [0.4375, 0.4, 0.25]
    for number, said in enumerate(({}, {"arc": 3}, {"arc": {"acc,none": float("nan")}})):
        (tmp_path / f"{number}.json").write_text(json.dumps({"results": said}))
    for path, words in (
        (folder / "config.json", "has no results as lm_eval writes them"),
        *((tmp_path / f"{number}.json", f"{number}.json has no results") for number in range(3)),
        (tmp_path / "no", "does not exist"),
    ):
        code, _, err = command("card", folder, "--evaluation", path)
        assert code == 2 and words in err and err.count("\n") == 1


def test_of_a_folder_the_newest_results_count(tmp_path, command):
    folder, output = saved(tmp_path / "model"), tmp_path / "results"
    for model, date, value in (("a__b", "2026-02-03T04-05-06.7", 0.5), ("a__b", "2025-12-31T04-05-06.7", 0.25)):
        (output / model).mkdir(parents=True, exist_ok=True)
        said = {"results": {"arc_easy": {"acc,none": value}}}
        (output / model / f"results_{date}.json").write_text(json.dumps(said))
        (output / model / f"samples_arc_easy_{date}.jsonl").touch()
    for path in (output, output / "a__b"):
        (result,) = card_of(folder, evaluations=[path]).data.eval_results
        assert result.metric_value == 0.5
    (output / "c__d").mkdir()
    code, _, err = command("card", folder, "--evaluation", output / "c__d")
    assert code == 2 and "c__d holds no results_DATE.json of lm_eval" in err and err.count("\n") == 1
    (output / "c__d" / "results_2026-03-04T05-06-07.8.json").write_text("{}")
    code, _, err = command("card", folder, "--evaluation", output)
    assert code == 2 and f"give one of {output / 'a__b'}, {output / 'c__d'}" in err and err.count("\n") == 1


def test_an_adapter_and_expert_rows_name_their_base(tmp_path):
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "o_proj"])
    adapted = get_peft_model(tiny_model(), config)
    adapted.peft_config["default"].base_model_name_or_path = "someone/moe"
    adapted.save_pretrained(tmp_path / "lora")
    (tmp_path / "lora" / "README.md").unlink()  # PEFT's draft
    card = card_of(tmp_path / "lora")
    assert (card.data.base_model, card.data.base_model_relation, card.data.library_name) == (
        "someone/moe",
        "adapter",
        "peft",
    )
    count = sum(math.prod(x.shape) for name, x in adapted.named_parameters() if "lora_" in name)
    assert f"A LoRA adapter with {count / 1000:.3g}K parameters for [someone/moe]" in card.text
    assert "| Rank | 3 |" in card.text and 'PeftModel.from_pretrained(base, "lora")' in card.text
    assert "load_router_bias" not in card.text
    (tmp_path / "lora" / "router_bias.safetensors").touch()
    assert 'hf_moe.load_router_bias(model, snapshot_download("lora"))' in card_of(tmp_path / "lora").text

    model = tiny_model()
    split_experts(model, {"model.layers.1.mlp.gate": torch.tensor([0, 4])})
    (tmp_path / "rows").mkdir()
    save_rows(model, tmp_path / "rows")
    model.config._name_or_path, model.config._commit_hash = "someone/moe", "2" * 40
    write_record({"stage": "sft"}, model, tmp_path / "rows")
    card = card_of(tmp_path / "rows")
    assert (card.data.base_model, card.data.base_model_relation) == ("someone/moe", "adapter")
    assert f"with {2 * 3 * 24 * 48 / 1000:.3g}K parameters" in card.text
    assert 'folder = snapshot_download("rows")' in card.text and "| Revision | 2222" in card.text


def test_a_trace_is_shown_only_of_its_own_model(tmp_path, command):
    layer = {"experts": 7, "load": [2.5, 0.0] + [0.9] * 5, "dead": [1], "load_entropy": 0.75, "routing_entropy": 0.5}
    numbers = {"tokens": 1234, "layers": [layer, layer], "findings": ["Two experts do nothing."]}
    numbers["domains"] = [{"name": "stories", "perplexity": 12.5}, {"name": "single words", "perplexity": None}]
    trace, folder = tmp_path / "trace", saved(tmp_path / "model")
    (trace / "figures").mkdir(parents=True)
    for name in ("load", "domains-layer-1", "pruning"):
        (trace / "figures" / f"{name}.png").write_bytes(b"\x89PNG" + name.encode())
    (trace / "numbers.json").write_text(json.dumps(numbers))
    assert command("card", folder, "--trace", trace).code == 0
    text = (folder / "README.md").read_text()
    for row in (
        "Text | stories (perplexity 12.5), single words",
        "Tokens | 1,234",
        "Busiest expert, times its fair load | 2.5",
    ):
        assert f"| {row} |" in text
    assert "\n- Two experts do nothing.\n" in text
    assert "![Domain specialisation, layer 1](figures/routing-domains-layer-1.png)" in text
    assert {path.name for path in (folder / "figures").iterdir()} == {
        "routing-load.png",
        "routing-domains-layer-1.png",
    }
    assert card_of(folder).text in text  # written again, it keeps what it was told
    other = saved(tmp_path / "other", num_experts=4)
    for where, words in (
        (other, "of another model, with 7 experts in a layer; this one has 4"),
        (tmp_path, "no numbers.json"),
    ):
        code, _, err = command("card", other, "--trace", trace if where == other else folder)
        assert code == 2 and words in err and err.count("\n") == 1


def test_the_card_of_a_trace_that_was_run_now(tmp_path):
    pytest.importorskip("matplotlib")
    from hf_moe.telemetry import trace
    from tests.training.conftest import tiny_tokenizer

    folder = saved(tmp_path / "model", vocab_size=259)
    tiny_tokenizer().save_pretrained(folder)
    (tmp_path / "text.txt").write_text("The fox sleeps. " * 20)
    trace(folder, [tmp_path / "text.txt"], tmp_path / "trace", prune_tokens=0, progress=False)
    text = card_of(folder, trace=tmp_path / "trace").text
    assert "| Tokens | 320 |" in text and "(figures/routing-load.png)" in text


def test_configs_and_classes_are_not_guessed(tmp_path):
    folder = saved(tmp_path)
    config = HfMoeConfig.from_pretrained(folder)
    assert AutoConfig.from_pretrained(folder).architectures == config.architectures == ["HfMoeForCausalLM"]
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"architectures": ["SomethingElse"]}))
    assert "How to load" not in card_of(folder).text


@pytest.mark.parametrize("model_type", ["hf_moe", "llama", "somebodys"])
@pytest.mark.parametrize("names", [-1, "LlamaForCausalLM", {"0": "LlamaForCausalLM"}, [None], [["LlamaForCausalLM"]]])
def test_architectures_that_are_no_names(model_type, names, tmp_path):
    folder = saved(tmp_path)
    said = json.loads((folder / "config.json").read_text()) | {"architectures": names, "model_type": model_type}
    (folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=r"config\.json says architectures=.*, which is no list of names") as error:
        write_model_card(folder)
    assert "\n" not in str(error.value) and not (folder / "README.md").exists()
