"""Tokens without a row: every stage gives them one before its first step, or says in one line what to do."""

import json

import pytest
import torch
from hf_moe.training.main import main
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

from hf_moe.loading import load

from .conftest import tiny_tokenizer, write_rows
from .models import hf_moe, olmoe
from .policies import pairs, questions
from .test_saving import trainer

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)
NEW = [259, 260]  # <|im_start|>, <|im_end|>
SIZES = {"max_position_embeddings": 256, "initializer_range": 0.05}


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    """A tokenizer whose template has two tokens that the models' tokenizer lacks."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(x, special=True) for x in ("<|im_start|>", "<|im_end|>")])
    tokenizer.chat_template, tokenizer.eos_token = TEMPLATE, "<|im_end|>"
    tokenizer.save_pretrained(folder := tmp_path_factory.mktemp("chatml"))
    return folder


@pytest.fixture
def base(tmp_path):
    """base(rows, tokens): a folder of a model with so many rows, and a tokenizer with a pad token after its own."""

    def make(rows, pad=False, build=hf_moe, **config):
        model = build(vocab_size=rows, **SIZES, **config)
        with torch.no_grad():  # as rows are that nobody trained
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                layer.weight[259:] = 0
        tokenizer = tiny_tokenizer()
        if pad:
            tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        model.save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return make


def run(stage, model, data, output, *extra):
    given = {"model_name_or_path": model, "train_data": data, "output_dir": output, "max_steps": 2}
    words = [f"--{name}={value}" for name, value in given.items()] + [f"--disable_tqdm={True}"]
    return main([f"tiny/{stage}", *words, "--save_strategy=no", "--learning_rate=1e-2", *map(str, extra)])


LORA = ("--lora_parts", "attention", "routed_experts")


@pytest.mark.parametrize("build", [hf_moe, olmoe])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_adapter_trains_the_rows_of_a_templates_tokens(build, tied, base, chatml, data_folder, tmp_path, capsys):
    model = base(264, build=build, tie_word_embeddings=tied)
    data = data_folder / "train.jsonl"
    given = [
        *LORA,
        f"--chat_template_path={chatml}",
        "--lora_merge=float32",
        "--save_strategy=steps",
        "--save_steps=1",
    ]
    run("sft", model, data, tmp_path / "out", *given)
    assert "among them the rows of 2 new tokens" in capsys.readouterr().err

    ids = torch.tensor([[*NEW, 40, 41, *NEW]])
    first, tokenizer = load(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(model)
    second = PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged").eval()
    assert tokenizer.chat_template == TEMPLATE and tokenizer.eos_token_id == 260
    with torch.no_grad():
        found = [x.cpu()(ids).logits for x in (first, second, merged)]  # PEFT takes an adapter to a GPU
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2], atol=2e-4, rtol=2e-4)

    before = load_file(tmp_path / "out" / "checkpoint-1" / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    rows = {name: x for name, x in after.items() if "token" in name}
    assert len(rows) == (1 if tied else 2)
    for name, x in rows.items():
        assert x.shape[0] == 2 and (x[0] - x[1]).abs().max() > 1e-2
        assert not torch.equal(x, before[name]) and (x != before[name]).any(dim=1).all()

    resume = [*given, f"--resume_from_checkpoint={tmp_path / 'out' / 'checkpoint-1'}"]
    run("sft", model, data, tmp_path / "out", *resume)
    again = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(x, again[name]) for name, x in after.items())


REFUSED = {
    "adapter": (
        LORA,
        259,
        r"beyond the model's 259 rows, the first of them <\|im_start\|> \(259\), and with",
    ),
    "esft": (("--esft_p=0.5",), 259, "2 tokens beyond the model's 259 rows"),
    "esft-spare": (("--esft_p=0.5",), 264, "esft_p 0.5 leaves the embeddings as they are, and 2 tokens are new"),
    "group": (("--trainable=moe_only",), 259, "trainable moe_only leaves the embeddings as they are, and 2 tokens"),
    "group-spare": (("--trainable=attention_only",), 264, "their rows would never be trained. Leave it out, or"),
}


@pytest.mark.parametrize(("extra", "rows", "message"), REFUSED.values(), ids=REFUSED)
def test_rows_that_would_never_be_trained(extra, rows, message, base, chatml, data_folder, tmp_path):
    data = data_folder / "train.jsonl"
    with pytest.raises(ValueError, match=message) as error:
        run("sft", base(rows), data, tmp_path / "out", *extra, f"--chat_template_path={chatml}")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_the_way_out_for_an_adapter(base, chatml, data_folder, tmp_path):
    """The base with more rows, saved."""
    folder = base(259)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(261)
    model.save_pretrained(folder)
    given = [*LORA, f"--chat_template_path={chatml}"]
    run("sft", folder, data_folder / "train.jsonl", tmp_path / "out", *given)
    assert load(tmp_path / "out")[0].get_input_embeddings().weight.shape[0] == 261


@pytest.mark.parametrize("group", ["all", "dense_only"])
def test_a_model_grows_by_a_templates_tokens(group, base, chatml, data_folder, tmp_path, capsys):
    model = base(259)
    given = [f"--chat_template_path={chatml}", f"--trainable={group}"]
    run("sft", model, data_folder / "train.jsonl", tmp_path / "out", *given)
    assert "the tokenizer has 261 tokens, the model had 259 rows: added" in capsys.readouterr().err
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert tuned.config.vocab_size == 261 == len(AutoTokenizer.from_pretrained(tmp_path / "out"))
    ends = tuned.generation_config.eos_token_id
    assert tuned.config.eos_token_id == 260 and 260 in ([ends] if isinstance(ends, int) else ends)
    for layer in (tuned.get_input_embeddings(), tuned.get_output_embeddings()):
        rows = layer.weight.detach()
        assert (rows[259] - rows[260]).abs().max() > 1e-3
        assert (rows[NEW] - rows[:259].mean(dim=0)).norm() < rows[:259].std(dim=0).norm()


PRETRAIN = ["--max_steps=-1", "--train_tokens=600", "--from_scratch=false"]
STAGES = ("sft", "pretrain", "distil", "dpo", "grpo")


def stage_rows(stage, folder):
    texts = [{"text": "red green blue " * 9}] * 20
    chats = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]}] * 12
    found = {"pretrain": texts, "dpo": pairs(11), "grpo": questions(11)}.get(stage, chats)
    return write_rows(folder / f"{stage}.jsonl", found)


@pytest.mark.parametrize("stage", STAGES)
def test_a_pad_token_beyond_the_rows_in_every_stage(stage, base, tmp_path, capsys):
    model = base(259, pad=True, pad_token_id=259)
    extra = {"grpo": ["--beta=0.1"], "pretrain": ["--max_steps=-1", "--train_tokens=600", "--from_scratch=false"]}.get(
        stage, []
    )
    if stage == "distil":
        extra = [f"--teacher_model_name_or_path={model}"]
        with pytest.raises(ValueError, match="has 259 logits, the model 260: they cannot be compared"):
            run(stage, model, stage_rows(stage, tmp_path), tmp_path / "out", *extra)
        return
    run(stage, model, stage_rows(stage, tmp_path), tmp_path / "out", *extra)
    said = capsys.readouterr().err
    assert "pad_token_id 259 left out" in said and "the tokenizer has 260 tokens, the model had 259 rows" in said
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert tuned.config.vocab_size == 260
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == 259


@pytest.mark.parametrize("stage", ["sft", "dpo", "grpo"])
def test_an_adapter_pads_with_another_token(stage, base, tmp_path, capsys):
    run(stage, base(259, pad=True), stage_rows(stage, tmp_path), tmp_path / "out", *LORA)
    assert "the pad token [PAD] (259) has no row among the model's 259" in capsys.readouterr().err
    model, tokenizer = load(tmp_path / "out")
    assert tokenizer.pad_token == "</s>" and model.config.vocab_size == 259


def test_from_python_it_is_refused_before_the_first_step(tmp_path):
    made = trainer(hf_moe(vocab_size=259), tmp_path)
    made.processing_class = tiny_tokenizer()
    made.train()
    made.tried = False
    made.processing_class.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(
        ValueError, match=r"\[PAD\] is token 259, beyond .* 259 rows: call model.resize_token_embeddings"
    ):
        made.train()
