# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""What a model can read and what it is asked, known before its weights are loaded."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .codec import PermutationCodec
from .prompts import PassagePrompts, PromptBuilder, Prompts, Template
from .query_likelihood import SelectorForm
from .roles import ROLES, Role


def refuse_file(name: str | Path | None, revision: str | None = None) -> None:
    """
    Raises `ValueError` if a model is named by a file, as models are folders and repos, GGUF files not among them; or
    if it is a folder of which a revision is asked for.
    """
    if name is not None and revision not in (None, "main") and Path(name).is_dir():
        raise ValueError(
            f"{name} is a folder here, which has no revision {revision!r}: leave the revision out, or name a Hub repo"
        )
    if name is not None and Path(name).is_file():
        what = "a GGUF file, for llama.cpp" if str(name).endswith(".gguf") else "a file"
        raise ValueError(f"{name} is {what}: name the model it was made from, a folder with config.json or a Hub id")


def prepare_tokenizer(tokenizer: Any) -> PreTrainedTokenizerBase:
    """
    The tokenizer with a padding token, which only fills masked places.

    Raises:
        `TypeError`: not a tokenizer (a processor of a vision-language model, say).
        `ValueError`: it has no end-of-sequence token, without which no answer ever ends.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"`processing_class` must be a tokenizer, not {type(tokenizer).__name__}")
    if tokenizer.eos_token is None:
        raise ValueError("the tokenizer has no eos token, so no answer would ever end: set tokenizer.eos_token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_tokenizer(model: str, revision: str | None = None, **kwargs: Any) -> Any:
    """
    The tokenizer of a folder or Hub repo, padded on the left.

    Args:
        model (`str`):
            Folder or Hub id.
        revision (`str`, *optional*):
            Branch, tag or commit.
        kwargs:
            Passed to [`~transformers.AutoTokenizer.from_pretrained`].

    Raises:
        `ValueError`: it cannot be loaded; the message names `model`.
    """
    try:
        return AutoTokenizer.from_pretrained(model, revision=revision, padding_side="left", **kwargs)
    except Exception as error:  # whatever a damaged file raises in transformers or tokenizers
        raise ValueError(
            f"the tokenizer of {model} cannot be loaded ({_first_line(error)}): check the name and its files"
        ) from error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def context_length(
    model: str | PreTrainedModel, revision: str | None = None, trust_remote_code: bool = False
) -> int | None:
    """
    Longest sequence of a model in tokens, read from its config alone; `None` if it has no limit.

    Raises:
        `ValueError`: an encoder-decoder model, which cannot write on from a prompt.
    """
    if isinstance(model, str):
        try:
            config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
        except Exception as error:  # whatever a damaged file raises
            raise ValueError(
                f"the config of model {model} cannot be loaded ({_first_line(error)}): check the name and its files"
            ) from error
    else:
        config = model.config
    if config.is_encoder_decoder:
        name = f"{model}: {config.model_type}" if isinstance(model, str) else config.model_type
        raise ValueError(f"{name} is an encoder-decoder model: both roles need a causal language model")
    return longest_sequence(config)


def longest_sequence(config: PreTrainedConfig) -> int | None:
    """Tokens of the longest sequence that a model can read; `None` if it has no limit."""
    # Models without absolute or rotary positions do not have the attribute.
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def build_prompts(
    tokenizers: dict[Role, PreTrainedTokenizerBase],
    codec: PermutationCodec,
    contexts: dict[Role, int | None],
    templates: dict[Role, Template],
    max_answer_length: int,
    max_prompt_length: int | None = None,
    max_document_length: int | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    selector_form: SelectorForm = "permutation",
) -> dict[Role, Prompts]:
    """
    Prompt builder of each role, limited to what the model's context leaves beside the completion.

    Args:
        tokenizers (`dict[str, PreTrainedTokenizerBase]`):
            Tokenizer of each role.
        codec ([`~codec.PermutationCodec`]):
            Form of permutations, the selector's completions.
        contexts (`dict[str, int]`):
            Longest sequence of each role's model in tokens; `None` for no limit.
        templates (`dict[str, str or Callable]`):
            Template of each role.
        max_answer_length (`int`):
            Longest answer in tokens.
        max_prompt_length (`int`, *optional*):
            Longest prompt in tokens; by default as much as fits.
        max_document_length (`int`, *optional*):
            Longest document in tokens.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for the tokenizer's chat template.
        selector_form (`str`, *optional*, defaults to `"permutation"`):
            `"query_likelihood"` gives the selector [`~prompts.PassagePrompts`].

    Returns:
        `dict[str, PromptBuilder or PassagePrompts]`

    Raises:
        `ValueError`: a template is malformed, or `max_prompt_length` does not leave room for the completion.
    """
    scored = selector_form == "query_likelihood"  # a row holds the question, and nothing follows it
    completion_lengths = {"selector": 0 if scored else codec.max_length, "generator": max_answer_length + 1}
    limits = {role: _prompt_limit(role, contexts[role], completion_lengths[role], max_prompt_length) for role in ROLES}
    prompts: dict[Role, Prompts] = {
        role: PromptBuilder(
            tokenizers[role],
            templates[role],
            codec.num_selected,
            max_length=limits[role],
            max_document_length=max_document_length,
            chat_template_kwargs=chat_template_kwargs or {},
        )
        for role in ROLES
    }
    if scored:
        prompts["selector"] = PassagePrompts(tokenizers["selector"], limits["selector"], max_document_length)
    return prompts


def _prompt_limit(role: str, context: int | None, completion_length: int, max_prompt_length: int | None) -> int | None:
    """
    Longest prompt of a role in tokens.

    Args:
        role (`str`):
            Named in the error.
        context (`int`, *optional*):
            Longest sequence of the model.
        completion_length (`int`):
            Longest completion.
        max_prompt_length (`int`, *optional*):
            The user's limit; `None` for as much as fits.

    Returns:
        `int` or `None`: tokens.

    Raises:
        `ValueError`: the user's limit does not leave room for the completion.
    """
    if context is None:
        return max_prompt_length
    room = context - completion_length
    if room < 1:
        raise ValueError(
            f"a completion of {completion_length} tokens leaves no room for a prompt in the {role}'s context of "
            f"{context} tokens: lower {'num_selected' if role == 'selector' else 'max_answer_length'}"
        )
    if max_prompt_length is None:
        return room
    if max_prompt_length > room:
        raise ValueError(
            f"max_prompt_length={max_prompt_length} and a completion of {completion_length} tokens exceed the "
            f"{role}'s context of {context} tokens: set max_prompt_length to {room} or less"
        )
    return max_prompt_length
