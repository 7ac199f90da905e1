"""Make the dense model that `hf-moe demo` starts from: `python -m hf_moe.demo.make_model OUT` (CPU, about 5 minutes).

A byte-level BPE tokenizer and a Llama of 0.4M parameters are trained on stories of the grammar in `text.py`: half
of them plain text, half as answers in the chat format.
"""

import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .text import postcard, story

SEED = 0
STEPS, BATCH_SIZE, LEARNING_RATE = 700, 24, 3e-3
PAD, BOS, EOS, USER, ASSISTANT = "<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"
# {% generation %} marks the assistant's tokens, so that TRL can train on these alone.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with 512 tokens. Half of its text is postcards, so that these aren't cut into bytes."""
    rng = random.Random(SEED)
    texts = [part for _ in range(3000) for part in (*story(rng), *postcard(rng, held_out=False))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[PAD, BOS, EOS, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def train_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Train on fresh stories until the schedule ends; prints the loss of each hundredth step."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED + 1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.08,  # near 1 / sqrt(hidden_size); 0.02 would learn to copy names much later
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.05)
    start = time.monotonic()
    model.train()
    for step in range(STEPS):
        texts = []
        for number in range(BATCH_SIZE):
            request, text = story(rng)
            head = f"{USER}{request}{ASSISTANT}" if number % 2 == 0 else ""
            texts.append(head + text + EOS)
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}, {time.monotonic() - start:.0f} s", flush=True)
    return model.eval()


def main(output: str) -> None:
    folder = Path(output)
    tokenizer = train_tokenizer()
    model = train_model(tokenizer)
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=300)[0]))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m hf_moe.demo.make_model OUT")
    main(sys.argv[1])
