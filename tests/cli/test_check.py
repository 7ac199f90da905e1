"""`hf-moe check`: what it finds, and what it says of a check that fails."""

import json

import hf_moe.self_check as self_check


def test_every_check_passes_here(command):
    code, out, err = command("check", "--json")
    said = json.loads(out)
    assert [result for result in said["checks"] if not result["ok"]] == []
    assert code == 0
    assert [result["check"] for result in said["checks"]] == list(self_check.CHECKS)
    assert all(result["ok"] and result["found"] for result in said["checks"])
    assert {"hf_moe", "transformers", "torch", "device", "decoding", "experts in training"} <= said["machine"].keys()
    assert "Warning" not in err and "deprecated" not in err


def test_a_wrong_text_is_one_line_and_exit_code_1(command, monkeypatch, cache_is_forgotten):
    wrong = {name: self_check.CHECKS[name] for name in ("host", "cached text", "left padding")}
    monkeypatch.setattr(self_check, "CHECKS", wrong)
    code, out, err = command("check")
    assert code == 1
    assert "FAILED  cached text         Failed: with a cache the logits of a text differ by up to" in out
    assert err.splitlines()[-1] == "hf-moe: 2 of 3 checks failed: cached text, left padding."
