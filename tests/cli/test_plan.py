"""`hf-moe plan`: a table for people, one JSON object for programs, one line for a mistake."""

import json

import pytest

from ..conftest import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    return folder


def test_table_and_json_say_the_same(command, folder):
    arguments = ["plan", folder, "--length", "16", "--gpus", "2", "--sharding", "zero2", "--tokens", "1e6"]
    code, out, _ = command(*arguments, "--json")
    report = json.loads(out)
    assert code == 0 and report["model"] == str(folder)
    code, table, _ = command(*arguments)
    assert code == 0 and "1 of 16 tokens in a forward pass" in table
    for part, size in report["memory_per_gpu"].items():
        assert f"{part.replace('_', ' ')}" in table and f"{size / 1e6:,.1f} MB" in table
    assert f"{report['tokens_per_second']:,.0f}, padding included" in table and "of each of 2 GPUs" in table
    for end in report["tokens_per_second_range"]:
        assert f"{end:,.0f}" in table
    assert "as two of one host did" in table
    given = command(*arguments, "--tflops", "300")[1]
    assert "300 TFLOP/s" in given and "padding included" in given and "measured runs" not in given


def test_recipe_and_what_replaces_it(command, folder):
    pytest.importorskip("trl")
    arguments = ["plan", folder, "--recipe", "tiny/pretrain", "--length", "16", "--json"]
    report = json.loads(command(*arguments)[1])
    assert report["train_tokens"] == 50_000 and report["cpu_memory_ema"] == 4 * report["trained_params"]
    fewer = json.loads(command(*arguments, "--trainable", "router_only")[1])
    assert fewer["trained_params"] < report["trained_params"] / 10


def test_compute_budget(command):
    code, out, _ = command("plan", "--flops", "1e23", "--gpus", "1000", "--tflops", "400", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["gpu_days"] == pytest.approx(1e23 / 400e12 / 86400)
    assert report["days"] == pytest.approx(report["gpu_days"] / 1000)
    assert report["train_tokens"] == pytest.approx(5.8316 * 1e23**0.4757)
    table = command("plan", "--flops", "1e23")[1]
    assert "509B tokens" in table and "2401.02954" in table and "moe_layer.json" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Name a model"),
        (["olmoe-1b-7b", "--tflops", "3", "--mfu", "0.3"], "--tflops and --mfu"),
        (["--flops", "1e20", "--mfu", "0"], "--mfu is 0; it must be above 0"),
        (["--flops", "1e20", "--mfu", "40"], "--mfu is 40; it is a share of the card's peak, at most 1"),
        (["--flops", "-1"], "flops is -1"),
        (["olmoe-1b-7b", "--flops", "1e20"], "--flops"),
        (["--flops", "1e20", "--length", "4096"], "--flops"),
        (["olmoe-1b-7b", "--checkpointing", "--selective-checkpointing"], "--selective-checkpointing is a kind of"),
        (["absent/model"], "absent/model is no folder"),
        (["olmoe-1b-7b", "--sharding", "fsdp"], "sharding is fsdp"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistake_is_one_line(command, arguments, message):
    code, out, err = command("plan", *arguments)
    assert (code, out) == (2, "") and message in err and len(err.splitlines()) == 1
