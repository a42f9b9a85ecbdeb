# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import pytest
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel, T5Config

from trl_dro import DROConfig
from trl_dro.model.codec import PermutationCodec
from trl_dro.model.loading import context_length
from trl_dro.model.prompts import PromptTooLongError
from trl_dro.model.roles import ROLES
from trl_dro.system.rag_config import RAGConfig

from ..tiny_models import tiny_llama, word_level_tokenizer


@pytest.fixture
def args(tmp_path):
    return DROConfig(str(tmp_path / "run"), num_selected=2, max_candidates=4, max_answer_length=16, use_cpu=True)


@pytest.fixture
def folder(tmp_path):
    tokenizer = word_level_tokenizer()
    tiny_llama(tokenizer, max_position_embeddings=512).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_context_length_is_read_without_weights(args, folder, tmp_path):
    (tmp_path / "base" / "model.safetensors").unlink()
    assert context_length(folder) == 512
    assert context_length(tiny_llama(word_level_tokenizer())) == 2048


def test_context_length_goes_by_other_names_too(args):
    sizes = {"vocab_size": 10, "n_layer": 1, "n_head": 1, "bos_token_id": 1, "eos_token_id": 2}
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=4, n_positions=77, **sizes))
    assert context_length(gpt2) == 77


def test_a_model_without_position_embeddings_has_no_context_limit(args):
    sizes = {"vocab_size": 10, "n_layer": 1, "n_head": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    assert context_length(BloomForCausalLM(BloomConfig(hidden_size=4, **sizes))) is None


def build(args, selector_context=300, generator_context=300):
    tokenizer = word_level_tokenizer()
    codec = PermutationCodec(tokenizer, args.max_candidates, args.num_selected)
    contexts = {"selector": selector_context, "generator": generator_context}
    return RAGConfig.of_training(args).build_prompts(dict.fromkeys(ROLES, tokenizer), codec, contexts), codec


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
        context_length(str(tmp_path / "t5"))
    assert "\n" not in str(error.value)
