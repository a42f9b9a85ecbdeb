# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from trl_dro.model.roles import (
    ROLES,
    RolePair,
    Roles,
    cast_adapters_for_quantized_base,
    is_quantized,
    load_role_adapters,
    prepare_role_model,
)

from ..tiny_models import bpe_tokenizer, tiny_llama


TOKENIZER = bpe_tokenizer(split_digits=True)
INPUTS = {"input_ids": torch.tensor([[5, 6, 7, 8, 9]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
KINDS = ["shared", "two bases", "full models"]


def lora(**kwargs):
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]} | kwargs)


def make_roles(kind="shared", trained=ROLES, seed=0):
    model = tiny_llama(TOKENIZER)
    other = tiny_llama(TOKENIZER, seed=1, hidden_size=16) if kind == "two bases" else None
    roles = Roles(prepare_role_model(model, other, None if kind == "full models" else lora()), trained)
    generator = torch.Generator().manual_seed(seed)
    for role in ROLES:  # LoRA starts at zero, and copies are alike: gives both roles weights of their own
        for _, parameter in roles.named_parameters(role):
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return roles


def logits(roles, role):
    with torch.no_grad():
        return roles.forward(role, **INPUTS).logits


def assert_trainable(roles):
    expected = {id(p) for role in roles.trained for _, p in roles.named_parameters(role)}
    assert expected
    assert {id(p) for p in roles.model.parameters() if p.requires_grad} == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", [ROLES, ("selector",), ("generator",)])
def test_trained_roles_stay_trainable_and_all_else_frozen(kind, trained, tmp_path):
    roles = make_roles(kind, trained)
    assert_trainable(roles)
    for role in ("selector", "generator", "generator", "selector"):
        roles.module(role)
        assert_trainable(roles)
        logits(roles, role)
        assert_trainable(roles)
    roles.save(tmp_path)
    assert_trainable(roles)
    roles.load(tmp_path)
    assert_trainable(roles)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_of_the_roles_are_disjoint_and_no_base_weight_is_among_adapters(kind):
    roles = make_roles(kind)
    names = {role: {name for name, _ in roles.named_parameters(role)} for role in ROLES}
    assert names["selector"] and names["generator"] and not names["selector"] & names["generator"]
    everything = dict(roles.model.named_parameters())
    assert all(everything[name] is p for role in ROLES for name, p in roles.named_parameters(role))
    if kind != "full models":
        assert all("lora_" in name for role in ROLES for name in names[role])


@pytest.mark.parametrize("kind", KINDS)
def test_forward_of_a_role_depends_on_that_roles_parameters_only(kind):
    roles = make_roles(kind)
    before = {role: logits(roles, role) for role in ROLES}
    assert not torch.allclose(before["selector"], before["generator"])
    for _, parameter in roles.named_parameters("selector"):
        parameter.data.mul_(1.5)
    assert torch.equal(logits(roles, "generator"), before["generator"])
    assert not torch.allclose(logits(roles, "selector"), before["selector"])


def test_gradients_of_a_role_go_to_its_adapter_only():
    roles = make_roles()
    for role, other in (("selector", "generator"), ("generator", "selector")):
        roles.model.zero_grad()
        roles.forward(role, **INPUTS).logits.square().mean().backward()
        assert all(p.grad is not None for _, p in roles.named_parameters(role))
        assert all(p.grad is None for _, p in roles.named_parameters(other))


def test_one_config_is_copied_for_each_role_and_not_written_into():
    config = lora(target_modules="all-linear")
    before = copy.deepcopy(config.to_dict())
    model = prepare_role_model(tiny_llama(TOKENIZER), peft_config=config)
    assert config.to_dict() == before
    assert model.peft_config["selector"] is not model.peft_config["generator"]
    assert config not in (model.peft_config["selector"], model.peft_config["generator"])


@pytest.mark.parametrize("two_bases", [False, True])
def test_each_role_can_have_a_config_of_its_own(two_bases):
    configs = {"selector": lora(r=2), "generator": lora(r=8, target_modules=["o_proj"])}
    selector_model = tiny_llama(TOKENIZER, seed=1) if two_bases else None
    roles = Roles(prepare_role_model(tiny_llama(TOKENIZER), selector_model, configs))
    ranks = {role: {p.shape[0] for name, p in roles.named_parameters(role) if "lora_A" in name} for role in ROLES}
    assert ranks == {"selector": {2}, "generator": {8}}
    assert all("o_proj" in name for name, _ in roles.named_parameters("generator"))
    assert configs["selector"].r == 2 and configs["generator"].r == 8


def test_a_config_for_one_role_alone_is_refused():
    with pytest.raises(ValueError, match=r"keys \['selector'\]: it needs 'selector' and 'generator'"):
        prepare_role_model(tiny_llama(TOKENIZER), peft_config={"selector": lora()})


def test_without_adapters_the_selector_is_a_copy():
    model = tiny_llama(TOKENIZER)
    pair = prepare_role_model(model)
    assert isinstance(pair, RolePair) and pair.generator is model and pair.selector is not model
    for p, q in zip(pair.selector.parameters(), pair.generator.parameters(), strict=True):
        assert torch.equal(p, q) and p.data_ptr() != q.data_ptr()
    assert pair.config is model.config


def test_two_given_models_are_kept_as_they_are():
    selector, generator = tiny_llama(TOKENIZER, seed=1), tiny_llama(TOKENIZER)
    pair = prepare_role_model(generator, selector)
    assert pair.selector is selector and pair.generator is generator


def test_a_model_with_both_adapters_is_adopted():
    model = get_peft_model(tiny_llama(TOKENIZER), lora(), adapter_name="selector")
    model.add_adapter("generator", lora())
    assert prepare_role_model(model) is model
    assert_trainable(Roles(model))


def _with_adapters(*names):
    model = get_peft_model(tiny_llama(TOKENIZER), lora(), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lora())
    return model


@pytest.mark.parametrize(
    "arguments",
    [
        lambda: (_with_adapters("default"),),
        lambda: (_with_adapters("selector"),),
        lambda: (_with_adapters("selector", "generator", "default"),),
        lambda: (_with_adapters("selector", "generator"), None, lora()),
        lambda: (_with_adapters("selector", "generator"), tiny_llama(TOKENIZER)),
        lambda: (tiny_llama(TOKENIZER), _with_adapters("selector")),
    ],
)
def test_other_adapters_are_refused(arguments):
    with pytest.raises(ValueError, match="must have exactly the adapters 'selector' and 'generator'"):
        prepare_role_model(*arguments())


def test_a_base_with_modules_named_like_a_role_is_refused():
    model = tiny_llama(TOKENIZER)
    model.model.selector = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="module 'model.selector' of the base model is named like a role"):
        prepare_role_model(model, peft_config=lora())


@pytest.mark.parametrize("kind", KINDS)
def test_saved_roles_are_read_back_into_the_same_parameters(kind, tmp_path):
    roles = make_roles(kind)
    roles.save(tmp_path)
    before = {role: logits(roles, role) for role in ROLES}
    identities = {role: [id(p) for _, p in roles.named_parameters(role)] for role in ROLES}
    for role in ROLES:
        for _, parameter in roles.named_parameters(role):
            parameter.data.zero_()
    roles.load(tmp_path)
    for role in ROLES:
        assert torch.equal(logits(roles, role), before[role])
        assert [id(p) for _, p in roles.named_parameters(role)] == identities[role]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("role", ROLES)
def test_each_saved_role_loads_on_its_own(kind, role, tmp_path):
    roles = make_roles(kind)
    roles.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["generator", "selector"]
    if kind == "full models":
        alone = AutoModelForCausalLM.from_pretrained(tmp_path / role)
    else:
        own_base = kind == "two bases" and role == "selector"
        base = tiny_llama(TOKENIZER, seed=1, hidden_size=16) if own_base else tiny_llama(TOKENIZER)
        alone = PeftModel.from_pretrained(base, tmp_path / role)
    with torch.no_grad():
        torch.testing.assert_close(alone.eval()(**INPUTS).logits, logits(roles, role))


@pytest.mark.parametrize("missing", ROLES)
def test_a_missing_role_folder_is_named(missing, tmp_path):
    roles = make_roles()
    for role in ROLES:
        if role != missing:
            (tmp_path / role).mkdir()
            roles.model.save_pretrained(tmp_path, selected_adapters=[role])
    with pytest.raises(FileNotFoundError, match=f"{missing} does not exist: a checkpoint of both roles has"):
        roles.load(tmp_path)


def _gradients(roles):
    return torch.cat([p.grad.flatten() for role in ROLES for _, p in roles.named_parameters(role)])


def _checkpointed_gradients(in_turn, checkpointing):
    roles = make_roles()
    roles.model.train()
    roles.enable_input_require_grads()
    if checkpointing:
        roles.model.gradient_checkpointing_enable()
    losses = []
    for role in ROLES:
        losses.append(roles.forward(role, **INPUTS).logits.logsumexp(-1).mean())
        if in_turn:
            losses[-1].backward()
    if not in_turn:
        sum(losses).backward()
    return _gradients(roles)


def test_each_roles_backward_must_run_before_the_other_roles_forward():
    """Why `forward` says so: checkpointing recomputes with the active adapter, silently wrong after a switch."""
    right = _checkpointed_gradients(in_turn=True, checkpointing=False)
    torch.testing.assert_close(_checkpointed_gradients(in_turn=True, checkpointing=True), right, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(_checkpointed_gradients(in_turn=False, checkpointing=False), right)
    wrong = _checkpointed_gradients(in_turn=False, checkpointing=True)
    assert (wrong - right).norm() > 0.1 * right.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_wrapper_is_called_with_the_role_when_there_are_two_models(kind):
    roles = make_roles(kind)
    calls = []

    class Wrapper(nn.Module):
        def forward(self, *args, **inputs):
            calls.append(args)
            return roles.model(*args, **inputs)

    expected = {role: logits(roles, role) for role in ROLES}
    for role in ROLES:
        with torch.no_grad():
            assert torch.equal(roles.forward(role, Wrapper(), **INPUTS).logits, expected[role])
    assert calls == ([(), ()] if kind == "shared" else [("selector",), ("generator",)])


def test_adapters_become_bfloat16_on_a_quantized_base_only():
    roles = make_roles()
    assert not is_quantized(roles.model)
    cast_adapters_for_quantized_base(roles)
    assert {p.dtype for role in ROLES for _, p in roles.named_parameters(role)} == {torch.float32}
    roles.model.base_model.model.is_loaded_in_4bit = True
    assert is_quantized(roles.model)
    cast_adapters_for_quantized_base(roles)
    assert {p.dtype for role in ROLES for _, p in roles.named_parameters(role)} == {torch.bfloat16}
    assert_trainable(roles)


def test_an_adapter_for_other_modules_is_refused(tmp_path):
    narrow, wide = (
        Roles(prepare_role_model(tiny_llama(TOKENIZER), peft_config=lora(target_modules=modules)))
        for modules in (["q_proj"], "all-linear")
    )
    for name, saved, loading in (("narrow", narrow, wide), ("wide", wide, narrow)):
        saved.save(tmp_path / name)
        with pytest.raises(ValueError, match="holds an adapter for other modules"):
            loading.load(tmp_path / name)


def test_prompt_learning_is_refused():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="prompt learning"):
        prepare_role_model(tiny_llama(TOKENIZER), peft_config=config)


def test_adapters_that_do_not_fit_or_are_not_there_are_named(tmp_path):
    tokenizer = TOKENIZER
    with pytest.raises(ValueError, match="holds no adapter for the selector"):
        load_role_adapters(tiny_llama(tokenizer), tmp_path, tmp_path)
    for role, model in (("selector", tiny_llama(tokenizer)), ("generator", tiny_llama(tokenizer, hidden_size=48))):
        config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
        get_peft_model(model, config).save_pretrained(tmp_path / role)
    with pytest.raises(ValueError, match="do not both fit the model") as error:
        load_role_adapters(tiny_llama(tokenizer), tmp_path / "selector", tmp_path / "generator")
    assert "\n" not in str(error.value)
