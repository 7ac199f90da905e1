"""Conversions carry the chat template: the text that a model was tuned on stays the text that it is served with."""

from hf_moe.conversion import export_checkpoint, import_checkpoint
from transformers import AutoTokenizer

from hf_moe.demo import DEMO_MODEL

CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Zoe."}]


def test_upcycling_export_and_import_carry_it(saved, tmp_path):
    export_checkpoint(saved, tmp_path / "mixtral", to="mixtral", verify=False, progress=False)
    import_checkpoint(tmp_path / "mixtral", tmp_path / "back", verify=False, progress=False)
    texts = [
        AutoTokenizer.from_pretrained(folder).apply_chat_template(CHAT, tokenize=False)
        for folder in (DEMO_MODEL, saved, tmp_path / "mixtral", tmp_path / "back")
    ]
    assert len(set(texts)) == 1
    assert "<|user|>Who?" in texts[0]
