"""One copy of the experts' weights a step trains as a cast in each micro-batch does, bit for bit."""

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_moe import MoeTrainer, MoeTrainingArguments
from hf_moe.kernels import copies
from tests.conftest import tokens
from tests.training.conftest import tiny_hf_moe


def eager(self, hidden_states, top_k_index, top_k_weights):
    """The experts one after the other, in bf16, from weights as the kernels get theirs."""
    up, down = (copies.cast(x, torch.bfloat16) for x in (self.gate_up_proj, self.down_proj))
    output = torch.zeros_like(hidden_states)
    for expert in range(len(up)):
        token, slot = (top_k_index == expert).nonzero(as_tuple=True)
        gate, value = nn.functional.linear(hidden_states[token].bfloat16(), up[expert]).chunk(2, dim=-1)
        rows = nn.functional.linear(self.act_fn(gate) * value, down[expert]) * top_k_weights[token, slot, None]
        output = output.index_add(0, token, rows.to(output.dtype))
    return output


@pytest.fixture
def by_name():
    ALL_EXPERTS_FUNCTIONS.register("test_eager", eager)
    yield "test_eager"
    ALL_EXPERTS_FUNCTIONS._local_mapping.pop("test_eager", None)


def train(folder, name, **changes):
    model = tiny_hf_moe()
    model.set_experts_implementation(name)
    rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in tokens(12, 9).tolist()])
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    options |= {"bf16": True}
    args = MoeTrainingArguments(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        max_steps=3,
        learning_rate=1e-2,
        save_strategy="no",
        **options | changes,
    )
    trainer = MoeTrainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    return trainer


def test_a_run_with_copies_is_bitwise_the_run_without(tmp_path, by_name, monkeypatch):
    made = []
    of = copies.Copies.of
    monkeypatch.setattr(
        copies.Copies, "of", lambda self, weight: made.append(id(weight) in self.fresh) or of(self, weight)
    )
    once = train(tmp_path / "once", by_name)
    # 3 steps of 2 micro-batches, each computed and recomputed: a cast a weight and step is new.
    assert made.count(False) == 3 * 4 and made.count(True) > 3 * 4
    assert once.copies is None and not copies.HOLDERS
    monkeypatch.setattr("hf_moe.training.trainers.trainer.copies_of", lambda trainer: None)
    often = train(tmp_path / "often", by_name)
    assert not copies.HOLDERS
    for (name, x), y in zip(once.model.named_parameters(), often.model.parameters(), strict=True):
        assert torch.equal(x, y), name
    assert [e["loss"] for e in once.state.log_history if "loss" in e] == [
        e["loss"] for e in often.state.log_history if "loss" in e
    ]


def test_no_copies_where_a_step_uses_weights_once_or_as_they_are(tmp_path, by_name, monkeypatch):
    monkeypatch.setattr(copies.Copies, "of", lambda *args: pytest.fail("made a copy"))
    train(tmp_path / "one", by_name, gradient_accumulation_steps=1, gradient_checkpointing=False)
    train(tmp_path / "float32", by_name, bf16=False)


def test_a_copy_is_made_anew_once_weights_have_moved():
    weight = nn.Parameter(torch.randn(2, 3, 4))
    held = copies.Copies([weight], torch.bfloat16)
    held.begin()
    first = copies.cast(weight, torch.bfloat16)
    first.float().square().sum().backward()
    assert weight.grad.dtype == torch.float32 and torch.equal(weight.grad, 2 * weight.detach().bfloat16().float())
    assert copies.cast(weight, torch.bfloat16).data_ptr() == first.data_ptr()
    assert copies.cast(weight, torch.float16).dtype == torch.float16
    held.end()
    with torch.no_grad():
        weight.add_(1)
    assert torch.equal(copies.cast(weight, torch.bfloat16), weight.bfloat16())
    held.begin()
    assert torch.equal(copies.cast(weight, torch.bfloat16), weight.bfloat16())
    held.end()


def test_gradients_are_summed_where_they_are_cast():
    torch.manual_seed(0)
    weight, parts = nn.Parameter(torch.randn(3, 5, 7)), torch.randn(4, 3, 5, 7)
    for sums in (False, True):
        weight.grad = None
        held = copies.Copies([weight], torch.bfloat16, sums)
        held.begin()
        for part in parts:
            (copies.cast(weight, torch.bfloat16).float() * part).sum().backward()
        held.end()
        expected = sum(part.bfloat16().float() for part in parts)
        torch.testing.assert_close(weight.grad, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1, 4095, 8193])
def test_the_kernel_adds(size):
    pytest.importorskip("triton")
    from hf_moe.kernels.sums import add_to
    from tests.kernels.conftest import DEVICE

    total, part = torch.randn(size, device=DEVICE), torch.randn(size, device=DEVICE).bfloat16()
    expected = total + part.float()
    add_to(total, part)
    assert torch.equal(total, expected)
