"""Grafts onto a model whose code lies beside its checkpoint: it runs by consent alone, and goes along."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_moe.conversion import upcycle, verify
from hf_moe_cli import main
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from hf_moe import HfMoeGraftForCausalLM
from hf_moe.hub.upload import push
from hf_moe.loading import load_model
from tests.conftest import tokens
from tests.dense_families import tiny

CONFIG = """
from pathlib import Path
from transformers import PretrainedConfig

Path(__file__).with_name("ran").touch()


class PlainConfig(PretrainedConfig):
    model_type = "plain_decoder"

    def __init__(self, vocab_size=128, hidden_size=32, intermediate_size=24, num_hidden_layers=2, **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**kwargs)
"""
MODEL = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_plain import PlainConfig
from .plain_mlp import PlainMLP

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class PlainAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size, bias=False))

    def forward(self, x, cache):
        query, key, value = (part(x)[:, None] for part in (self.q_proj, self.k_proj, self.v_proj))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        new, all = query.shape[2], key.shape[2]
        mask = torch.ones(new, all, dtype=torch.bool, device=x.device).tril(all - new)
        return self.o_proj(nn.functional.scaled_dot_product_attention(query, key, value, mask)[:, 0])


class PlainLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.input_norm, self.norm = nn.RMSNorm(config.hidden_size), nn.RMSNorm(config.hidden_size)
        self.self_attn = PlainAttention(config, layer_idx)
        self.mlp = PlainMLP(config)

    def forward(self, x, cache):
        x = x + self.self_attn(self.input_norm(x), cache)
        return x + self.mlp(self.norm(x))


class PlainPreTrainedModel(PreTrainedModel):
    config_class = PlainConfig
    base_model_prefix = "model"

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(0, 0.2)


class PlainModel(PlainPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(PlainLayer(config, index) for index in range(config.num_hidden_layers))
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, cache=None, **kwargs):
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, cache)
        return BaseModelOutputWithPast(last_hidden_state=x, **{CACHE: cache})


class PlainForCausalLM(PlainPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = PlainModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def forward(self, input_ids=None, attention_mask=None, labels=None, use_cache=None, **kwargs):
        read = self.model(input_ids, cache=kwargs.pop(CACHE, None))
        logits = self.lm_head(read.last_hidden_state)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: read[CACHE] if CACHE in read else None})
"""
MLP = """
from torch import nn


class PlainMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
"""
FILES = {"configuration_plain.py": CONFIG, "modeling_plain.py": MODEL, "plain_mlp.py": MLP}
MAP = {"AutoConfig": "configuration_plain.PlainConfig", "AutoModelForCausalLM": "modeling_plain.PlainForCausalLM"}


def ran() -> list[Path]:
    """The marks that the code leaves where it ran: Transformers copies it before."""
    from transformers.utils.hub import HF_MODULES_CACHE

    return [path for path in Path(HF_MODULES_CACHE).rglob("ran") if path.is_file()]


@pytest.fixture(autouse=True)
def modules_of_its_own(tmp_path, monkeypatch):
    """Where Transformers puts code that it runs."""
    for name in ("transformers.dynamic_module_utils", "transformers.utils.hub"):
        monkeypatch.setattr(f"{name}.HF_MODULES_CACHE", str(tmp_path / "modules"), raising=False)
    (tmp_path / "modules").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "modules")
    before = taken_modules()
    yield
    taken_modules()
    sys.modules.update(before)


def taken_modules() -> dict:
    """What Python knows of such code, which it then forgets."""
    names = [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]
    return {name: sys.modules.pop(name) for name in names}


@pytest.fixture
def dense(tmp_path) -> Path:
    """A checkpoint of a model that Transformers does not know. Written without running its code."""
    folder = tmp_path / "dense"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    said = {"model_type": "plain_decoder", "auto_map": MAP, "architectures": ["PlainForCausalLM"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(said))  # all sizes are defaults of the class
    sizes = {"embed_tokens": (128, 32)}
    for layer in range(2):
        sizes |= {f"layers.{layer}.{name}": (32,) for name in ("input_norm", "norm")}
        sizes |= {f"layers.{layer}.self_attn.{name}_proj": (32, 32) for name in "qkvo"}
        sizes |= {f"layers.{layer}.mlp.{name}_proj": (24, 32) for name in ("gate", "up")}
        sizes[f"layers.{layer}.mlp.down_proj"] = (32, 24)
    weights = {f"model.{name}.weight": torch.randn(size) * 0.2 for name, size in sizes.items()}
    weights["lm_head.weight"] = torch.randn(128, 32) * 0.2
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


GIVEN = {"experts": 3, "top_k": 2, "progress": False}
LOGITS = """
import json, sys
import torch
{}
from transformers import AutoModelForCausalLM
ids = torch.tensor([json.loads(sys.argv[2])])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
text = model.generate(ids[:, :4], max_new_tokens=3, do_sample=False)
print(json.dumps([model(input_ids=ids).logits.tolist(), text.tolist(), "hf_moe" in sys.modules]))
"""


def test_without_consent_no_code_runs(dense, tmp_path):
    with pytest.raises(
        ValueError, match=r"is a plain_decoder, whose code is in modeling_plain.py .*--trust-remote-code"
    ):
        upcycle(dense, tmp_path / "moe", **GIVEN)
    with pytest.raises(ValueError, match="--trust-remote-code"):
        verify(dense, dense)
    assert ran() == [] and not (tmp_path / "moe").exists()


def test_a_graft_carries_the_code_and_loads_anywhere(dense, tmp_path):
    report = upcycle(dense, tmp_path / "moe", trust_remote_code=True, **GIVEN)
    assert ran() and report["max_abs_diff"] < 1e-5 and report["cached_text_equal"]
    assert {*FILES, "modeling_hf_moe_graft.py"} <= {path.name for path in (tmp_path / "moe").iterdir()}
    said = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert sorted(said["provenance"]["remote_code"]) == sorted(FILES)
    assert (said["backbone"]["hidden_size"], said["backbone"]["auto_map"]) == (32, MAP)
    assert "modeling_plain.py" in (tmp_path / "moe" / "README.md").read_text()
    assert verify(dense, tmp_path / "moe", trust_remote_code=True)["max_abs_diff"] < 1e-5

    ids = tokens(1, 9, 128)
    expected = AutoModelForCausalLM.from_pretrained(dense, trust_remote_code=True).eval()(input_ids=ids).logits
    model = load_model(tmp_path / "moe", trust_remote_code=True)
    assert isinstance(model, HfMoeGraftForCausalLM) and type(model).host_class.__name__ == "PlainForCausalLM"
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    model.eval().save_pretrained(tmp_path / "again")
    for folder in ("moe", "again"):
        for other in ("import hf_moe", ""):
            environment = os.environ | {"HF_HOME": str(tmp_path / "home")}
            command = [sys.executable, "-c", LOGITS.format(other), str(tmp_path / folder), json.dumps(ids[0].tolist())]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
            assert done.returncode == 0, done.stderr[-2000:]
            logits, text, imported = json.loads(done.stdout.splitlines()[-1])
            torch.testing.assert_close(torch.tensor(logits), expected, rtol=1e-5, atol=1e-5)
            assert (len(text[0]), imported) == (7, bool(other))


def test_a_graft_runs_its_hosts_code_by_consent_alone(dense, tmp_path, monkeypatch, capfd):
    upcycle(dense, tmp_path / "moe", trust_remote_code=True, **GIVEN)
    with monkeypatch.context() as patched:
        patched.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "others"))
        for load in (AutoModelForCausalLM.from_pretrained, load_model):
            with pytest.raises(ValueError, match="plain_decoder is made by code that comes with it"):
                load(tmp_path / "moe")
        assert main(["inspect", str(tmp_path / "moe")]) == main(["plan", str(tmp_path / "moe")]) == 2
        assert capfd.readouterr().err.count("look at that, and load the model with trust_remote_code=True") == 2
        report = push(tmp_path / "moe", "someone/moe", dry_run=True)
        assert {*FILES} <= set(report["files"])
        assert not (tmp_path / "others").exists()
    assert main(["inspect", str(tmp_path / "moe"), "--trust-remote-code"]) == 0
    said = capfd.readouterr().out
    assert "grafted onto a plain_decoder (PlainForCausalLM)" in said and "its host, plain_decoder, shows none" in said
    assert main(["plan", str(tmp_path / "moe"), "--trust-remote-code", "--length", "16"]) == 0
    assert "activations" in capfd.readouterr().out


def test_a_model_that_transformers_knows_is_its_own_class_whatever_its_config_names(dense, tmp_path):
    tiny("cohere").save_pretrained(tmp_path / "cohere")
    said = json.loads((tmp_path / "cohere" / "config.json").read_text())
    (tmp_path / "cohere" / "config.json").write_text(json.dumps(said | {"auto_map": MAP}))
    for name, text in FILES.items():
        (tmp_path / "cohere" / name).write_text(text)
    upcycle(tmp_path / "cohere", tmp_path / "moe", **GIVEN)
    assert type(load_model(tmp_path / "moe")).host_class.__name__ == "CohereForCausalLM" and ran() == []
    here = {path.name for path in (tmp_path / "moe").iterdir()}
    assert not here & {*FILES, "configuration_cohere.py", "modeling_cohere.py"}
    push(tmp_path / "moe", "someone/moe", dry_run=True)


def test_code_that_nothing_needs_or_that_stands_in_the_way_is_refused(dense, tmp_path):
    tiny("cohere").save_pretrained(tmp_path / "cohere")
    with pytest.raises(ValueError, match=r"\(--trust-remote-code\) has no effect: cohere is a cohere"):
        upcycle(tmp_path / "cohere", tmp_path / "moe", trust_remote_code=True, **GIVEN)
    (dense / "plain_mlp.py").rename(dense / "mlp.py")
    (dense / "modeling_plain.py").write_text(MODEL.replace(".plain_mlp", ".mlp"))
    with pytest.raises(ValueError, match=r"mlp.py is named as a file of hf_moe's"):
        upcycle(dense, tmp_path / "moe", trust_remote_code=True, **GIVEN)
    assert ran() == []
