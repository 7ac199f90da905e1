"""`hf-moe generate`."""

import json as json_format
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .choose import likeliest, most_common
from .inspect import Quantize, TrustRemoteCode
from .output import hide_loading_bars, messages_on_stderr, print_report

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_moe.generation.guided import GuidedLogitsProcessor


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A saved model or adapter, or a model id on the Hub.")],
    prompt: Annotated[str, typer.Option(help="The text to continue, or the question to answer with --chat.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sample at this temperature; 0 is greedy.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens that hold this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt through the model's chat template.")] = False,
    json_schema: Annotated[
        Path | None,
        typer.Option(metavar="FILE", exists=True, dir_okay=False, help="Write JSON that this JSON schema allows."),
    ] = None,
    regex: Annotated[str | None, typer.Option(help="Write a text that this regular expression matches.")] = None,
    best_of: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="Of N texts the one of highest mean log-probability.")
    ] = None,
    self_consistency: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="Of N texts the first with the answer that most give.")
    ] = None,
    use_mtp: Annotated[
        bool, typer.Option("--use-mtp", help="Draft with the model's modules for multi-token prediction.")
    ] = False,
    quantize: Quantize = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Write text with any causal language model of Transformers; greedy unless a temperature is given."""
    check_choices(temperature, top_p, best_of, self_consistency, use_mtp)
    with messages_on_stderr():
        language_model, tokenizer = load(model, trust_remote_code, quantize)
    if use_mtp and not getattr(language_model.config, "num_mtp_layers", 0):
        raise ValueError(f"--use-mtp needs modules for multi-token prediction, but {model} has none; leave it out.")
    guide = make_guide(language_model, tokenizer, json_schema, regex)
    inputs = encode(tokenizer, prompt, chat)
    check_rows(language_model, inputs, model)
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    settings |= {"guide": guide, "use_mtp": use_mtp}
    count, choose = (best_of, likeliest) if best_of else (self_consistency, most_common)
    if count is None:
        report = continue_text(language_model, tokenizer, inputs, **settings, stream=not json, echo=not chat)
    else:
        texts = continue_tokens(language_model, tokenizer, inputs, **settings, count=count)
        whole = [text for text in texts if guide is None or guide.follows(text.tolist())]
        report = choose(language_model, tokenizer, inputs["input_ids"][0], whole or texts)
        report |= {} if guide is None else {"complete": bool(whole)}
        if not json:
            print(report["text"] if chat else prompt + report["text"])
    if json:
        print_report({"model": model, "prompt": prompt, **report}, as_json=True)
    if report.get("complete") is False:
        print(f"hf-moe: after --max-new-tokens {max_new_tokens} the guided text is not complete.", file=sys.stderr)
        raise typer.Exit(1)


def check_choices(
    temperature: float, top_p: float, best_of: int | None, self_consistency: int | None, use_mtp: bool
) -> None:
    """Raises ValueError where options contradict each other, or one has nothing to choose from."""
    if best_of and self_consistency:
        raise ValueError("--best-of and --self-consistency both choose the text: leave one of them out.")
    if use_mtp and (best_of or self_consistency):
        raise ValueError("--use-mtp writes one text at a time: leave it out, or --best-of and --self-consistency.")
    for option, given in (
        ("--top-p chooses among sampled tokens", top_p < 1.0),
        ("--best-of chooses among sampled texts", best_of),
        ("--self-consistency chooses among sampled texts", self_consistency),
    ):
        if given and temperature == 0.0:
            raise ValueError(f"{option}; give a --temperature above 0 with it.")


def load(
    model: str | Path, trust_remote_code: bool = False, quantize: str | None = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model, in the precision it was saved in and on the GPU if there is one, and its tokenizer."""
    hide_loading_bars()
    from hf_moe.fast_generation import fast_generate, refusal
    from hf_moe.loading import load

    language_model, tokenizer = load(model, trust_remote_code, quantize)
    if language_model.device.type == "cuda" and refusal(language_model) is None:
        language_model = fast_generate(language_model)
    return language_model, tokenizer


def encode(tokenizer: "PreTrainedTokenizerBase", prompt: str, chat: bool) -> dict:
    """The prompt's tokens [1, T] with their mask. Raises ValueError where there is no chat template or no token."""
    from hf_moe.chat import render

    if chat:
        if not tokenizer.chat_template:
            raise ValueError("--chat needs a chat template, but this model's tokenizer has none; leave --chat out.")
        message = [{"role": "user", "content": prompt}]
        text = render(tokenizer, message, "--prompt", add_generation_prompt=True)
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[-1] == 0:
        raise ValueError("--prompt is empty, and this model's tokenizer adds no token of its own to start from.")
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def check_rows(model: "PreTrainedModel", inputs: dict, name: str) -> None:
    """Raises ValueError where the tokenizer has made a token that the model has no row for."""
    token, rows = inputs["input_ids"].max().item(), model.get_input_embeddings().weight.shape[0]
    if token >= rows:
        raise ValueError(
            f"--prompt has the token {token}, but {name} has rows 0 to {rows - 1}: its tokenizer is another."
        )


def make_guide(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", json_schema: Path | None, regex: str | None
) -> "GuidedLogitsProcessor | None":
    """What keeps the text within a JSON schema's file or a regular expression, if one is given."""
    if json_schema is None and regex is None:
        return None
    if json_schema is not None and regex is not None:
        raise ValueError("--json-schema and --regex both say what the text may be: leave one of them out.")
    from hf_moe.generation.guided import GuidedLogitsProcessor

    schema = None
    if json_schema is not None:
        try:
            schema = json_format.loads(json_schema.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"--json-schema {json_schema} is not JSON: {error}") from error
        if not isinstance(schema, dict):
            raise ValueError(f"--json-schema {json_schema} must hold a JSON object, but holds {schema!r:.40}.")
    return GuidedLogitsProcessor(tokenizer, schema, regex, model.generation_config.eos_token_id)


def continue_tokens(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    inputs: dict,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    guide: "GuidedLogitsProcessor | None" = None,
    use_mtp: bool = False,
    count: int = 1,
    streamer=None,
) -> "list[torch.Tensor]":
    """The new tokens of each of `count` texts after `inputs`, with the one that ends it and without padding."""
    import transformers

    transformers.set_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    # A checkpoint's own settings must not reach a greedy run, nor its beams one that is printed as it grows.
    greedy = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
    output = model.generate(
        **{name: tensor.to(model.device) for name, tensor in inputs.items()},
        **(sampling if temperature > 0 else greedy),
        **({"use_mtp": True} if use_mtp else {}),
        logits_processor=None if guide is None else [guide],
        max_new_tokens=max_new_tokens,
        num_return_sequences=count,
        num_beams=1,
        return_dict_in_generate=False,
        streamer=streamer,
        tokenizer=tokenizer,  # for the generation config's stop_strings
    )[:, inputs["input_ids"].shape[-1] :].cpu()
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    lengths = [next((i + 1 for i, token in enumerate(row) if token in ends), len(row)) for row in output.tolist()]
    return [row[:length] for row, length in zip(output, lengths, strict=True)]


def continue_text(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    inputs: dict,
    stream: bool = False,
    echo: bool = False,
    guide: "GuidedLogitsProcessor | None" = None,
    **settings,
) -> dict:
    """Generate after `inputs`; with `stream` the text is printed as it grows, after the prompt's own if `echo`.

    Returns text (without the prompt), prompt_tokens, new_tokens, seconds and, with a `guide`, complete.
    """
    import transformers

    streamer = transformers.TextStreamer(tokenizer, skip_prompt=not echo, skip_special_tokens=True) if stream else None
    start = time.perf_counter()
    (output,) = continue_tokens(model, tokenizer, inputs, guide=guide, streamer=streamer, **settings)
    report = {
        "text": tokenizer.decode(output, skip_special_tokens=True),
        "prompt_tokens": inputs["input_ids"].shape[-1],
        "new_tokens": len(output),
        "seconds": time.perf_counter() - start,
    }
    return report if guide is None else report | {"complete": guide.follows(output.tolist())}
