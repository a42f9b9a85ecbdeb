# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Tiny tokenizers of every kind and tiny random models, built in memory."""

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed


TEXTS = [
    "Question: who wrote the book? Passages: [1] Anna Brown\nAnna Brown was born in Paris in 1907.",
    "[12] > [3] > [117]\nAnswer the question with the passages above. Write only the answer, as short as possible.",
    *(f"[{i}] > [{i + 1}]" for i in range(1, 121)),
    *(f"the year {1900 + i}, number {i}" for i in range(100)),
]
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def word_level_tokenizer(texts=TEXTS) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]|\n"), behavior="removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix="")
    trainer = trainers.WordLevelTrainer(special_tokens=SPECIAL_TOKENS)
    tokenizer.train_from_iterator([*texts, *TEXTS], trainer)
    return _wrap(tokenizer)


def bpe_tokenizer(split_digits: bool, texts=TEXTS) -> PreTrainedTokenizerFast:
    """Byte-level BPE: "12" is two tokens with `split_digits`, as for Qwen; one without, as for Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    digits = [pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *digits,
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([*texts, *TEXTS * 3], trainer)
    return _wrap(tokenizer)


def sentencepiece_tokenizer(texts=TEXTS) -> PreTrainedTokenizerFast:
    """In the manner of Llama 2: a leading space is a character of the first token, bytes fall back."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[*SPECIAL_TOKENS, "<0x0A>"])
    tokenizer.train_from_iterator([*texts, *TEXTS], trainer)
    return _wrap(tokenizer)


TOKENIZERS = {
    "byte-level BPE, single digits": lambda: bpe_tokenizer(split_digits=True),
    "byte-level BPE, whole numbers": lambda: bpe_tokenizer(split_digits=False),
    "SentencePiece": sentencepiece_tokenizer,
    "WordLevel": word_level_tokenizer,
}


def tiny_llama(tokenizer, seed: int = 0, **kwargs) -> LlamaForCausalLM:
    set_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "initializer_range": 0.2,  # distributions far from uniform, so that a wrong number shows
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        | kwargs
    )
    return LlamaForCausalLM(config).eval()


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
