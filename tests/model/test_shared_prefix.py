# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import random
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
    set_seed,
)

from trl_dro.model import shared_prefix
from trl_dro.model.likelihood import completion_logits, completion_logps
from trl_dro.model.roles import keep_gradients_of_quantized
from trl_dro.model.shared_prefix import Columns, PackedModel, _mask, check_attention, check_layers, share_prefixes


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
GROUPS = [[(prompt, c) for c in group] for prompt, group in zip(PROMPTS, CONTINUATIONS, strict=True)]
# Prompts that begin alike: with other last documents, one the beginning of another, one completed in two ways of which
# one begins the other, and one that is nobody's like.
TREES = [
    [
        ([*range(10, 40), *range(60, 70)], [5, 6]),
        ([*range(10, 40), *range(50, 75)], [5, 6]),
        ([*range(10, 30)], [7, 8]),
        ([*range(10, 30)], [7, 8, 9]),
        ([90, *range(11, 40)], [5]),
    ],
    [([*range(30, 36)], [1, 2])],
]


def add_adapter(model):
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2)
    return model.train()


def make_model(config, attention, lora=False, checkpointing=False):
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    if lora:
        model = add_adapter(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model.train()


def packed(model, forward=None):
    return PackedModel(forward or model, model.config, 0, CPU, torch.float32)


def together(model, groups=GROUPS):
    return completion_logps(packed(model).completion_logits(groups))


def read_first(model, groups=GROUPS):
    """The prompts go through the model first, one of them with a beginning, then the completions."""
    begun = [[5], [], []][: len(groups)]
    read = packed(model).read([group[0][0] for group in groups], begun)
    return completion_logps(packed(model).completion_logits(groups, read))


def apart(model, groups=GROUPS):
    rows = [row for group in groups for row in group]
    return torch.cat([completion_logps(completion_logits(model, [p], [c], 0, CPU)) for p, c in rows])


def gradient(model, logps):
    model.zero_grad()
    (logps * torch.arange(1.0, len(logps) + 1)).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


SCORERS = {"one forward": (together, GROUPS), "prompts first": (read_first, GROUPS), "trees": (together, TREES)}


def assert_same(model, logps, expected, tolerance=1e-4):
    torch.testing.assert_close(logps, expected, atol=1e-5, rtol=0)
    actual, wanted = gradient(model, logps), gradient(model, expected)
    assert (actual - wanted).norm() / wanted.norm() < tolerance


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("family", CONFIGS)
def test_values_and_gradients_equal_those_of_separate_rows(family, scorer, attention):
    if family == "Gemma2" and attention == "sdpa":
        pytest.skip("soft-capped attention exists as eager and flex_attention only")
    model = make_model(CONFIGS[family], attention)
    score, groups = SCORERS[scorer]
    assert_same(model, score(model, groups), apart(model, groups))


@pytest.mark.skipif(shutil.which("g++") is None, reason="flex_attention needs a C++ compiler on a CPU")
@pytest.mark.skipif(
    # Compared with eager attention its first prompt differs there by 0.1 nats or is NaN, from call to call.
    torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="torch's flex_attention was seen to be wrong on a CPU without AVX-512",
)
@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2"])
def test_flex_attention_equals_separate_rows(family, scorer):
    score, groups = SCORERS[scorer]
    with torch.no_grad():  # it has no backward on a CPU
        torch.testing.assert_close(
            score(make_model(CONFIGS[family], "flex_attention"), groups),
            apart(make_model(CONFIGS[family], "eager"), groups),
            atol=1e-4,
            rtol=0,
        )


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapter_gradients_are_exact_with_and_without_checkpointing(checkpointing, scorer):
    if checkpointing and scorer == "prompts first":
        pytest.skip("checkpointing leaves the cache empty")
    model = make_model(CONFIGS["Llama"], "sdpa", lora=True, checkpointing=checkpointing)
    score, groups = SCORERS[scorer]
    assert_same(model, score(model, groups), apart(model, groups))


@pytest.mark.parametrize("scorer", SCORERS)
def test_on_a_four_bit_base_values_and_adapter_gradients_equal_those_of_separate_rows(scorer, tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs the extra: pip install trl_dro[quantization]")
    sizes = SIZES | {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}  # quantised in blocks of 64
    make_model(LlamaConfig(**sizes), "sdpa").save_pretrained(tmp_path)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=nf4, dtype=torch.float32)
    keep_gradients_of_quantized(model)
    model = add_adapter(model)
    score, groups = SCORERS[scorer]
    assert_same(model, score(model, groups), apart(model, groups))


@pytest.mark.parametrize("score", [together, read_first])
def test_a_single_completion_is_a_plain_row(score):
    model = make_model(CONFIGS["Llama"], "sdpa")
    groups = [group[:1] for group in GROUPS]
    assert_same(model, score(model, groups), apart(model, groups))


def test_continuations_written_token_by_token_predict_as_separate_rows():
    model = make_model(CONFIGS["Gemma3"], "sdpa")
    continuations = [[[5, 6, 7, 8], [5, 10], [5, 12, 13]], [[71], [72, 73, 74, 75, 76], [77, 78, 79]]]
    begun = [[5], []]
    written = [[1, 1, 1], [0, 0, 0]]
    draw = random.Random(0)
    predicted = 0
    with torch.no_grad():
        selector = packed(model)
        read = selector.read(PROMPTS, begun)
        while written != [[len(c) for c in group] for group in continuations]:
            starts = [[len(prompt) + w for w in ws] for prompt, ws in zip(PROMPTS, written, strict=True)]
            new = [
                [c[w : w + draw.randint(0, 2)] for c, w in zip(group, ws, strict=True)]
                for group, ws in zip(continuations, written, strict=True)
            ]
            new[0][0] = new[0][0] or continuations[0][0][written[0][0] :]  # a step feeds something
            written = [[w + len(t) for w, t in zip(ws, ts, strict=True)] for ws, ts in zip(written, new, strict=True)]
            rows = [
                [*prompt, *c[:w]]
                for prompt, group, ws, ts in zip(PROMPTS, continuations, written, new, strict=True)
                for c, w, t in zip(group, ws, ts, strict=True)
                if t
            ]
            if not rows:
                continue
            logits, read = selector.extend(read, new, starts)
            expected = torch.stack([model(input_ids=torch.tensor([row])).logits[0, -1] for row in rows])
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
            predicted += len(rows)
    assert predicted >= 6


def test_a_prompt_is_computed_once_and_its_logits_never():
    model = make_model(CONFIGS["Llama"], "sdpa")
    shapes = []

    def forward(**inputs):
        outputs = model(**inputs)
        shapes.append((tuple(inputs["input_ids"].shape), tuple(outputs.logits.shape)))
        return outputs

    longest = max(map(len, PROMPTS))
    # The last token of a completion is predicted and not read; one and the same prompt token predicts all the first.
    num_packed = [sum(len(c) - 1 for c in group) for group in CONTINUATIONS]
    width = max(len(prompt) + n for prompt, n in zip(PROMPTS, num_packed, strict=True))
    packed(model, forward).completion_logits(GROUPS)
    assert shapes == [((2, width), (2, max(num_packed) + 1, 100))]
    shapes.clear()
    read = packed(model, forward).read(PROMPTS, [[], []])
    packed(model, forward).completion_logits(GROUPS, read)
    assert shapes == [((2, longest), (2, 2, 100)), ((2, max(num_packed) + 1), (2, max(num_packed) + 1, 100))]


@pytest.mark.parametrize("seed", range(20))
def test_shared_tokens_are_stored_once_and_every_sequence_can_be_read_back(seed):
    draw = random.Random(seed)
    sequences = [[draw.randint(1, 2) for _ in range(draw.randint(1, 8))] for _ in range(draw.randint(1, 6))]
    first = draw.choice([0, 7])
    row = share_prefixes(sequences, first)
    distinct = {tuple(sequence[:end]) for sequence in sequences for end in range(1, len(sequence) + 1)}
    assert len(row.tokens) == len(row.owners) == len(row.positions) == len(distinct)
    for s, (sequence, path) in enumerate(zip(sequences, row.paths, strict=True)):
        assert [row.tokens[index] for index in path] == sequence
        assert [row.positions[index] for index in path] == list(range(first, first + len(sequence)))
        # What the mask lets the last token see is exactly the sequence.
        visible = {
            index
            for index, (owner, position) in enumerate(zip(row.owners, row.positions, strict=True))
            if position < row.common[s][owner]
        }
        assert visible == set(path)


def test_the_figure_of_a_row_is_what_the_code_makes():
    names = "PQUVWX"
    row = share_prefixes([[names.index(name) for name in sequence] for sequence in ("PQUV", "PQW", "PX")])
    query = Columns(torch.tensor([row.owners]), torch.tensor([row.positions]))
    mask = _mask("sdpa", query, query, torch.tensor([row.common]), None, torch.float32)[0, 0]
    drawn = {"token": names, "owner": row.owners, "position": row.positions}
    drawn |= {f"{name} sees": [" #"[seen] for seen in line] for name, line in zip(names, mask.int(), strict=True)}
    for name, values in drawn.items():
        line = f"    {name:10}" + "  ".join(map(str, values))
        assert f"\n{line.rstrip()}" in shared_prefix.__doc__


def test_tokens_are_counted_with_and_without_padding():
    model = packed(make_model(CONFIGS["Llama"], "sdpa"))
    model.completion_logits(GROUPS)
    tokens = [len(share_prefixes([p + c[:-1] for p, c in group]).tokens) for group in GROUPS]
    assert (model.count.tokens, model.count.padded) == (sum(tokens), 2 * max(tokens))


def test_attention_without_masks_of_its_own_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="takes no mask of its own.*use sdpa"):
        check_attention("flash_attention_2")
    for attention in (None, "eager", "sdpa", "flex_attention"):
        check_attention(attention)


def test_layers_that_are_no_attention_are_refused_with_the_reason():
    for config in CONFIGS.values():
        check_layers(config)
    with pytest.raises(ValueError, match="layers of type linear_attention take no mask"):
        check_layers(Qwen3NextConfig())
