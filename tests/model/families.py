# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Tiny configs of causal language models of many families, and what the check at start must find out about each."""

from transformers import CONFIG_MAPPING


_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,  # distributions far from uniform, so that a wrong number shows
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024, "initializer_range": 0.2}
_MOE = {**_LLAMA, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_WINDOW = {**_LLAMA, "sliding_window": 16}
_SHORT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
_MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "initializer_range": 0.2}
_MPT = {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 1024, "initializer_range": 0.2}
_GPT_NEO = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 1024}

# Rows that share their prompt's tokens are exact.
SHARED = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "gemma", "phi", "phi3", "olmo2", "stablelm", "starcoder2"), _LLAMA),
    **dict.fromkeys(("cohere", "granite", "helium", "glm4", "smollm3", "nemotron", "seed_oss"), _LLAMA),
    **dict.fromkeys(("persimmon", "gpt_neox", "biogpt"), _LLAMA),
    **dict.fromkeys(("mistral", "gemma2", "gemma3_text", "olmo3", "cohere2", "exaone4", "ministral"), _WINDOW),
    **dict.fromkeys(("mixtral", "qwen3_moe", "olmoe", "granitemoe"), _MOE),
    "gpt_oss": {**_MOE, "sliding_window": 16},
    "gpt2": _GPT2,
    "gptj": {**_GPT2, "rotary_dim": 4},
    "codegen": {**_GPT2, "rotary_dim": 4},
    "gpt_bigcode": _GPT2,
    "opt": {**_LLAMA, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "xglm": {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4, "init_std": 0.2},
    "falcon": _SHORT,
    "modernbert-decoder": {**_LLAMA, "global_attn_every_n_layers": 2, "local_attention": 16},
}
# They are not, or the model cannot take them: every sequence gets a row of its own.
SEPARATE = {
    "gpt_neo": {**_GPT_NEO, "attention_types": [[["global", "local"], 1]], "window_size": 48},
    "mpt": _MPT,
    "mpt, no alibi": {**_MPT, "attn_config": {"alibi": False}},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
    "falcon, alibi": {**_SHORT, "alibi": True},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 1024, "attention_hidden_size": 32},
    "mamba": _MAMBA,
    "mamba2": {**_MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 2},
    "falcon_mamba": _MAMBA,
    "recurrent_gemma": {**_LLAMA, "lru_width": 32, "attention_window_size": 16, "num_hidden_layers": 3},
    "bamba": {
        **_LLAMA,
        **{"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 16},
        "attn_layer_indices": [1],
    },
    "lfm2": {**_LLAMA, "full_attn_idxs": [1]},
    "llama4_text": {**_MOE, "intermediate_size_mlp": 64, "attention_chunk_size": 16, "num_hidden_layers": 4},
}
FAMILIES = {**SHARED, **SEPARATE}


def family_config(name: str, vocab_size: int, **changes):
    """Config of a family in tiny."""
    return CONFIG_MAPPING[name.partition(",")[0]](vocab_size=vocab_size, **{**FAMILIES[name], **changes})
