# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
r"""The selector's distribution over document permutations: log-probabilities of given ones.

Permutations are written as [`~codec.PermutationCodec`] says. At every branch the model's probabilities are
renormalised over the tokens that are allowed there. The product over branches is therefore a proper distribution over
the n!/(n-K)! permutations, \\( p(z \mid x) = \prod_t p(z_t \mid z_{<t}, x) \\) (equation 1 of
https://huggingface.co/papers/2505.03075), whatever the tokenizer makes of the digits, and whatever prior is added to
the documents' logits.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .codec import PermutationCodec
from .likelihood import CompletionLogits, completion_logps, pad_rows


SelectorLikelihood = Literal["constrained", "full_vocabulary"]


def permutation_logps(
    complete: Callable[[list[list[int]]], CompletionLogits],
    codec: PermutationCodec,
    permutations: Sequence[Sequence[int]],
    num_documents: Sequence[int],
    likelihood: SelectorLikelihood = "constrained",
    document_logits: Sequence[Sequence[float] | None] | None = None,
) -> Tensor:
    r"""
    \\( \log p(z \mid x) \\) of given permutations, differentiable.

    Args:
        complete (`Callable`):
            The selector and its prompts: takes the tokens of each written permutation, returns the logits that predict
            them, see [`~shared_prefix.PackedModel`].
        codec ([`~codec.PermutationCodec`]):
            Form in which permutations are written.
        permutations (`list[list[int]]` of length `R`):
            Ids from 1.
        num_documents (`list[int]` of length `R`):
            Number of candidates of each permutation's question.
        likelihood (`str`, *optional*, defaults to `"constrained"`):
            `"constrained"` is the distribution that [`~sampling.sample_permutations`] draws from. `"full_vocabulary"`
            is the plain likelihood of the written tokens, end-of-sequence included, as in the paper: it also rewards
            writing the format, and sums to less than 1 over permutations.
        document_logits (`list[list[float]]` of length `R`, *optional*):
            Prior of the documents of each permutation's question, see [`retriever_logits`].

    Returns:
        `Tensor` of shape `(R,)`: nats, `float32`.

    Raises:
        `ValueError`: a prior with `"full_vocabulary"`, which is the likelihood of a text that a model writes alone.
    """
    priors = [None] * len(permutations) if document_logits is None else document_logits
    if likelihood == "full_vocabulary" and any(prior is not None for prior in priors):
        raise ValueError("likelihood='full_vocabulary' knows no prior of the documents: use constrained")
    encoded = [codec.encode(z, n, prior) for z, n, prior in zip(permutations, num_documents, priors, strict=True)]
    completion = complete([tokens for tokens, _ in encoded])
    if likelihood == "full_vocabulary":
        return completion_logps(completion)
    device = completion.logits.device
    starts = itertools.accumulate(completion.lengths, initial=0)
    # Row, index into all tokens, choice, alternatives and their prior, of every branch
    branches = [
        (row, start + branch.position, branch.chosen, branch.allowed, branch.prior)
        for row, ((_, branches), start) in enumerate(zip(encoded, starts, strict=False))
        for branch in branches
    ]
    total = torch.zeros(len(encoded), device=device)
    if not branches:  # a single document to choose from: probability 1, kept in the graph
        return total + 0.0 * completion.logits.sum().float()
    rows, indices, chosen = torch.tensor([branch[:3] for branch in branches], device=device).unbind(dim=-1)
    *_, allowed, prior = zip(*branches, strict=True)
    branch_logits, _ = allowed_logits(completion.logits[indices], allowed, prior)
    branch_logps = branch_logits.log_softmax(dim=-1).gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    return total.index_add(0, rows, branch_logps)


def unique_permutations(permutations: Tensor) -> tuple[list[tuple[int, list[int]]], Tensor]:
    """
    Distinct permutations of each question, so that equal ones are scored once.

    Args:
        permutations (`Tensor` of shape `(B, m, K)`):
            Ids from 1, and zeros behind.

    Returns:
        `tuple[list[tuple[int, list[int]]], Tensor]`: the distinct pairs of question index and permutation, and for
        every sample the index of its pair, of shape `(B, m)`.
    """
    index: dict[tuple[int, ...], int] = {}
    inverse = [
        [index.setdefault((question, *permutation), len(index)) for permutation in samples]
        for question, samples in enumerate(permutations.tolist())
    ]
    pairs = [(question, [i for i in permutation if i]) for question, *permutation in index]
    return pairs, torch.tensor(inverse, device=permutations.device)


PriorSource = Literal["rank", "score"]


def retriever_logits(record: Mapping[str, Any], strength: float, source: PriorSource = "rank") -> list[float]:
    r"""
    The retriever's prior of each document of a record, \\( \alpha \log r_i \\). The greater \\( \alpha \\) is, the
    nearer the selector comes to the retriever's order, all that an infinite one leaves.

    Args:
        record (`dict`):
            A question's `documents`, and their places as they were retrieved, from 1, under `retrieval_ranks` where
            they are in another order than that.
        strength (`float`):
            \\( \alpha \\), from 0.
        source (`str`, *optional*, defaults to `"rank"`):
            What \\( r_i \\) is: `"rank"`, one over the document's rank; `"score"`, the retriever's score of it, which
            must be above 0 and tells a clear winner from a near tie. Its scale does not matter: a constant factor
            adds the same to every choice.

    Returns:
        `list[float]`: nats.

    Raises:
        `ValueError`: a document has no score above 0.

    Example:

    ```python
    >>> from trl_dro.model.permutation import retriever_logits

    >>> documents = [{"text": "a", "score": 4.0}, {"text": "b", "score": 8.0}, {"text": "c", "score": 2.0}]
    >>> record = {"documents": documents, "retrieval_ranks": [2, 1, 3]}
    >>> [round(logit, 2) for logit in retriever_logits(record, strength=2.0)]
    [-1.39, 0.0, -2.2]
    >>> [round(logit, 2) for logit in retriever_logits(record, strength=2.0, source="score")]
    [2.77, 4.16, 1.39]
    ```
    """
    documents = record["documents"]
    if source == "rank":
        ranks = record.get("retrieval_ranks") or range(1, len(documents) + 1)
        return [0.0 - strength * math.log(rank) for rank in ranks]
    for place, document in enumerate(documents, start=1):
        score = document.get("score")
        if score is None or not 0 < score < math.inf:
            raise ValueError(
                f"document {place} of question {record.get('question')!r} has the score {score!r}, and "
                "retriever_prior_from='score' needs one above 0: retrieve again, or choose 'rank'"
            )
    return [strength * math.log(document["score"]) for document in documents]


def allowed_logits(
    logits: Tensor, allowed: Sequence[Sequence[int]], prior: Sequence[Sequence[float]]
) -> tuple[Tensor, Tensor]:
    """
    Logits `(R, A)` of the allowed tokens of each row with their prior, `-inf` in the padding, and their ids `(R, A)`.
    """
    ids, mask = pad_rows(allowed, 0, logits.device, side="right")
    padded = torch.tensor([[*row, *[0.0] * (ids.shape[1] - len(row))] for row in prior], device=logits.device)
    return (logits.float().gather(-1, ids) + padded).masked_fill(~mask, float("-inf")), ids
