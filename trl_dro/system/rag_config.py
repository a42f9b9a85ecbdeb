# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Prompts and sizes of a trained system, kept beside its weights."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from transformers import PreTrainedTokenizerBase

from ..data.lines import read_json_object
from ..data.storage import write_whole
from ..model.codec import PermutationCodec
from ..model.loading import build_prompts
from ..model.permutation import PriorSource
from ..model.prompts import GENERATOR_TEMPLATE, SELECTOR_TEMPLATE, Prompts, Template, check_template
from ..model.query_likelihood import SelectorForm
from ..model.roles import Role


CONFIG_FILE = "rag_config.json"


@dataclass
class RAGConfig:
    """
    What a trained system must be shown at inference, as it was in training; the fields are those of
    [`~dro_config.DROConfig`], but for `min_gain`, which can be told after training only.

    Args:
        num_selected (`int`, *optional*, defaults to `5`):
            Documents in a permutation, K; the most, if it may end early.
        min_selected (`int`, *optional*):
            Documents from which a permutation may end; by default all K.
        max_candidates (`int`, *optional*, defaults to `20`):
            Candidates shown to the selector, n: the first ones in retrieval order.
        selector_form (`str`, *optional*, defaults to `"permutation"`):
            How the selector chooses: `"permutation"` writes ids, `"query_likelihood"` scores documents.
        query_likelihood_scale (`float`, *optional*, defaults to `0.1`):
            What the question's log-likelihoods are multiplied by.
        retriever_prior (`float`, *optional*, defaults to `0.0`):
            Say of the retriever's ranking in the selector's choices.
        retriever_prior_from (`str`, *optional*, defaults to `"rank"`):
            What that say is made of: `"rank"`, or `"score"`, the retriever's scores.
        selector_template (`str` or `Callable`):
            Selector prompt.
        generator_template (`str` or `Callable`):
            Generator prompt.
        max_prompt_length (`int`, *optional*):
            Longest prompt in tokens.
        max_document_length (`int`, *optional*):
            Longest document in tokens.
        max_answer_length (`int`, *optional*, defaults to `64`):
            Longest answer in tokens.
        answer_permutations (`int`, *optional*, defaults to `1`):
            Permutations under which an answer is looked for, see [`~mixture.answer_questions`].
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for the tokenizer's chat template.
        min_gain (`float`, *optional*):
            Nats by which its documents must make an answer likelier, or it is marked as abstained from, see
            [`~pipeline.RAGOutput`]; nothing is by default.
    """

    num_selected: int = 5
    min_selected: int | None = None
    max_candidates: int = 20
    selector_form: SelectorForm = "permutation"
    query_likelihood_scale: float = 0.1
    retriever_prior: float = 0.0
    retriever_prior_from: PriorSource = "rank"
    selector_template: Template = SELECTOR_TEMPLATE
    generator_template: Template = GENERATOR_TEMPLATE
    max_prompt_length: int | None = None
    max_document_length: int | None = None
    max_answer_length: int = 64
    answer_permutations: int = 1
    chat_template_kwargs: dict[str, Any] | None = None
    min_gain: float | None = None

    @classmethod
    def of_training(cls, args: Any) -> "RAGConfig":
        """The settings of a training run."""
        return cls(**{name: getattr(args, name) for name in cls.names_in_training()})

    @classmethod
    def names_in_training(cls) -> list[str]:
        """Fields that [`~dro_config.DROConfig`] has too: all but what can be told after training only."""
        return [field.name for field in fields(cls) if field.name != "min_gain"]

    def build_codec(self, tokenizers: dict[Role, PreTrainedTokenizerBase]) -> PermutationCodec:
        """Form in which permutations are written: by the selector's tokenizer, unless it scores documents."""
        tokenizer = None if self.selector_form == "query_likelihood" else tokenizers["selector"]
        return PermutationCodec(tokenizer, self.max_candidates, self.num_selected, self.min_selected)

    def build_prompts(
        self,
        tokenizers: dict[Role, PreTrainedTokenizerBase],
        codec: PermutationCodec,
        contexts: dict[Role, int | None],
    ) -> dict[Role, Prompts]:
        """Prompt builder of each role, see [`~loading.build_prompts`]."""
        return build_prompts(
            tokenizers,
            codec,
            contexts,
            {"selector": self.selector_template, "generator": self.generator_template},
            self.max_answer_length,
            self.max_prompt_length,
            self.max_document_length,
            self.chat_template_kwargs,
            self.selector_form,
        )

    def selector(self) -> dict[str, Any]:
        """What the selector's logits are made of beside its model, as arguments of [`~rag_model.RAGModel`]."""
        return {
            "retriever_prior": self.retriever_prior,
            "retriever_prior_from": self.retriever_prior_from,
            "query_likelihood_scale": self.query_likelihood_scale,
        }

    def save(self, folder: str | Path) -> None:
        """Writes `rag_config.json`. A template that is a function is left out: it must be passed when loading."""
        values = {name: None if callable(value) else value for name, value in asdict(self).items()}
        write_whole(Path(folder) / CONFIG_FILE, json.dumps(values, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> "RAGConfig":
        """
        Reads `rag_config.json`.

        Args:
            path (`str` or `Path`):
                The file.
            overrides (`dict`, *optional*):
                Fields to set instead.

        Raises:
            `ValueError`: the file is damaged, a field is unknown, or a template was a function and none is passed.
        """
        values = read_json_object(path) | dict(overrides or {})
        if unknown := sorted(values.keys() - {field.name for field in fields(cls)}):
            raise ValueError(f"{path}: unknown settings {', '.join(unknown)}; update trl_dro or correct them")
        for name in ("selector_template", "generator_template"):
            if name not in values:
                raise ValueError(f"{path} has no {name}: copy or download it again, or pass {name}=")
            if values[name] is None:
                raise ValueError(f"the {name} of {path} was a function, which is not saved: pass {name}=")
        return cls(**values)

    def check(self, where: str) -> None:
        """
        Checks the types and ranges of the fields, before any model is loaded.

        Args:
            where (`str`):
                What is told to hold them: a file, or who passed them.

        Raises:
            `ValueError`: a field cannot be used; the message names it.
        """
        for name in (
            "num_selected",
            "max_candidates",
            "max_answer_length",
            "answer_permutations",
            "max_prompt_length",
            "max_document_length",
        ):
            value = getattr(self, name)
            optional = name in ("max_prompt_length", "max_document_length")
            if not (optional and value is None) and (type(value) is not int or value < 1):
                raise ValueError(f"{where}: {name} must be a whole number from 1, not {value!r}; correct it")
        if self.num_selected > self.max_candidates:
            raise ValueError(
                f"{where}: max_candidates={self.max_candidates} is less than num_selected={self.num_selected}; "
                "raise it"
            )
        for name in ("selector_template", "generator_template"):
            value = getattr(self, name)
            if not isinstance(value, str) and not callable(value):
                raise ValueError(f"{where}: {name} must be a text, not {value!r}; correct it")
            try:
                check_template(value, name)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        if not isinstance(self.chat_template_kwargs, dict | None):
            raise ValueError(
                f"{where}: chat_template_kwargs must be an object or null, not {self.chat_template_kwargs!r}; "
                "correct it"
            )
        if self.min_gain is not None and (
            isinstance(self.min_gain, bool)
            or not isinstance(self.min_gain, int | float)
            or not math.isfinite(self.min_gain)
        ):
            raise ValueError(f"{where}: min_gain must be a finite number or null, not {self.min_gain!r}; correct it")
        for name in ("retriever_prior", "query_likelihood_scale"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{where}: {name} must be a finite number from 0, not {value!r}; correct it")
        for name, known in (("retriever_prior_from", PriorSource), ("selector_form", SelectorForm)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(
                    f"{where}: {name} must be {' or '.join(get_args(known))}, not {getattr(self, name)!r}; correct it"
                )
