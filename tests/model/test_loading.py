# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from peft import LoraConfig
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel, T5Config

from trl_dro import DROConfig
from trl_dro.model.codec import PermutationCodec
from trl_dro.model.loading import build_prompts, context_length
from trl_dro.model.prompts import PromptTooLongError
from trl_dro.model.roles import ROLES
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


def test_context_length_is_read_without_weights(args, folder, tmp_path):
    (tmp_path / "base" / "model.safetensors").unlink()
    assert context_length(folder, args) == 512
    assert context_length(tiny_llama(word_level_tokenizer()), args) == 2048


def test_context_length_goes_by_other_names_too(args):
    sizes = {"vocab_size": 10, "n_layer": 1, "n_head": 1, "bos_token_id": 1, "eos_token_id": 2}
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=4, n_positions=77, **sizes))
    assert context_length(gpt2, args) == 77


def test_a_model_without_position_embeddings_has_no_context_limit(args):
    sizes = {"vocab_size": 10, "n_layer": 1, "n_head": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    assert context_length(BloomForCausalLM(BloomConfig(hidden_size=4, **sizes)), args) is None


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
    return build_prompts(args, dict.fromkeys(("selector", "generator"), tokenizer), codec, contexts), codec


def test_prompts_leave_room_for_the_completion(args):
    prompts, codec = build(args)
    assert prompts["selector"].max_length == 300 - codec.max_length
    assert prompts["generator"].max_length == 300 - args.max_answer_length - 1  # and eos
    for role, template in (("selector", args.selector_template), ("generator", args.generator_template)):
        assert prompts[role].template == template


def test_users_limit_holds_where_it_fits(args):
    args.max_prompt_length = 100
    args.max_document_length = 20
    prompts, _ = build(args, generator_context=None)
    assert {prompt.max_length for prompt in prompts.values()} == {100}
    assert {prompt.max_document_length for prompt in prompts.values()} == {20}


@pytest.mark.parametrize("role", ["selector", "generator"])
def test_users_limit_beyond_the_context_names_role_and_cure(args, role):
    limited = {f"{other}_context": 300 if other == role else None for other in ("selector", "generator")}
    prompts, _ = build(args, **limited)
    args.max_prompt_length = prompts[role].max_length
    build(args, **limited)
    args.max_prompt_length += 1
    cure = f"exceed the {role}'s context of 300 tokens: set max_prompt_length to {args.max_prompt_length - 1} or less"
    with pytest.raises(ValueError, match=cure):
        build(args, **limited)


def test_a_model_without_a_context_limit_leaves_prompts_unlimited(args):
    prompts, _ = build(args, None, None)
    assert prompts["selector"].max_length is None
    prompts["selector"].check_fits("who? " * 5000, 20)


def test_limits_count_to_the_token(args):
    prompts, _ = build(args)
    longest = prompts["generator"]("who wrote the book?", [{"text": "the book " * 500}] * 2)
    # Documents are shortened evenly, so one token per document may be left over.
    assert 299 <= len(longest) + args.max_answer_length + 1 <= 300
    with pytest.raises(PromptTooLongError):
        prompts["generator"]("who? " * 300, [{"text": "the book"}])


def test_an_encoder_decoder_model_is_refused_by_its_config(args, tmp_path):
    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="t5 is an encoder-decoder model: both roles need") as error:
        context_length(str(tmp_path / "t5"), args)
    assert "\n" not in str(error.value)


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
