"""`hf-moe generate`."""

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .output import hide_loading_bars, messages_on_stderr, print_report

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A saved model, or a model id on the Hub.")],
    prompt: Annotated[str, typer.Option(help="The text to continue, or the question to answer with --chat.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sample at this temperature; 0 is greedy.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens that hold this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt through the model's chat template.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Write text with any causal language model of Transformers; greedy unless a temperature is given."""
    if top_p < 1.0 and temperature == 0.0:
        raise ValueError("--top-p chooses among sampled tokens; give a --temperature above 0 with it.")
    with messages_on_stderr():
        language_model, tokenizer = load(model, trust_remote_code)
    inputs = encode(tokenizer, prompt, chat)
    report = continue_text(
        language_model, tokenizer, inputs, max_new_tokens, temperature, top_p, seed, stream=not json, echo=not chat
    )
    if json:
        print_report({"model": model, "prompt": prompt, **report}, as_json=True)


def load(model: str | Path, trust_remote_code: bool = False) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model, in the precision it was saved in and on the GPU if there is one, and its tokenizer."""
    # A path that is not there would otherwise be asked for on the Hub.
    if not Path(model).is_dir() and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(model)):
        raise FileNotFoundError(f"{model} is neither a folder nor a model id such as owner/name.")
    hide_loading_bars()
    import torch
    import transformers

    import hf_moe  # noqa: F401  (registers model_type "hf_moe")

    transformers.AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (ValueError, OSError) as error:
        raise ValueError(f"{model} has no tokenizer that can be loaded: {error}") from error
    language_model = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype="auto", trust_remote_code=trust_remote_code
    )
    return language_model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def encode(tokenizer: "PreTrainedTokenizerBase", prompt: str, chat: bool) -> dict:
    """The prompt's tokens [1, T] with their mask. Raises ValueError where there is no chat template or no token."""
    if chat:
        if not tokenizer.chat_template:
            raise ValueError("--chat needs a chat template, but this model's tokenizer has none; leave --chat out.")
        message = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[-1] == 0:
        raise ValueError("--prompt is empty, and this model's tokenizer adds no token of its own to start from.")
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def continue_text(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    inputs: dict,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stream: bool = False,
    echo: bool = False,
) -> dict:
    """Generate after `inputs`; with `stream` the text is printed as it grows, after the prompt's own if `echo`.

    Returns text (without the prompt), prompt_tokens, new_tokens and seconds.
    """
    import transformers

    transformers.set_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    # A checkpoint's own sampling settings must not reach a greedy run.
    greedy = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=not echo, skip_special_tokens=True) if stream else None
    prompt_tokens = inputs["input_ids"].shape[-1]
    start = time.perf_counter()
    output = model.generate(
        **{name: tensor.to(model.device) for name, tensor in inputs.items()},
        **(sampling if temperature > 0 else greedy),
        max_new_tokens=max_new_tokens,
        streamer=streamer,
    )[0, prompt_tokens:]
    return {
        "text": tokenizer.decode(output, skip_special_tokens=True),
        "prompt_tokens": prompt_tokens,
        "new_tokens": len(output),
        "seconds": time.perf_counter() - start,
    }
