# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    set_seed,
)

from trl_dro.likelihood import completion_logits, completion_logps
from trl_dro.shared_prefix import shared_prefix_logits


CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
# Windows of 16 tokens are shorter than the longer prompt.
CONFIGS = {
    "Llama": LlamaConfig(**SIZES),
    "Mistral": MistralConfig(**SIZES, sliding_window=16),
    "Qwen2": Qwen2Config(**SIZES),
    "Qwen2, a window in one layer": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=16, max_window_layers=1
    ),
    "Qwen3": Qwen3Config(**SIZES),
    "Gemma2": Gemma2Config(**SIZES, sliding_window=16),
    "Gemma3": Gemma3TextConfig(**SIZES, sliding_window=16),
}
PROMPTS = [list(range(10, 17)), [*range(20, 60)]]
CONTINUATIONS = [[[5, 6, 7, 8], [9, 10], [11, 12, 13]], [[70, 71], [72, 73, 74, 75, 76]]]
ROWS = [(PROMPTS[i], continuation) for i, group in enumerate(CONTINUATIONS) for continuation in group]
WEIGHTS = torch.arange(1.0, 6.0)


def make_model(config, attention, lora=False, checkpointing=False):
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    if lora:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.2)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model.train()


def together(model, prompts=PROMPTS, continuations=CONTINUATIONS):
    logits = shared_prefix_logits(model, model.config, prompts, continuations, 0, CPU, torch.float32)
    return completion_logps(logits)


def apart(model):
    return torch.cat([completion_logps(completion_logits(model, [p], [c], 0, CPU)) for p, c in ROWS])


def gradient(model, logps):
    model.zero_grad()
    (logps * WEIGHTS).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", CONFIGS)
def test_values_and_gradients_equal_those_of_separate_rows(family, attention):
    if family == "Gemma2" and attention == "sdpa":
        pytest.skip("soft-capped attention exists as eager and flex_attention only")
    model = make_model(CONFIGS[family], attention)
    shared, separate = together(model), apart(model)
    torch.testing.assert_close(shared, separate, atol=1e-5, rtol=0)
    shared_gradient, separate_gradient = gradient(model, shared), gradient(model, separate)
    assert (shared_gradient - separate_gradient).norm() / separate_gradient.norm() < 1e-4


@pytest.mark.skipif(shutil.which("g++") is None, reason="flex_attention needs a C++ compiler on a CPU")
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2"])
def test_flex_attention_equals_separate_rows(family):
    with torch.no_grad():  # it has no backward on a CPU
        torch.testing.assert_close(
            together(make_model(CONFIGS[family], "flex_attention")),
            apart(make_model(CONFIGS[family], "eager")),
            atol=1e-4,
            rtol=0,
        )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapter_gradients_are_exact_with_and_without_checkpointing(checkpointing):
    model = make_model(CONFIGS["Llama"], "sdpa", lora=True, checkpointing=checkpointing)
    shared = gradient(model, together(model))
    separate = gradient(model, apart(model))
    assert (shared - separate).norm() / separate.norm() < 1e-4


def test_a_single_continuation_is_a_plain_row():
    model = make_model(CONFIGS["Llama"], "sdpa")
    shared = together(model, PROMPTS[:1], [CONTINUATIONS[0][:1]])
    torch.testing.assert_close(shared, apart(model)[:1], atol=1e-5, rtol=0)


def test_prompt_is_computed_once_and_its_logits_never():
    model = make_model(CONFIGS["Llama"], "sdpa")
    shapes = []

    def forward(**inputs):
        outputs = model(**inputs)
        shapes.append((tuple(inputs["input_ids"].shape), tuple(outputs.logits.shape)))
        return outputs

    shared_prefix_logits(forward, model.config, PROMPTS, CONTINUATIONS, 0, CPU, torch.float32)
    num_packed = max(sum(map(len, group)) for group in CONTINUATIONS)
    longest = max(map(len, PROMPTS))
    assert shapes == [((2, longest + num_packed), (2, num_packed + 1, 100))]


def test_attention_without_masks_of_its_own_is_refused_with_the_reason():
    config = LlamaConfig(**SIZES)
    config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="takes no mask of its own.*use sdpa"):
        shared_prefix_logits(None, config, PROMPTS, CONTINUATIONS, 0, CPU, torch.float32)
