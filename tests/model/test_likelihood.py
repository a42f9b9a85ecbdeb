# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from trl_dro.model import likelihood
from trl_dro.model.likelihood import completion_logits, completion_logps, pad_rows

from ..tiny_models import bpe_tokenizer, tiny_llama


CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17]]
COMPLETIONS = [[20, 2], [21, 22, 23, 24, 2], [2]]


@pytest.fixture(scope="module")
def tokenizer():
    return bpe_tokenizer(split_digits=True)


def score(model, prompts, completions, pad_token_id=0, mean=False):
    return completion_logps(completion_logits(model, prompts, completions, pad_token_id, CPU), mean)


def by_definition(model, prompt, completion):
    """Sum over tokens of log p(token | all before it), one unpadded row, no helper of ours."""
    logits = model(torch.tensor([prompt + completion])).logits[0]
    logps = logits[len(prompt) - 1 : -1].log_softmax(dim=-1)
    return logps.gather(-1, torch.tensor(completion).unsqueeze(-1)).sum()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_padded_batch_equals_row_by_row_in_value_and_gradient(tokenizer, attention):
    model = tiny_llama(tokenizer, attn_implementation=attention)
    coefficients = torch.tensor([1.0, -2.0, 0.5])
    batch = score(model, PROMPTS, COMPLETIONS)
    (coefficients * batch).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    rows = torch.stack([by_definition(model, p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])
    (coefficients * rows).sum().backward()
    torch.testing.assert_close(batch, rows, atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_padding_does_not_shift_absolute_positions():
    sizes = {"vocab_size": 30, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "initializer_range": 0.2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()
    with torch.no_grad():
        rows = torch.stack([by_definition(model, p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])
        torch.testing.assert_close(score(model, PROMPTS, COMPLETIONS), rows, atol=1e-5, rtol=1e-5)


def test_mean_divides_by_the_number_of_tokens_of_each_row(tokenizer):
    model = tiny_llama(tokenizer)
    lengths = torch.tensor([2.0, 5.0, 1.0])
    torch.testing.assert_close(
        score(model, PROMPTS, COMPLETIONS, mean=True) * lengths, score(model, PROMPTS, COMPLETIONS)
    )


def test_padding_token_does_not_matter(tokenizer):
    model = tiny_llama(tokenizer)
    assert torch.equal(score(model, PROMPTS, COMPLETIONS, 0), score(model, PROMPTS, COMPLETIONS, 25))


def test_only_the_completions_logits_are_computed(tokenizer):
    model = tiny_llama(tokenizer)
    columns = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: columns.append(output.shape[1]))
    completion = completion_logits(model, PROMPTS, COMPLETIONS, 0, CPU)
    hook.remove()
    assert columns == [7]  # those that one completion or another needs, of twelve
    assert completion.logits.shape == (8, len(tokenizer)) and completion.lengths == [2, 5, 1]
    assert completion.tokens.tolist() == sum(COMPLETIONS, [])


def test_logits_turned_into_float32_in_parts_give_the_same_values_and_gradients(tokenizer, monkeypatch):
    model = tiny_llama(tokenizer)
    coefficients = torch.tensor([1.0, -2.0, 0.5])
    results = []
    for limit in (likelihood.MAX_FLOAT_LOGITS, 3 * len(tokenizer)):
        monkeypatch.setattr(likelihood, "MAX_FLOAT_LOGITS", limit)
        model.zero_grad()
        logps = score(model, PROMPTS, COMPLETIONS)
        (coefficients * logps).sum().backward()
        results.append((logps, [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-5)


def test_log_probabilities_are_float32_whatever_the_models_precision(tokenizer):
    model = tiny_llama(tokenizer).bfloat16()
    assert score(model, PROMPTS, COMPLETIONS).dtype == torch.float32


@pytest.mark.parametrize("side, expected", [("left", [[9, 9, 1], [2, 3, 4]]), ("right", [[1, 9, 9], [2, 3, 4]])])
def test_rows_are_padded_on_the_side_asked_for(side, expected):
    ids, mask = pad_rows([[1], [2, 3, 4]], 9, CPU, side=side)
    assert ids.tolist() == expected
    assert mask.tolist() == [[value != 9 for value in row] for row in expected]
