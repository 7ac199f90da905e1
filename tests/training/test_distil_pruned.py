"""A pruned mixture of each family learns from the one that it was: the loss by hand, and what moves."""

import json

import pytest
import torch
from hf_moe.conversion import prune
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_moe import train
from tests.conversion.test_reshape import CASES, TEXT, build, ours, save

TEXTS = ["Once upon a time there was a dog named Ben.", "He ran to the river and was glad.", "The end."] * 2


@pytest.mark.parametrize("family", ["hf_moe", *CASES])
def test_routers_and_experts_learn_from_the_parent(family, tmp_path):
    parent, folder = tmp_path / "parent", tmp_path / "pruned"
    model_type, fields = CASES.get(family, (None, {}))
    save(build(model_type, **{**fields, "vocab_size": 512}) if model_type else ours(), parent)
    (tmp_path / "text.txt").write_text(TEXT)
    calibration = {"calibration": tmp_path / "text.txt", "calibration_tokens": 60}
    prune(parent, folder, experts=4, **calibration, verify=False, progress=False)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    metrics = train(
        "tiny/distil",
        folder,
        teacher_model_name_or_path=parent,
        train_data=rows,
        eval_data=rows,
        output_dir=tmp_path / "out",
        trainable="moe_only",
        temperature=2.0,
        kl_weight=0.3,
        assistant_only_loss=False,
        max_steps=3,
        learning_rate=1e-2,
        per_device_train_batch_size=6,
        per_device_eval_batch_size=3,
        gradient_accumulation_steps=1,
        warmup_steps=0,
        save_strategy="no",
    ).metrics
    student, teacher = (AutoModelForCausalLM.from_pretrained(x, dtype=torch.float32).eval() for x in (folder, parent))
    tokenizer, total, count = AutoTokenizer.from_pretrained(parent), 0.0, 0
    for text in TEXTS:
        ids = tokenizer(text + tokenizer.eos_token, return_tensors="pt").input_ids
        with torch.no_grad():
            logits, wanted = (model(ids).logits[0, :-1].double() for model in (student, teacher))
        q, p = ((x / 2.0).log_softmax(-1) for x in (logits, wanted))
        kl = 2.0**2 * (p.exp() * (p - q)).sum()
        total += 0.3 * kl - 0.7 * logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).sum()
        count += len(ids[0]) - 1
    assert metrics["eval_loss_before"] == pytest.approx((total / count).item(), rel=1e-4)
    assert metrics["eval_loss"] < metrics["eval_loss_before"]
    before = student.state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    assert before.keys() == after.keys()
    moved = {name for name, x in before.items() if not torch.equal(x, after[name])}
    sparse = {name for name in before if any(part in name for part in (".experts.", ".gate.", ".router."))}
    assert moved == {name for name in sparse if not name.endswith("e_score_correction_bias")}
