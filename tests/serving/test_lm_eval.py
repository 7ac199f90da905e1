"""lm-eval runs on a saved folder: a task of a few lines beside it, no network, and numbers that the model's are."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROWS = [
    {"question": "Once upon a time there was a", "choices": [" brave frog", " xq zz"], "answer": 0},
    {"question": "The", "choices": [" qqq", " end."], "answer": 1},
    {"question": "She lived", "choices": [" in the forest", " jjj"], "answer": 1},  # marked wrongly on purpose
]
TASK = """\
task: stories
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
"""


def likelihood(model, tokenizer, question: str, choice: str) -> float:
    start = tokenizer(question, return_tensors="pt").input_ids.shape[1]
    ids = tokenizer(question + choice, return_tensors="pt").input_ids
    with torch.no_grad():
        scores = model(ids).logits[0, start - 1 : -1].log_softmax(dim=-1)
    return scores.gather(-1, ids[0, start:, None]).sum().item()


def test_its_log_likelihoods_are_the_models(saved, tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "stories.yaml").write_text(TASK % (tmp_path / "rows.jsonl"))
    words = ["--model", "hf", "--model_args", f"pretrained={saved},trust_remote_code=True,dtype=float32"]
    words += ["--tasks", "stories", "--include_path", tmp_path, "--device", "cpu", "--batch_size", "2"]
    words += ["--output_path", tmp_path / "out", "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    run = subprocess.run(
        [sys.executable, "-m", "lm_eval", *words], capture_output=True, text=True, env=os.environ | offline
    )
    assert run.returncode == 0, run.stderr[-2000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["stories"]["acc,none"] == pytest.approx(2 / 3)
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    theirs = {
        sample["doc"]["question"]: [response[0] for response in sample["filtered_resps"]]
        for sample in map(json.loads, samples.read_text().splitlines())
    }
    model, tokenizer = AutoModelForCausalLM.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)
    for row in ROWS:
        expected = [likelihood(model, tokenizer, row["question"], choice) for choice in row["choices"]]
        found = [
            float(response[0] if isinstance(response, list) else response) for response in theirs[row["question"]]
        ]
        assert found == pytest.approx(expected, abs=1e-3)
