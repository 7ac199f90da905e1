"""Random mistakes in the files of a checkpoint, or in a recipe: one field, or the file as it lies on the disk."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import yaml

# What stands where something else should.
VALUES = (
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**70), 10**30, 0.5, -2.0, 1e300, float("nan"), float("inf")),
    *("", "text", "1", "../..", "\0", "🐈", "auto", [], [None], ["text"], [0, 1, 2], [[1], [2]], [10**9]),
    *({}, {"a": None}, {"type": "text"}, {"rope_type": "yarn"}, {"0": {"content": "<s>"}}),
)
MULTIPLES = (0, -1, 2, 3, 0.5, 1000, 10**6, 10**12)
TEMPLATES = (
    *("", "{{", "{% for m in messages %}{{ m.content }}", "{{ messages[99].content }}", "{{ messages | nothing }}"),
    *(
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ undefined.field }}",
        "text",
    ),
    *("{% for i in range(99999999) %}x{% endfor %}", "{{ 'x' * 99999999 }}", "{{ messages.__class__.__mro__ }}"),
    *("{% include 'x' %}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{% generation %}", "{{ messages }}\0"),
    *("{% for m in messages %}{{ m.tool_calls[0].function.name }}{% endfor %}", "{{ bos_token + eos_token + none }}"),
)
JSON_FILES = (
    *(
        ("config.json",) * 5
        + ("tokenizer.json",) * 3
        + ("tokenizer_config.json",) * 2
        + ("generation_config.json",) * 2
    ),
    *("special_tokens_map.json", "added_tokens.json", "model.safetensors.index.json"),
)
FIRST = {  # what a file says that a folder lacks
    "special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}},
    "added_tokens.json": {"<|user|>": 3},
    "generation_config.json": {"bos_token_id": 1, "eos_token_id": [2], "temperature": 0.7},
    "model.safetensors.index.json": {
        "metadata": {"total_size": 1},
        "weight_map": {"lm_head.weight": "model.safetensors"},
    },
}


def places(said: Any) -> list[tuple[Any, Any]]:
    """Each container within `said`, with each of its keys or places, those of long lists and tables thinned out."""
    pairs = list(said.items()) if isinstance(said, dict) else list(enumerate(said)) if isinstance(said, list) else []
    kept = pairs[:: max(1, len(pairs) // 40)]
    return [(said, key) for key, _ in kept] + [place for _, value in kept for place in places(value)]


def change(said: Any, random: Random) -> None:
    """Change one field in place."""
    found = places(said)
    if not found:
        return
    # A field of a file is as likely as all that is within it.
    shallow = [(holder, key) for holder, key in found if holder is said]
    holder, key = random.choice(shallow if random.random() < 0.6 else found)
    value = holder[key]
    other, elsewhere = random.choice(found)
    CHANGES[random.choice(sorted(CHANGES))](holder, key, value, other, elsewhere, random)


def drop(holder, key, value, other, elsewhere, random):
    del holder[key]


def replace(holder, key, value, other, elsewhere, random):
    holder[key] = random.choice(VALUES)


def scale(holder, key, value, other, elsewhere, random):
    number = isinstance(value, int | float)
    holder[key] = value * random.choice(MULTIPLES) if number else random.choice(VALUES)


def swap(holder, key, value, other, elsewhere, random):
    holder[key], other[elsewhere] = other[elsewhere], value
    json.dumps(holder)  # raises where one is now within itself


def nest(holder, key, value, other, elsewhere, random):
    holder[key] = random.choice(([value], {"a": value}, {str(key): value}, [value, value], str(value)))


def add(holder, key, value, other, elsewhere, random):
    name = random.choice(NEW)
    if isinstance(holder, dict):
        holder[name] = random.choice(VALUES)
    else:
        holder.append(random.choice(VALUES))


NEW = (
    *(
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "head_dim",
        "rope_scaling",
        "layer_types",
    ),
    *("quantization_config", "auto_map", "dtype", "pad_token_id", "eos_token_id", "architectures", "sliding_window"),
    *(
        "chat_template",
        "model_max_length",
        "tokenizer_class",
        "added_tokens_decoder",
        "text_config",
        "rope_parameters",
    ),
    *("do_sample", "temperature", "num_beams", "tie_word_embeddings", "provenance", "router_args", "mlp_layer_types"),
)
CHANGES: dict[str, Callable] = {f.__name__: f for f in (drop, replace, scale, swap, nest, add)}


def damage(raw: bytes, random: Random) -> bytes:
    """A file as a download, an editor or a hand leaves it."""
    place = random.randint(0, len(raw))
    kinds = (
        lambda: b"",
        lambda: raw[:place],
        lambda: raw[:place] + b"\xff\xfe\x80" + raw[place:],
        lambda: raw[:place] + b"\0" + raw[place:],
        lambda: raw[:place] + raw[place + 7 :],
        lambda: b"\xef\xbb\xbf" + raw,
        lambda: raw.replace(b"{", b'{"model_type": "llama", "model_type": 1, ', 1),
        lambda: b"[" * 100_000,
        lambda: b"null",
        lambda: b"[]",
        lambda: b"{}",
        lambda: raw.decode("utf-8", "replace").encode("utf-16"),
    )
    return random.choice(kinds)()


def damage_header(raw: bytes, random: Random) -> bytes:
    """A safetensors file whose header says something else, or whose bytes do."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    kind = random.randint(0, 4)
    if kind == 0:
        return damage(raw, random)
    if kind == 1:
        return random.choice((0, 7, 2**31, 2**63, length + 1)).to_bytes(8, "little") + raw[8:]
    if kind == 2:  # weights that are no numbers
        return raw[:-4000] + b"\xff" * min(4000, len(raw))
    if kind == 3:
        names = sorted(header)
        one, other = random.choice(names), random.choice(names)
        header[one], header[other] = header[other], header[one]
    else:
        change_in(header, random)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]


def change_in(said: Any, random: Random) -> None:
    try:
        change(said, random)
    except ValueError:  # within itself
        said.clear()


def mutate_json(path: Path, random: Random) -> None:
    if not path.exists():
        path.write_text(json.dumps(FIRST.get(path.name, {})), encoding="utf-8")
    if random.random() < 0.15:
        path.write_bytes(damage(path.read_bytes(), random))
        return
    said = json.loads(path.read_text(encoding="utf-8"))
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        change_in(said, random)
    path.write_text(json.dumps(said), encoding="utf-8")


def mutate_checkpoint(folder: Path, random: Random) -> str:
    """Make mistakes in one file of `folder`; returns which."""
    kind = random.random()
    if kind < 0.1:
        path = folder / "chat_template.jinja"
        path.write_text(random.choice(TEMPLATES), encoding="utf-8")
    elif kind < 0.2:
        path = folder / "model.safetensors"
        path.write_bytes(damage_header(path.read_bytes(), random))
    elif kind < 0.23:
        path = random.choice(sorted(x for x in folder.iterdir() if x.is_file()))
        path.unlink()
    else:
        path = folder / random.choice(JSON_FILES)
        mutate_json(path, random)
    return path.name


def mutate_recipe(recipe: Path, path: Path, random: Random) -> str:
    """Write to `path` a recipe with mistakes; returns its name."""
    raw = recipe.read_bytes()
    if random.random() < 0.1:
        path.write_bytes(damage(raw, random))
        return path.name
    said = yaml.safe_load(raw)
    for _ in range(random.choice((1, 1, 2))):
        change_in(said, random)
    path.write_text(yaml.safe_dump(said, allow_unicode=random.random() < 0.5), encoding="utf-8", errors="replace")
    return path.name
