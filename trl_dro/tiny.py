# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""A language model small enough to be trained from nothing on two CPU cores in half a minute.

It serves the demo and the tests, which must run offline. Its vocabulary are the words of the synthetic world, and its
attention starts out with the two habits that small transformers need longest to find: the first layer reads the
nearest tokens, the second one looks for positions whose surroundings resemble its own. Everything else is random.
"""

from collections.abc import Iterable

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast


# The question stands right before the completion, within reach of the first layer.
SELECTOR_TEMPLATE = "{documents}\nQuestion: {question}\nRank:"
GENERATOR_TEMPLATE = "{documents}\nQuestion: {question}\nAnswer:"

MAX_ID = 20

_TOKEN = r"\[\d+\]|\w+|[^\w\s]"


def tiny_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """
    Word-level tokenizer for a closed vocabulary.

    Words, punctuation marks and document ids (`[1]` to `[20]`) are tokens, whitespace is dropped.

    Args:
        texts (`Iterable[str]`):
            Every text whose words must be known. Other words become `<unk>`.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]: with the special tokens `<pad>`, `<eos>` and `<unk>`.
    """
    split = pre_tokenizers.Split(Regex(_TOKEN), behavior="removed", invert=True)
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    words |= {word for word, _ in split.pre_tokenize_str(SELECTOR_TEMPLATE + GENERATOR_TEMPLATE)}
    ids = [f"[{i}]" for i in range(1, MAX_ID + 1)]
    vocabulary = ["<pad>", "<eos>", "<unk>", ">", *ids, *sorted(words - {">", *ids})]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def tiny_llama(
    tokenizer: PreTrainedTokenizerBase,
    hidden_size: int = 96,
    num_layers: int = 2,
    num_heads: int = 4,
    max_length: int = 512,
    seed: int = 0,
    loc: float = 0.2,
    match: float = 1.0,
    vo: float = 3.0,
    flo=0.02,
    fhi=0.3,
    theta=10000.0,
    noise=0.02,
    vo2=3.0,
    ir=0.05,
) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=max_length,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=True,
        initializer_range=ir,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        h = hidden_size
        hd = h // num_heads
        with torch.no_grad():
            u = torch.randn(h)
            u /= u.norm()
            P = torch.eye(h) - torch.outer(u, u)
            e = torch.randn(len(tokenizer), h) @ P
            e /= e.norm(dim=1, keepdim=True)
            model.model.embed_tokens.weight.copy_(e + u)
            freq = theta ** (-torch.arange(0, hd, 2) / hd)
            for i, l in enumerate(model.model.layers):
                s = l.self_attn
                for x in (s.q_proj, s.k_proj, s.v_proj, s.o_proj):
                    x.weight.normal_(0, noise)
                w = torch.empty(h, h)
                torch.nn.init.orthogonal_(w)
                if i < 1:
                    amp = ((freq > flo) & (freq < fhi)).float()
                    vec = torch.cat([amp, torch.zeros_like(amp)]).repeat(num_heads)
                    width = torch.linspace(1.0, 2.0, num_heads).repeat_interleave(hd)
                    w = torch.outer(vec * width, u) * loc
                else:
                    low = (freq * 60 < 1.5).float()
                    low = torch.cat([low, low]).repeat(num_heads)[:, None]
                    w = w * (low + 0.1) * match @ P
                s.q_proj.weight += w
                s.k_proj.weight += w
                torch.nn.init.orthogonal_(w)
                w = w @ P
                s.v_proj.weight += w
                s.o_proj.weight += (vo if i < 1 else vo2) * w.T
    return model


def completion_logits(model, sequences, prompt_lengths):
    """logits that predict the completion tokens, flat"""
