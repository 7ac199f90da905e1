"""Packed runs: whole conversations that do not see each other, dense packs, the exact batches after a kill."""

import json
import random
from itertools import chain

import pytest
import torch
from datasets import Dataset
from hf_moe.training.data.packing import pack
from hf_moe.training.main import main
from hf_moe.training.trainers.sft_trainer import MoeSFTConfig, MoeSFTTrainer
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import pack_dataset

from .conftest import tiny_hf_moe, tiny_tokenizer, write_rows
from .models import hf_moe

LATENT = {
    "attention_type": "mla",
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
}
MODELS = {
    "gqa": tiny_hf_moe,
    "mla": lambda: hf_moe(vocab_size=259, max_position_embeddings=256, v_head_dim=8, num_key_value_heads=4, **LATENT),
}


def tokens(count: int, low: int = 3, high: int = 60) -> list[dict]:
    chance = random.Random(0)
    rows = []
    for _ in range(count):
        ids = [chance.randrange(3, 259) for _ in range(chance.randint(low, high))]
        rows.append({"input_ids": ids, "labels": [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]})
    return rows


def trainer(rows: list[dict], tmp_path, model=None, **changes) -> MoeSFTTrainer:
    args = MoeSFTConfig(
        output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", max_length=128, **changes
    )
    rows = Dataset.from_list(rows)
    return MoeSFTTrainer(
        model=model or tiny_hf_moe(),
        args=args,
        processing_class=tiny_tokenizer(),
        train_dataset=rows,
        eval_dataset=rows,
    )


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size", [1, 3], ids=["a-pack-a-batch", "three-packs-a-batch"])
def test_documents_in_a_pack_do_not_see_each_other(model, size, tmp_path):
    """The held-out loss of packs is that of the rows, each alone in a batch of its own, token by token."""
    rows = tokens(17)
    packed = trainer(rows, tmp_path, MODELS[model](), packing=True, per_device_eval_batch_size=size)
    total = count = 0
    with torch.no_grad():
        for batch in packed.get_eval_dataloader():
            loss = packed.compute_loss(packed.model.eval(), packed._prepare_inputs(batch))
            total, count = total + loss * (batch["labels"] != -100).sum(), count + (batch["labels"] != -100).sum()
        expected = [
            packed.model(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]), use_cache=False).loss
            for row in rows
        ]
    lengths = torch.tensor([sum(label != -100 for label in row["labels"][1:]) for row in rows])
    assert count == lengths.sum()
    torch.testing.assert_close(
        total / count, (torch.stack(expected) * lengths).sum() / lengths.sum(), atol=1e-5, rtol=0
    )


def test_packs_hold_each_row_once_and_are_full(tmp_path):
    rows = tokens(3000)
    packs = trainer(rows, tmp_path, packing=True).train_dataset
    found = []
    for row in packs.with_format(None):
        assert len(row["input_ids"]) == len(row["labels"]) == sum(row["seq_lengths"]) <= 128
        ends = torch.tensor(row["seq_lengths"]).cumsum(0).tolist()
        found += [row["input_ids"][stop - n : stop] for stop, n in zip(ends, row["seq_lengths"], strict=True)]
    assert sorted(found) == sorted(row["input_ids"] for row in rows)
    assert sum(map(len, found)) / (128 * len(packs)) > 0.995


@pytest.mark.parametrize("longest", [40, 200])
def test_packs_are_those_of_trl(longest):
    """As many, as full; which of equally long rows share a pack is left open."""
    rows = Dataset.from_list(tokens(501, high=longest))
    ours, theirs = pack(rows, 128), pack_dataset(rows, 128, "bfd")
    assert sorted(map(len, ours["input_ids"])) == sorted(map(len, theirs["input_ids"]))
    assert sorted(chain(*ours["seq_lengths"])) == sorted(chain(*theirs["seq_lengths"]))


class Stop(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_resume_in_mid_epoch_sees_the_batches_that_were_left(model_folder, tmp_path, monkeypatch):
    """Two sources by weight, packed, accumulated: stopped after step 3, gone on from step 2, to the same weights."""
    chance = random.Random(1)
    words = ["red", "green", "blue"]
    for name, count in (("a", 40), ("b", 25)):
        talks = [" ".join(chance.choices(words, k=chance.randint(1, 20))) for _ in range(count)]
        write_rows(
            tmp_path / f"{name}.jsonl",
            [{"messages": [{"role": "user", "content": name}, {"role": "assistant", "content": t}]} for t in talks],
        )
    sources = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    seen, step = [], MoeSFTTrainer.training_step

    def record(self, model, inputs, *args, **kwargs):
        seen.append((self.state.global_step, inputs["input_ids"].tolist(), inputs["position_ids"].tolist()))
        return step(self, model, inputs, *args, **kwargs)

    def run(output, *extra):
        seen.clear()
        arguments = [
            "tiny/large_sft",
            "--model_name_or_path",
            str(model_folder),
            "--output_dir",
            str(tmp_path / output),
        ]
        arguments += ["--train_data", *sources, "--train_weights", "3", "1", "--eval_data", *sources]
        arguments += [
            "--max_steps",
            "8",
            "--gradient_accumulation_steps",
            "2",
            "--save_steps",
            "2",
            "--logging_steps",
            "99",
        ]
        return main([*arguments, *extra]), list(seen)

    monkeypatch.setattr(MoeSFTTrainer, "training_step", record)
    metrics, expected = run("unbroken")
    assert {name for name in metrics if f"{name}_before" in metrics} == {"eval_a_loss", "eval_b_loss"}
    assert (
        json.loads((tmp_path / "unbroken" / "eval_results.json").read_text())["eval_a_loss"] == metrics["eval_a_loss"]
    )

    build = MoeSFTTrainer.__init__
    with monkeypatch.context() as patch:
        patch.setattr(MoeSFTTrainer, "__init__", lambda self, *a, **k: build(self, *a, callbacks=[Stop(3)], **k))
        with pytest.raises(KeyboardInterrupt):
            run("stopped")
    assert seen == expected[:6]
    assert run("stopped", "--resume_from_checkpoint", "true")[1] == expected[4:]
    weights, other = (load_file(tmp_path / name / "model.safetensors") for name in ("unbroken", "stopped"))
    assert all(torch.equal(value, other[name]) for name, value in weights.items())
