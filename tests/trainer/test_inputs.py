# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from peft import LoraConfig

from trl_dro import DROConfig
from trl_dro.model.codec import PermutationCodec
from trl_dro.model.roles import ROLES
from trl_dro.system.rag_config import RAGConfig
from trl_dro.trainer.inputs import load_model, load_roles, load_tokenizers, refuse_unsupported

from ..tiny_models import bpe_tokenizer, tiny_llama, word_level_tokenizer


@pytest.fixture
def args(tmp_path):
    return DROConfig(str(tmp_path / "run"), num_selected=2, max_candidates=4, max_answer_length=16, use_cpu=True)


@pytest.fixture
def folder(tmp_path):
    tokenizer = word_level_tokenizer()
    tiny_llama(tokenizer, max_position_embeddings=512).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_a_model_instance_is_returned_as_it_is(args):
    model = tiny_llama(word_level_tokenizer())
    assert load_model(model, args, None) is model


def test_a_folder_is_loaded_with_model_init_kwargs(args, folder):
    assert load_model(folder, args, None).dtype == torch.float32
    args.model_init_kwargs = {"dtype": "bfloat16", "attn_implementation": "eager"}
    model = load_model(folder, args, None)
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    assert args.model_init_kwargs == {"dtype": "bfloat16", "attn_implementation": "eager"}  # not written into


@pytest.mark.parametrize("quantization_config", [None, "NF4"])
def test_quantization_reaches_the_loader(args, monkeypatch, quantization_config):
    seen = {}
    monkeypatch.setattr("trl_dro.trainer.inputs.create_model_from_path", lambda model, **kwargs: seen.update(kwargs))
    load_model("some-model", args, quantization_config)
    assert seen.get("quantization_config") == quantization_config and seen["trust_remote_code"] is False


def test_both_roles_share_one_tokenizer(args, folder):
    tokenizer = word_level_tokenizer()
    given = load_tokenizers(tiny_llama(tokenizer), None, tokenizer, args)
    assert given["selector"] is given["generator"] is tokenizer
    loaded = load_tokenizers(folder, None, None, args)
    assert loaded["selector"] is loaded["generator"] and loaded["generator"].get_vocab() == tokenizer.get_vocab()


def test_a_selector_from_a_folder_brings_its_own_tokenizer(args, folder):
    tokenizer = bpe_tokenizer(split_digits=True)
    both = load_tokenizers(tiny_llama(tokenizer), folder, tokenizer, args)
    assert both["generator"] is tokenizer and both["selector"].get_vocab() == word_level_tokenizer().get_vocab()
    instance = load_tokenizers(tiny_llama(tokenizer), tiny_llama(tokenizer), tokenizer, args)
    assert instance["selector"] is tokenizer


def test_an_unknown_tokenizer_must_be_passed(args):
    with pytest.raises(ValueError, match="pass `processing_class`"):
        load_tokenizers(tiny_llama(word_level_tokenizer()), None, None, args)


def test_a_missing_padding_token_is_filled_and_a_missing_eos_refused(args):
    tokenizer = word_level_tokenizer()
    tokenizer.pad_token = None
    assert load_tokenizers("unused", None, tokenizer, args)["generator"].pad_token == tokenizer.eos_token
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos token.*set tokenizer.eos_token"):
        load_tokenizers("unused", None, tokenizer, args)


def test_what_is_no_tokenizer_is_refused(args):
    with pytest.raises(TypeError, match="must be a tokenizer, not dict"):
        load_tokenizers("unused", None, {"a": 1}, args)


def build(args, selector_context=300, generator_context=300):
    tokenizer = word_level_tokenizer()
    codec = PermutationCodec(tokenizer, args.max_candidates, args.num_selected)
    contexts = {"selector": selector_context, "generator": generator_context}
    return RAGConfig.of_training(args).build_prompts(dict.fromkeys(ROLES, tokenizer), codec, contexts), codec


@pytest.mark.parametrize("setting", [{"deepspeed": {"zero_optimization": {"stage": 2}}}, {"fsdp": "full_shard"}, {}])
def test_deepspeed_and_fsdp_are_refused_with_what_to_use_instead(args, monkeypatch, setting):
    refuse_unsupported(args)
    if not setting:  # set by accelerate's launcher
        monkeypatch.setattr(args.distributed_state, "distributed_type", "FSDP")
    for name, value in setting.items():
        setattr(args, name, value)
    with pytest.raises(ValueError, match="use plain data parallelism, e.g. accelerate launch") as error:
        refuse_unsupported(args)
    assert "\n" not in str(error.value)


def test_flash_attention_is_refused_before_any_model_is_loaded(tmp_path):
    args = DROConfig(str(tmp_path), use_cpu=True, model_init_kwargs={"attn_implementation": "flash_attention_2"})
    with pytest.raises(ValueError, match="takes no mask of its own, by which permutations share their prompt"):
        refuse_unsupported(args)


def test_new_adapters_are_drawn_from_the_seed_and_only_those_trained_need_gradients(tmp_path):
    def load(seed):
        args = DROConfig(str(tmp_path), use_cpu=True, bf16=False, seed=seed, train_generator=False)
        lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
        return load_roles(tiny_llama(word_level_tokenizer()), None, args, lora, None)

    first, again, other = (
        [p for n, p in load(seed).named_parameters("selector") if "lora_A" in n] for seed in (1, 1, 2)
    )
    assert all(torch.equal(p, q) for p, q in zip(first, again, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(first, other, strict=True))
    roles = load(1)
    needs_gradient = {role: {p.requires_grad for _, p in roles.named_parameters(role)} for role in ROLES}
    assert needs_gradient == {"selector": {True}, "generator": {False}}
