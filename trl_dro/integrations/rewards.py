# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""The generator's answer likelihood as a reward, by which TRL's own trainers can train a selector."""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset

from ..data.schema import validate_dataset
from ..model.codec import parse_permutation
from ..model.prompts import PassagePrompts
from ..model.rag_model import RAGModel
from ..model.roles import Role
from ..system.pipeline import RAGPipeline


class AnswerLikelihoodReward:
    r"""
    Reward function for [`~trl.GRPOTrainer`] and [`~trl.RLOOTrainer`]: the log-likelihood of the right answer under the
    generator, given the documents that a completion of the selector names, \\( \log p(y \mid x, d_z) \\).

    The selector writes freely here, so that a completion can be no permutation. It is read as far as it goes: ids that
    are out of range or repeated are passed over, fewer documents than asked for are taken as they are, and none at all
    is an answer without documents.

    Args:
        rag ([`~rag_model.RAGModel`]):
            Model whose generator scores, in evaluation mode, e.g. `RAGPipeline.from_pretrained(…).rag`.
        format_penalty (`float`, *optional*, defaults to `1.0`):
            Nats taken off for every document that is missing and every id that is passed over.
        mean (`bool`, *optional*, defaults to `False`):
            Log-likelihood per token of the answer instead of the whole answer's.
        batch_size (`int`, *optional*, defaults to `32`):
            Completions scored at a time.

    Example:

    ```python
    # needs a GPU, and a generator and a selector on disk: models of their own, not adapters
    from datasets import load_from_disk
    from trl import GRPOConfig, GRPOTrainer
    from trl_dro import RAGPipeline
    from trl_dro.integrations.rewards import AnswerLikelihoodReward, prompt_dataset

    pipe = RAGPipeline.from_pretrained("generator", selector="selector")
    # An adapter's folder is no model to GRPOTrainer ("Unrecognized model"): merge it before,
    # pipe.export_merged("selector", "merged-selector"), or put it on its base by hand:
    # PeftModel.from_pretrained(base, "run/selector", is_trainable=True), as examples/grpo_selector.py does.
    trainer = GRPOTrainer(
        model="selector",
        reward_funcs=AnswerLikelihoodReward(pipe.rag),
        args=GRPOConfig(max_completion_length=32),
        train_dataset=prompt_dataset(load_from_disk("nq-top20/train"), pipe),
    )
    ```
    """

    def __init__(self, rag: RAGModel, format_penalty: float = 1.0, mean: bool = False, batch_size: int = 32):
        self.rag = rag
        self.format_penalty = format_penalty
        self.mean = mean
        self.batch_size = batch_size
        self.__name__ = "answer_log_likelihood"  # how the trainer logs it

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str] | Sequence[list[dict[str, str]]],
        question: Sequence[Any],
        answers: Sequence[Sequence[str]],
        documents: Sequence[list[dict[str, Any]]],
        **columns: Any,
    ) -> list[float]:
        """
        Rewards of a batch, called by the trainer.

        Args:
            prompts (`list`):
                Selector prompts; not looked at.
            completions (`list[str]` or `list[list[dict]]` of length `R`):
                What the selector wrote, as text or as messages.
            question (`list` of length `R`):
                The dataset's column.
            answers (`list[list[str]]` of length `R`):
                The dataset's column; the first answer is scored.
            documents (`list[list[dict]]` of length `R`):
                The dataset's column, in the order of the prompt.
            columns:
                Other columns, and what else the trainer passes.

        Returns:
            `list[float]` of length `R`: nats.
        """
        num_selected = self.rag.codec.num_selected
        texts = [each if isinstance(each, str) else each[-1]["content"] for each in completions]
        parsed = [
            parse_permutation(text, len(candidates), num_selected)
            for text, candidates in zip(texts, documents, strict=True)
        ]
        rewards = [0.0] * len(texts)
        lengths = {len(each.permutation) for each in parsed}
        # Selections of one length make a tensor.
        for rows in ([i for i, each in enumerate(parsed) if len(each.permutation) == length] for length in lengths):
            for start in range(0, len(rows), self.batch_size):
                batch = rows[start : start + self.batch_size]
                permutations = torch.tensor([[parsed[i].permutation] for i in batch], dtype=torch.long)
                questions = [{"question": question[i], "documents": documents[i]} for i in batch]
                targets = [list(answers[i])[:1] for i in batch]
                logps = self.rag.answer_logps(questions, targets, permutations, self.mean)[:, 0].tolist()
                for i, logp in zip(batch, logps, strict=True):
                    missing = max(0, self.rag.codec.min_selected - len(parsed[i].permutation))
                    faults = missing + parsed[i].num_dropped
                    rewards[i] = logp - self.format_penalty * faults
        return rewards


def prompt_dataset(dataset: Dataset, pipe: RAGPipeline, role: Role = "selector") -> Dataset:
    """
    A dataset with the prompts of a role, for trainers that write their own completions.

    Args:
        dataset (`Dataset`):
            Questions with the columns `question`, `answers` and `documents`. Shuffle the documents beforehand if the
            selector is not to lean on the retriever's order.
        pipe ([`~pipeline.RAGPipeline`]):
            System whose templates, lengths and tokenizer are used.
        role (`str`, *optional*, defaults to `"selector"`):
            `"selector"`, whose prompt shows all candidates; or `"generator"`, whose prompt shows the first ones.

    Returns:
        `Dataset`: with the column `prompt` added, chat messages if the tokenizer has a chat template and else text,
        and `documents` cut to the candidates shown.

    Raises:
        `DatasetError`: the dataset is malformed.
        `ValueError`: the selector scores documents and writes nothing.
    """
    validate_dataset(dataset, pipe.config.num_selected, "dataset")
    builder = pipe.rag.prompts[role]
    if isinstance(builder, PassagePrompts):
        raise ValueError(
            "this selector scores documents (selector_form='query_likelihood') and writes no permutation that a "
            "reward could be given for: train it with DROTrainer, or take one with selector_form='permutation'"
        )
    shown = pipe.config.max_candidates if role == "selector" else pipe.config.num_selected

    def add_prompt(record: dict[str, Any]) -> dict[str, Any]:
        documents = record["documents"][:shown]
        return {"prompt": builder.write(record["question"], documents), "documents": documents}

    return dataset.map(add_prompt, desc=f"Prompts of the {role}")
