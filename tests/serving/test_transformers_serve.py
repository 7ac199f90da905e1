"""`pipeline`, and `transformers serve` in a process that does not import hf_moe, on a saved folder."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

MESSAGES = [{"role": "user", "content": "Tell a story about a brave frog named Zoe at the lake."}]
NEW_TOKENS = 20


@pytest.fixture(scope="module")
def answer(saved):
    """What generate() answers, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(saved)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = AutoModelForCausalLM.from_pretrained(saved)
    with torch.no_grad():
        output = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_text_generation_pipeline(saved, answer):
    chat = pipeline("text-generation", str(saved), device="cpu")(MESSAGES, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert chat[0]["generated_text"] == [*MESSAGES, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def server(saved, tmp_path_factory):
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", str(saved), "--trust-remote-code", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "transformers.cli.transformers", *words],
            stdout=stream,
            stderr=stream,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(120):
            assert process.poll() is None, log.read_text()[-2000:]
            try:
                urllib.request.urlopen(f"{address}/health")
                break
            except urllib.error.URLError:
                time.sleep(0.5)
        yield address, str(saved)
    finally:
        process.terminate()
        process.wait()


def post(server, **body) -> str:
    address, model = server
    body = {"model": model, "messages": MESSAGES, "max_tokens": NEW_TOKENS, "temperature": 0.0, **body}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    return urllib.request.urlopen(request).read().decode()


def test_a_chat_completion_is_what_generate_answers(server, answer):
    reply = json.loads(post(server))
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": answer}
    assert reply["usage"]["completion_tokens"] == NEW_TOKENS


def test_a_stream_brings_the_same_answer_in_pieces(server, answer):
    lines = [line.removeprefix("data: ") for line in post(server, stream=True).splitlines() if line]
    pieces = [json.loads(line)["choices"] for line in lines if line.startswith("{")]
    words = [choice["delta"].get("content") or "" for choices in pieces for choice in choices]
    assert "".join(words) == answer
    assert sum(map(bool, words)) > NEW_TOKENS // 2
