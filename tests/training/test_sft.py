"""`hf-moe train` from recipe to saved model: what it learns, what it refuses, and how it goes on after a kill."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hf_moe.conversion import upcycle
from hf_moe.training.data.chat_templates import TEMPLATES
from hf_moe.training.main import main
from hf_moe.training.stages.loading import say_new_positions
from hf_moe.training.trainers.sft_trainer import MoeSFTTrainer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_moe.chat import plain

from .conftest import tiny_tokenizer, write_rows
from .models import hf_moe


@pytest.fixture
def command(model_folder, data_folder, tmp_path):
    """The arguments of a run with the tiny recipe, cut to a few seconds."""

    def arguments(*extra, output="out", data=data_folder / "train.jsonl", model=model_folder):
        places = {"--model_name_or_path": model, "--train_data": data, "--output_dir": tmp_path / output}
        words = [str(word) for pair in places.items() for word in pair]
        return ["tiny/sft", *words, "--per_device_train_batch_size", "4", "--logging_steps", "1000", *extra]

    return arguments


def test_tiny_recipe_lowers_the_held_out_loss_and_saves_a_model_that_loads(command, data_folder, tmp_path, capsys):
    held_out = ["--eval_data", str(data_folder), "--max_steps", "40", "--learning_rate", "1e-2"]
    metrics = main(command(*held_out, data=data_folder))
    assert metrics["eval_loss"] < 0.7 * metrics["eval_loss_before"]
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_loss"] == metrics["eval_loss"]
    assert "held-out loss" in capsys.readouterr().err
    assert metrics["eval_aux_loss"] > 0.9 and 0 < metrics["eval_router_load_entropy"] <= 1
    assert not (tmp_path / "out" / ".incomplete").exists()

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == plain((TEMPLATES / "plain.jinja").read_text(encoding="utf-8"))
    saved = load_file(tmp_path / "out" / "checkpoint-40" / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items() if name in saved)

    # The loss after training, computed again from the saved model.
    total = count = 0
    for line in (data_folder / "val.jsonl").read_text().splitlines():
        ids = tokenizer.apply_chat_template(json.loads(line)["messages"], return_tensors="pt", return_dict=False)
        with torch.no_grad():
            total += model(ids, labels=ids).loss * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert metrics["eval_loss"] == pytest.approx((total / count).item(), rel=1e-4)


@pytest.mark.parametrize("row", [{"text": "red red red"}, {"prompt": "Say red.", "completion": " red!"}], ids=list)
def test_rows_without_conversations_train(command, tmp_path, row):
    data = write_rows(tmp_path / "rows.jsonl", [row] * 5)
    metrics = main(command("--max_steps", "2", data=data))
    assert metrics["train_loss"] > 0 and (tmp_path / "out" / "model.safetensors").is_file()
    assert not list((tmp_path / "out").glob("*.bin"))  # no pickle beside the model
    assert json.loads((tmp_path / "out" / "config.json").read_text())["use_cache"] is True


def test_shared_stories(command, shared_data, tmp_path):
    """A trained dense model refuses the balance loss of a command; upcycled, it learns from real rows."""
    train, held_out = (str(shared_data / "sft" / f"stories_{split}.jsonl") for split in ("train", "val"))
    dense, sparse = shared_data / "stories260K-hf", tmp_path / "sparse"
    short = ["--eval_data", held_out, "--max_steps", "6", "--max_length", "96", "--learning_rate", "3e-3"]
    with pytest.raises(ValueError, match="not a Mixture-of-Experts model"):
        main(command(*short, "--router_aux_loss_coef=0.01", data=train, model=dense, output="dense"))
    upcycle(dense, sparse, experts=3, top_k=2, verify=False, progress=False)
    metrics = main(command(*short, data=train, model=sparse))
    assert metrics["eval_loss"] < metrics["eval_loss_before"] - 0.05


def test_rows_beyond_the_models_own_context_are_said(capsys):
    for length in (None, 64, 65):
        say_new_positions(hf_moe(), SimpleNamespace(max_length=length))
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("max_length is 65, beyond the model's max_position_embeddings, 64: positions from there")


MESSAGES = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Ho."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "No."},
)
SMOLLM2 = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
# template -> all but the last message with a generation prompt, the user's message alone, what counts in the loss
RENDERED = {
    "plain": (
        "<s>System: Be brief.\nUser: Hi?\nAssistant: Ho.</s>\nUser: And?\nAssistant: ",
        "<s>User: Hi?\n",
        "Ho.</s>No.</s>",
    ),
    "deepseek_v2": (
        "<s>Be brief.\n\nUser: Hi?\n\nAssistant: Ho.</s>User: And?\n\nAssistant:",
        "<s>User: Hi?\n\n",
        " Ho.</s> No.</s>",
    ),
    "mixtral": (
        "<s> [INST] Be brief.\n\nHi? [/INST] Ho.</s> [INST] And? [/INST]",
        "<s> [INST] Hi? [/INST]",
        " Ho.</s> No.</s>",
    ),
    "olmoe": (
        "<s><|system|>\nBe brief.\n<|user|>\nHi?\n<|assistant|>\nHo.</s>\n<|user|>\nAnd?\n<|assistant|>\n",
        "<s><|user|>\nHi?\n",
        "Ho.</s>No.</s>",
    ),
    "smollm2": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n"
        "<|im_start|>assistant\nHo.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n",
        SMOLLM2 + "<|im_start|>user\nHi?<|im_end|>\n",
        "Ho.<|im_end|>No.<|im_end|>",
    ),
}


@pytest.mark.parametrize("name", RENDERED)
def test_template(name):
    assert {path.stem for path in TEMPLATES.glob("*.jinja")} == RENDERED.keys()
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    conversation, question, counted = RENDERED[name]
    assert tokenizer.apply_chat_template(MESSAGES[:4], tokenize=False, add_generation_prompt=True) == conversation
    assert tokenizer.apply_chat_template(MESSAGES[1:2], tokenize=False) == question
    # What training sees begins with what generation sees.
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False).startswith(conversation)
    output = tokenizer.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
    pairs = zip(output["input_ids"], output["assistant_masks"], strict=True)
    assert tokenizer.decode([token for token, marked in pairs if marked]) == counted
    assert len(tokenizer) == len(tiny_tokenizer())


def test_assistant_only_loss_counts_only_the_answers(command, tmp_path):
    """The loss, computed again from the saved model over the answer's letters and its end alone."""
    rows = [{"messages": [{"role": "user", "content": "Say."}, {"role": "assistant", "content": "k" * 9}]}] * 4
    data = write_rows(tmp_path / "rows.jsonl", rows)
    metrics = main(command("--assistant_only_loss", "--eval_data", str(data), "--max_steps", "1", data=data))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(
        rows[0]["messages"], return_tensors="pt", return_dict=False
    )
    with torch.no_grad():
        log_probs = model(ids).logits.log_softmax(-1)[0]
    answer = range(ids.shape[1] - 11, ids.shape[1] - 1)  # nine letters and the end; a newline closes the turn
    expected = -sum(log_probs[place - 1, ids[0, place]] for place in answer) / 10
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_rows_without_a_token_to_learn_from_are_counted(command, tmp_path, capsys):
    rows = [
        {"messages": [{"role": "user", "content": "a" * size}, {"role": "assistant", "content": "b"}]}
        for size in (5, 90, 7, 80, 6)
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    main(command("--assistant_only_loss", "--max_steps", "1", "--max_length", "50", data=data))
    assert "train_data: 2 of 5 rows have no token to learn from within max_length 50\n" in capsys.readouterr().err


LONG = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * size}]}
    for size in (5, 90, 7, 80)
]


@pytest.mark.parametrize("kind", ["text", "packed"])
def test_long_rows_are_left_out_or_refused(command, tmp_path, capsys, kind):
    rows = [{"text": row["messages"][1]["content"]} for row in LONG] if kind == "text" else LONG
    short = ["--max_length", "50", "--max_steps", "1", *(["--packing"] if kind == "packed" else [])]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    longer = "train_data: 2 of 4 rows are longer than max_length 50"
    main(command(*short, "--on_long_rows", "drop", data=data, output="dropped"))
    assert f"{longer}: left out\n" in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"{longer}, the first of them row 1 with 1?[0-9]{{2}} tokens: raise"):
        main(command(*short, "--on_long_rows", "error", data=data, output="refused"))


def test_loss_that_is_no_number_stops_before_a_weight_moves(command, model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"][3:5] = torch.tensor([3e38, -3e38])  # finite itself
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"The loss is (nan|inf) in step 1: training stops") as error:
        main(command("--max_steps", "3", "--save_steps", "1", model=tmp_path / "model"))
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


class TestRefusals:
    """Each is one line, and none leaves anything in the output folder."""

    def refused(self, arguments, error, message, tmp_path):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(error, match=message) as caught:
            main(arguments)
        assert "\n" not in str(caught.value)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    @pytest.mark.parametrize(
        ("extra", "error", "message"),
        [
            (["--eval_strategy", "epoch"], ValueError, "eval_strategy is epoch: give --eval_data"),
            (["--eval_data", "absent.jsonl"], FileNotFoundError, "there is no file absent.jsonl"),
            (["--chat_template_path", "absent.jinja"], FileNotFoundError, "there is no file absent.jinja"),
            (
                ["--chat_template_path", "chatml"],
                FileNotFoundError,
                "no file chatml; the templates.* mixtral, olmoe, plain",
            ),
            (["--attn_implementation", "flash_attention_2"], ValueError, "FlashAttention2 has been toggled on"),
            (["--model_name_or_path", "./absent"], FileNotFoundError, "there is no folder ./absent"),
            (["--resume_from_checkpoint", "true"], ValueError, "holds no complete checkpoint"),
            (["--resume_from_checkpoint", "absent"], ValueError, "absent is not a complete checkpoint"),
            (["--max_length", "2", "--assistant_only_loss"], ValueError, "no token to learn from within max_length 2"),
            (["--model_init_kwargs", '{"dtype": "bfloat16"}'], ValueError, "holds dtype, for which there is --dtype:"),
            (["--optim", "lomo"], ValueError, "You need to install `lomo_optim`"),
            pytest.param(
                *(["--use_liger_kernel", "true"], ValueError, "Liger's kernels run on a GPU"),
                marks=pytest.mark.skipif(
                    find_spec("liger_kernel") is None or torch.cuda.is_available(), reason="needs Liger, and no GPU"
                ),
            ),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else "",
    )
    def test_arguments(self, command, tmp_path, extra, error, message):
        self.refused(command(*extra), error, message, tmp_path)

    def test_columns_before_the_model_is_looked_for(self, command, tmp_path):
        data = write_rows(tmp_path / "rows.jsonl", [{"question": "a", "answer": "b"}])
        message = "has the columns question, answer; expected messages"
        self.refused(command(data=data, model=tmp_path / "absent"), ValueError, message, tmp_path)

    def test_model_without_a_tokenizer(self, command, tmp_path):
        message = f"model_name_or_path {tmp_path} has no tokenizer that loads"
        self.refused(command(model=tmp_path), ValueError, message, tmp_path)

    def test_an_adapter_in_the_place_of_the_model(self, command, model_folder, tmp_path):
        given = ["--lora_parts", "attention", "--lora_r", "2", "--max_steps", "1", "--save_strategy", "no"]
        main(command(*given, output="adapter"))
        message = r"adapter is an adapter, and training starts from a whole model: give the merged one"
        self.refused(command(model=tmp_path / "adapter"), ValueError, message, tmp_path)
        for file in (tmp_path / "adapter").glob("*token*"):
            file.unlink()
        self.refused(command(model=tmp_path / "adapter"), ValueError, message, tmp_path)

    def test_truncated_weights(self, command, model_folder, tmp_path):
        shutil.copytree(model_folder, tmp_path / "model")
        weights = (tmp_path / "model" / "model.safetensors").read_bytes()
        (tmp_path / "model" / "model.safetensors").write_bytes(weights[:-9])
        self.refused(command(model=tmp_path / "model"), ValueError, "model has weights that cannot be read", tmp_path)

    def test_conversations_without_a_template(self, command, tmp_path):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("{use_cpu: true, bf16: false}")
        message = r"no chat template: give --chat_template_path FILE.jinja, or one of deepseek_v2, mixtral, olmoe"
        self.refused([str(recipe), *command()[1:]], ValueError, message, tmp_path)

    def test_template_without_marks(self, command, tmp_path):
        (tmp_path / "mine.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
        message = "the chat template marks no word of the assistant: enclose its words"
        given = ["--chat_template_path", str(tmp_path / "mine.jinja"), "--assistant_only_loss"]
        self.refused(command(*given), ValueError, message, tmp_path)

    def test_conversations_without_the_assistant(self, command, tmp_path):
        data = write_rows(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "Hi"}]}] * 3)
        message = "train_data has no token to learn from within max_length"
        self.refused(command("--assistant_only_loss", data=data), ValueError, message, tmp_path)

    def test_checkpoint_without_its_optimizer(self, command, tmp_path):
        main(command("--max_steps", "1", "--save_steps", "1", "--save_only_model", "true"))
        message = "checkpoint-1 has no state of the optimizer, so that no run can go on from it as it was"
        self.refused(command("--resume_from_checkpoint", "true"), ValueError, message, tmp_path)

    @pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
    def test_checkpoint_that_is_cut_short(self, name, command, tmp_path):
        main(command("--max_steps", "1", "--save_steps", "1"))
        path = tmp_path / "out" / "checkpoint-1" / name
        path.write_bytes(path.read_bytes()[:-1000])
        message = f"checkpoint-1/{name} is cut short, so that no run can go on from it"
        self.refused(command("--resume_from_checkpoint", "true"), ValueError, message, tmp_path)
        path.unlink()
        if name == "scheduler.pt":  # without which the Trainer leaves the optimizer's aside, too
            message = "checkpoint-1 has no state of the schedule, so that no run"
            self.refused(command("--resume_from_checkpoint", "true"), ValueError, message, tmp_path)

    def test_output_folder_in_use(self, command, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("mine")
        message = "out is not empty: give another, or --resume_from_checkpoint true"
        self.refused(command(), ValueError, message, tmp_path)

    def test_output_folder_is_a_file(self, command, tmp_path):
        (tmp_path / "out").write_text("mine")
        self.refused(command(), ValueError, "out is a file", tmp_path)


RUN = ["--max_steps", "11", "--save_steps", "3", "--gradient_accumulation_steps", "2", "--learning_rate", "1e-2"]
RUN += ["--lr_scheduler_type", "constant"]  # so that one step too many would show


@pytest.fixture
def unbroken(command, tmp_path):
    main(command(*RUN, output="unbroken"))
    return tmp_path / "unbroken"


def assert_same_end(folder, unbroken):
    weights, expected = (load_file(path / "model.safetensors") for path in (folder, unbroken))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
    assert (folder / "config.json").read_bytes() == (unbroken / "config.json").read_bytes()
    states = [torch.load(path / "checkpoint-11" / "optimizer.pt", weights_only=True) for path in (folder, unbroken)]
    for number, state in states[1]["state"].items():
        for name, value in state.items():
            assert torch.equal(states[0]["state"][number][name], value), (number, name)


def test_two_runs_end_bitwise_alike(command, unbroken, tmp_path):
    main(command(*RUN, output="again"))
    assert_same_end(tmp_path / "again", unbroken)


@pytest.mark.parametrize(
    ("method", "place", "goes_on_from"),
    [("_save_rng_state", "checkpoint-6", "checkpoint-3"), ("save_model", ".incomplete", "checkpoint-11")],
    ids=["checkpoint", "final-model"],
)
def test_stop_in_the_middle_of_a_save(command, unbroken, tmp_path, monkeypatch, capsys, method, place, goes_on_from):
    """A checkpoint cut short does not count, no half model appears, and resuming makes both good."""
    write = getattr(MoeSFTTrainer, method)

    def stop(self, folder, **kwargs):
        if folder.endswith(place):
            Path(folder).mkdir(exist_ok=True)
            (Path(folder) / "half.bin").write_bytes(b"half")
            raise KeyboardInterrupt
        write(self, folder, **kwargs)

    killed = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(MoeSFTTrainer, method, stop)
        with pytest.raises(KeyboardInterrupt):
            main(command(*RUN, output="killed"))
    assert (killed / place / "half.bin").exists() and not (killed / "model.safetensors").exists()
    main(command(*RUN, "--resume_from_checkpoint", "true", output="killed"))
    assert f"resuming from {killed / goes_on_from}" in capsys.readouterr().err
    assert_same_end(killed, unbroken)
    written = {path.name for path in killed.iterdir()}
    assert written - {"train_results.json", "all_results.json"} <= {path.name for path in unbroken.iterdir()}
