"""A router of the user's own through every command: trained by a recipe, and then with its code beside the model."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hf_moe.conversion import upcycle

import hf_moe
from hf_moe import HfMoeForCausalLM
from hf_moe.demo import DEMO_MODEL
from hf_moe.hub.renew import renew
from hf_moe.model.routing import ROUTERS
from hf_moe.plugins import load_plugin
from tests.cli.conftest import command  # noqa: F401  (a fixture)
from tests.plugins.conftest import FOLDER, forget

NAMES = ("my_top_p", "cosine", "threshold")
CHATS = [{"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "the dog ran"}]}] * 6
WITHOUT_HF_MOE = """
import json, sys
class NoHfMoe:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_moe":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoHfMoe())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
found = {}
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        found[folder] = model(torch.arange(2, 12)[None]).logits.tolist()
    model.save_pretrained(folder + "_again")
    again = AutoModelForCausalLM.from_pretrained(folder + "_again", trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.allclose(again(torch.arange(2, 12)[None]).logits, torch.tensor(found[folder]), atol=1e-5)
assert "hf_moe" not in sys.modules
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Router -> the folder of a model that a recipe has trained with it; this process has forgotten them."""
    pytest.importorskip("trl")
    folder = tmp_path_factory.mktemp("plugins")
    upcycle(DEMO_MODEL, folder / "moe", experts=4, top_k=2, verify=False, progress=False)
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, CHATS)))
    before, found = dict(ROUTERS), {}
    for name in NAMES:
        run = hf_moe.train(
            "tiny/sft",
            model=folder / "moe",
            plugins=[FOLDER / f"{name}.py"],
            router_type=name,
            router_args={"p": 0.26} if name == "my_top_p" else None,
            train_data=folder / "chats.jsonl",
            eval_data=[folder / "chats.jsonl"],
            output_dir=folder / name,
            max_steps=2,
            save_strategy="no",
            use_cpu=True,
            chat_template_path="plain",
        )
        assert run.trainer.moe.config.router_type == name and run.metrics["eval_loss"] > 0
        found[name] = folder / name, run.trainer.moe.eval()
    forget()
    ROUTERS.clear()
    ROUTERS.update(before)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_commands_run_its_code_where_it_is_trusted(name, trained, command, forgotten, tmp_path):  # noqa: F811
    folder, model = trained[name]
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a dog. The dog ran to the river and was glad. " * 20)
    words = {
        "generate": ["--prompt", "Once upon a time", "--max-new-tokens", "6"],
        "inspect": ["--json"],
        "trace": ["--data", text, "--out", tmp_path / "trace", "--json", "--prune-tokens", "0"],
    }
    for verb, further in words.items():
        code, out, err = command(verb, folder, *further)
        assert code == 2 and out == "" and err.count("\n") == 1, err
        assert f"router_type {name!r} is code that comes with the model, plugin_{name}.py" in err
        assert name not in ROUTERS
    trusted = {verb: command(verb, folder, *further, "--trust-remote-code") for verb, further in words.items()}
    assert all(result.code == 0 for result in trusted.values()), trusted
    code, out, err = command("verify", folder, folder, "--json", "--trust-remote-code")
    assert code == 0 and json.loads(out)["max_abs_diff"] == 0, err
    ROUTERS.pop(name)
    forget()
    named = {
        verb: command(verb, folder, *further, "--plugin", FOLDER / f"{name}.py")
        for verb, further in words.items()
        if verb != "trace"
    }
    assert {verb: result.out for verb, result in named.items()} == {
        verb: result.out for verb, result in trusted.items() if verb != "trace"
    }
    said = json.loads(trusted["inspect"].out)
    assert said["total_params"] == sum(x.numel() for x in model.parameters())
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    if name == "cosine":
        assert "measured_experts_per_tok" not in said
    else:
        measured = [x["eval_router_experts_per_token"] for x in log if "eval_router_experts_per_token" in x][-1]
        assert said["measured_experts_per_tok"] == measured
        routed = sum(x.numel() for n, x in model.named_parameters() if ".experts." in n)
        rest = said["total_params"] - routed
        assert said["measured_active_params"] == pytest.approx(rest + routed * measured / 4, rel=1e-6)
    numbers = json.loads((tmp_path / "trace" / "numbers.json").read_text())
    with torch.no_grad():
        ids = command_ids(folder, text)
        counts = []
        handles = [
            layer.mlp.gate.register_forward_hook(lambda m, args, out: counts.append((out[2] < 4).sum(-1).double()))
            for layer in model.model.layers
        ]
        model(ids)
        [handle.remove() for handle in handles]
    assert len(numbers["layers"]) == len(counts) == 4
    for layer, of_token in zip(numbers["layers"], counts, strict=True):
        assert layer["experts_per_token"]["mean"] == pytest.approx(of_token.mean().item(), abs=1e-5)
        assert layer["experts_per_token"]["spread"] == pytest.approx(of_token.std(correction=0).item(), abs=1e-5)


def command_ids(folder, text):
    """What trace reads of the text: one window."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)(text.read_text(), return_tensors="pt").input_ids


@pytest.mark.parametrize("name", NAMES)
def test_card_and_push_run_none_of_it(name, trained, command, forgotten, tmp_path):  # noqa: F811
    folder = shutil.copytree(trained[name][0], tmp_path / "model")
    (folder / "README.md").unlink()
    assert command("card", folder).code == 0
    card = (folder / "README.md").read_text()
    assert f"`{name}`" in card and ("per token as measured" in card) == (name != "cosine")
    code, out, err = command("push", folder, "me/model", "--dry-run")
    assert code == 0 and f"plugin_{name}.py" in out, err
    (folder / f"plugin_{name}.py").unlink()
    code, _, err = command("push", folder, "me/model", "--dry-run")
    assert code == 2 and f"plugin_{name}.py" in err
    assert name not in ROUTERS


def test_without_hf_moe_it_loads_and_is_saved_again(trained, forgotten, tmp_path):
    folders = {name: shutil.copytree(folder, tmp_path / name) for name, (folder, _) in trained.items()}
    shutil.copytree(trained["my_top_p"][0], tmp_path / "renewed")
    (tmp_path / "renewed" / "version.py").write_text('__version__ = "0.1.0"\n')
    renew(tmp_path / "renewed")
    assert (tmp_path / "renewed" / "plugin_my_top_p.py").is_file()
    places = [*map(str, folders.values()), str(tmp_path / "renewed")]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    run = [sys.executable, "-c", WITHOUT_HF_MOE, *places]
    result = subprocess.run(run, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    for place, logits in found.items():
        model = trained["my_top_p" if place.endswith("renewed") else os.path.basename(place)][1]
        with torch.no_grad():
            torch.testing.assert_close(torch.tensor(logits), model(torch.arange(2, 12)[None]).logits)
    for name in NAMES:
        assert (tmp_path / f"{name}_again" / f"plugin_{name}.py").read_text() == (
            folders[name] / f"plugin_{name}.py"
        ).read_text()


def test_in_python_it_is_trusted_or_refused(trained, forgotten, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, model = trained["threshold"]
    for load in (HfMoeForCausalLM, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=r"is code that comes with the model, plugin_threshold.py: look at that"):
            load.from_pretrained(folder)
    assert AutoConfig.from_pretrained(folder).needs_router_code
    for load in (HfMoeForCausalLM, AutoModelForCausalLM):
        forget()
        ROUTERS.pop("threshold", None)
        loaded = load.from_pretrained(folder, trust_remote_code=True)
        assert type(loaded) is HfMoeForCausalLM
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "plugin_threshold.py").read_text() == (folder / "plugin_threshold.py").read_text()
    assert (tmp_path / "again" / "routing.py").read_text() == (folder / "routing.py").read_text()
    # Another router of that name is known here by now: which of the two it is must not be a matter of luck.
    (tmp_path / "again" / "plugin_threshold.py").write_text("# other\n")
    with pytest.raises(ValueError, match=r"router_type 'threshold' is known here from .*, and .* is other code"):
        HfMoeForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)


def test_a_name_out_of_the_folder_is_refused(trained, forgotten, tmp_path):
    folder = shutil.copytree(trained["my_top_p"][0], tmp_path / "model")
    said = json.loads((folder / "config.json").read_text())
    for name in ("../evil.py", "/tmp/plugin_evil.py", "evil.py", "plugin_../x.py"):
        (folder / "config.json").write_text(json.dumps(said | {"router_code": name}))
        with pytest.raises(Exception, match="router_code is"):
            HfMoeForCausalLM.from_pretrained(folder, trust_remote_code=True)
    (folder / "config.json").write_text(json.dumps(said | {"router_code": "../a.py", "router_type": "softmax_topk"}))
    with pytest.raises(Exception, match="router_code is"):
        HfMoeForCausalLM.from_pretrained(folder)


def test_code_that_cannot_go_along_is_refused_before_anything_is_trained(trained, forgotten, tmp_path):
    text = (FOLDER / "my_top_p.py").read_text()
    (tmp_path / "mixed.py").write_text(text.replace('"""\n', '"""\n\nfrom hf_moe.sizes.counts import sizes\n', 1))
    load_plugin(tmp_path / "mixed.py")
    model = HfMoeForCausalLM(trained["cosine"][1].config.__class__.from_preset("olmoe-1b-7b", **TINY))
    model.config.router_type = "my_top_p"
    with pytest.raises(ValueError, match=r"mixed.py imports hf_moe.sizes.counts in line 3, but what goes along"):
        model.save_pretrained(tmp_path / "saved")


TINY = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 8}
TINY |= {"moe_intermediate_size": 8, "layer_types": None, "mlp_layer_types": None}


def test_a_router_of_a_session_is_saved_with_a_word(forgotten, tmp_path, caplog):
    from hf_moe.model.routing import Router, softmax_affinity

    def mine(logits, config, state):
        return ROUTERS["softmax_topk"].assign(logits, config, state)

    mine.__module__ = "__main__"
    ROUTERS["mine"] = Router(softmax_affinity, mine, {})
    config = hf_moe.HfMoeConfig.from_preset("olmoe-1b-7b", **TINY)
    config.router_type, config.router_args = "mine", {}
    with caplog.at_level("WARNING"):
        HfMoeForCausalLM(config).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("plugin_*"))


def test_arguments_of_a_run_in_python(tmp_path):
    with pytest.raises(ValueError, match="model is a HfMoeConfig, and a recipe trains what is in a folder"):
        hf_moe.train("tiny/sft", model=hf_moe.HfMoeConfig())
    with pytest.raises(ValueError, match="say the same"):
        hf_moe.train("tiny/sft", model="a", model_name_or_path="b")
    common = {"train_data": tmp_path / "x.jsonl", "output_dir": tmp_path / "out"}
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, CHATS)))
    with pytest.raises(ValueError, match="unknown argument steps; the nearest known one is max_steps"):
        hf_moe.train("tiny/sft", model=DEMO_MODEL, steps=3, **common)
    with pytest.raises(ValueError, match=r"are for models of hf_moe, and .* is a llama"):
        hf_moe.train("tiny/sft", model=DEMO_MODEL, router_type="base", chat_template_path="plain", **common)
