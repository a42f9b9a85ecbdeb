# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MptForCausalLM, set_seed

from trl_dro.model.codec import PermutationCodec
from trl_dro.model.prompts import PromptBuilder, answer_ids
from trl_dro.model.rag_model import RAGModel
from trl_dro.model.roles import ROLES, RolePair, Roles
from trl_dro.model.self_check import check_rows

from ..tiny_models import bpe_tokenizer, tiny_llama
from .families import FAMILIES, SEPARATE, SHARED, family_config


CPU = torch.device("cpu")
TOKENIZER = bpe_tokenizer(split_digits=False)
QUESTIONS = [
    {"question": question, "documents": [{"title": f"{i}", "text": "1907 " * (i + 1)} for i in range(n)]}
    for question, n in (("who wrote the book?", 4), ("the year?", 3))
]
PERMUTATIONS = torch.tensor([[[1, 2], [2, 1], [1, 3]], [[3, 1], [3, 2], [1, 3]]])


def make_rag(model):
    # Both roles are one model: what is checked once serves both.
    roles = Roles(RolePair(model, model))
    prompts = {role: PromptBuilder(TOKENIZER, "{question} {documents}", 2) for role in ROLES}
    return RAGModel(roles, dict.fromkeys(ROLES, TOKENIZER), prompts, PermutationCodec(TOKENIZER, 4, 2), CPU)


def make_family(name, **changes):
    set_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(name, len(TOKENIZER), **changes))
    if name == "rwkv":  # which begins with zeros
        for parameter in model.parameters():
            parameter.data.normal_(std=0.2)
    return model.eval()


def logp_alone(model, prompt, completion):
    """The oracle: one sequence, no padding, no mask, no positions, no cache."""
    logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(-1, torch.tensor(completion).unsqueeze(-1)).sum()


def alone(rag, model):
    selector, generator = [], []
    for question, permutations in zip(QUESTIONS, PERMUTATIONS.tolist(), strict=True):
        prompt = rag.prompts["selector"](question["question"], question["documents"])
        for permutation in permutations:
            tokens, _ = rag.codec.encode(permutation, len(question["documents"]))
            selector.append(logp_alone(model, prompt, tokens))
            chosen = [question["documents"][i - 1] for i in permutation]
            prompt_of_answer = rag.prompts["generator"](question["question"], chosen)
            generator.append(logp_alone(model, prompt_of_answer, answer_ids(TOKENIZER, "Anna Brown")))
    return torch.stack(selector), torch.stack(generator)


def gradient(model, logps):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weighted = (logps * torch.arange(1.0, len(logps) + 1)).sum()
    gradients = torch.autograd.grad(weighted, parameters, allow_unused=True)
    return torch.cat([g.flatten() for g in gradients if g is not None])


def assert_exact(rag, model):
    ours = (
        rag.permutation_logps(QUESTIONS, PERMUTATIONS, "full_vocabulary").flatten(),
        rag.answer_logps(QUESTIONS, [["Anna Brown"]] * 2, PERMUTATIONS).flatten(),
    )
    for logps, expected in zip(ours, alone(rag, model), strict=True):
        torch.testing.assert_close(logps, expected, atol=1e-3, rtol=0)
        wanted = gradient(model, expected)
        assert (gradient(model, logps) - wanted).norm() < 1e-3 * wanted.norm()
    for sampling in ("independent", "distinct"):
        samples = rag.sample(QUESTIONS, 4, seeds=[1, 2], sampling=sampling)
        with torch.no_grad():
            rescored = rag.permutation_logps(QUESTIONS, samples.permutations)
        torch.testing.assert_close(samples.logps.to(rescored), rescored, atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_exact_or_gets_rows_of_its_own_in_which_it_is(family):
    model = make_family(family)
    rag = make_rag(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_rows(rag)
    warned = [str(each.message) for each in caught if "a row of its own" in str(each.message)]
    assert len(warned) == (family in SEPARATE)
    assert rag.roles.separate == (set(ROLES) if family in SEPARATE else set())
    assert_exact(rag, model)


@pytest.mark.parametrize("family", ["bloom", "mpt", "rwkv", "mamba"])
def test_answers_of_rows_of_their_own_are_those_written_one_by_one(family):
    model = make_family(family)
    rag = make_rag(model)
    check_rows(rag, "never")
    answers = rag.answer(QUESTIONS, PERMUTATIONS[:, 0], max_answer_length=6)
    for question, permutation, answer in zip(QUESTIONS, PERMUTATIONS[:, 0].tolist(), answers, strict=True):
        tokens = rag.prompts["generator"](question["question"], [question["documents"][i - 1] for i in permutation])
        start = len(tokens)
        while len(tokens) < start + 6 and (not tokens[start:] or tokens[-1] != TOKENIZER.eos_token_id):
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
            tokens = [*tokens, int(logits.argmax())]
        assert answer == TOKENIZER.decode(tokens[start:], skip_special_tokens=True).strip()


def test_never_shares_nothing_and_is_as_exact():
    model = make_family("llama")
    rag = make_rag(model)
    check_rows(rag, "never")
    assert rag.roles.separate == set(ROLES)
    assert_exact(rag, model)


def test_always_refuses_a_model_by_its_name_and_the_measured_difference():
    rag = make_rag(make_family("mpt"))
    with pytest.raises(ValueError, match=r"mpt.* cannot share .*differs by [\d.]+e-01 .*set shared_prefix to 'auto'$"):
        check_rows(rag, "always")
    check_rows(make_rag(make_family("llama")), "always")


def test_a_window_longer_than_can_be_tried_is_not_trusted():
    rag = make_rag(make_family("gpt_neo", window_size=2048))
    with pytest.warns(UserWarning, match="window of 2048 tokens is longer than could be tried"):
        check_rows(rag)
    assert rag.roles.separate == set(ROLES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "mixtral", "granitemoe", "gpt_neo", "mpt"])
def test_in_low_precision_right_models_pass_and_wrong_ones_do_not(family, dtype):
    rag = make_rag(make_family(family).to(dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_rows(rag)
    assert rag.roles.separate == (set() if family in SHARED else set(ROLES))


class Swallows(LlamaForCausalLM):
    def forward(self, *args, logits_to_keep=0, **kwargs):
        return super().forward(*args, **kwargs)


class Confuses(LlamaForCausalLM):
    def forward(self, *args, logits_to_keep=0, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits[:, :2]
        return outputs


class SeesAll(MptForCausalLM):
    """No causal model: what stands behind a token changes its prediction."""

    def forward(self, input_ids, logits_to_keep=0, **kwargs):
        outputs = super().forward(input_ids)
        outputs.logits = outputs.logits + outputs.logits.mean(dim=1, keepdim=True)
        return outputs


def test_a_model_that_swallows_logits_to_keep_is_exact():
    model = Swallows(tiny_llama(TOKENIZER).config).eval()
    rag = make_rag(model)
    check_rows(rag, "always")
    assert_exact(rag, model)


@pytest.mark.parametrize("wrong", [Confuses, SeesAll])
@pytest.mark.parametrize("shared_prefix", ["auto", "never"])
def test_a_model_that_is_wrong_either_way_is_refused_in_one_line(wrong, shared_prefix):
    set_seed(0)
    config = family_config("mpt" if wrong is SeesAll else "llama", len(TOKENIZER))
    with pytest.raises(ValueError, match="is not exact in rows of their own either") as error:
        check_rows(make_rag(wrong(config).eval()), shared_prefix)
    assert "\n" not in str(error.value)


def test_noise_in_training_mode_is_refused_and_the_check_leaves_no_trace():
    model = tiny_llama(TOKENIZER, attention_dropout=0.5)
    rag = make_rag(model)
    model.train()
    state = torch.random.get_rng_state()
    with pytest.raises(ValueError, match="noisy in training mode .* set disable_dropout=False"):
        check_rows(rag, noiseless=True)
    check_rows(rag)
    assert model.training and torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
