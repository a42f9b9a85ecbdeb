# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
r"""The two numbers of a selector that scores documents, fitted by the likelihood of the answers.

A document's logit is \\( s_i = \tau \log p(x \mid d_i) + \alpha r_i \\), with \\( r_i \\) the retriever's log score or
minus the log of its rank. How sure the model is, \\( \tau \\), and how much the retriever's word counts,
\\( \alpha \\), differ from model to model and from retriever to retriever. Both are a selector's parameters as its
weights are, and DRO's objective has a say in them as well: those are taken under which the answers are most likely, by
the same permutations and the same bound as in training, and no document has to be labelled. Two numbers need few
questions.
"""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.lines import read_json_object
from ..model.rag_model import RAGModel
from ..model.sampling import PermutationSamples
from ..model.shared_prefix import ReadPrompts
from ..system.rag_config import CONFIG_FILE
from .dro_config import DROConfig
from .estimation import draw, reordered


class ScoreWeights(NamedTuple):
    r"""
    What the logits of documents are made of.

    Args:
        query_likelihood_scale (`float` or `Tensor`):
            \\( \tau \\).
        retriever_prior (`float` or `Tensor`):
            \\( \alpha \\).
    """

    query_likelihood_scale: Any
    retriever_prior: Any


def saved_weights(folder: str | Path) -> ScoreWeights:
    """Weights that a checkpoint or a run holds in its `rag_config.json`."""
    saved = read_json_object(Path(folder) / CONFIG_FILE)
    return ScoreWeights(**{name: saved[name] for name in ScoreWeights._fields})


class ScoredQuestions(NamedTuple):
    r"""
    What the E-step knows of `B` questions, by which weights can be judged.

    Args:
        question_logps (`Tensor` of shape `(B, n + 1)`):
            \\( \log p(x \mid d_i) \\) in nats behind that of the question without a document; `-inf` where there is no
            document.
        retriever_logits (`Tensor` of shape `(B, n + 1)`):
            \\( r_i \\), 0 for no document.
        permutations (`Tensor` of shape `(B, m, K)`):
            Places of documents, from 1; zeros behind a permutation that ended early.
        log_weights (`Tensor` of shape `(B, m)`):
            \\( \log p(y \mid x, d_{z_j}) - \log q(z_j) \\) in nats, less the documents' cost; `-inf` where there was
            none to draw.
    """

    question_logps: Tensor
    retriever_logits: Tensor
    permutations: Tensor
    log_weights: Tensor


def scored_questions(
    rag: RAGModel,
    questions: Sequence[dict[str, Any]],
    read: ReadPrompts,
    samples: PermutationSamples,
    answer_logps: Tensor,
    document_cost: float = 0.0,
) -> ScoredQuestions:
    """
    Gathers what [`fit_weights`] takes.

    Args:
        rag ([`~model.rag_model.RAGModel`]):
            A system whose selector scores documents, with a scale above 0.
        questions (`list[dict]` of length `B`):
            Questions with their documents as shown.
        read ([`~shared_prefix.ReadPrompts`]):
            What [`~RAGModel.read`] gives for them.
        samples ([`~sampling.PermutationSamples`]):
            Permutations drawn for them.
        answer_logps (`Tensor` of shape `(B, m)`):
            Log-likelihood of the answers under these, in nats.
        document_cost (`float`, *optional*, defaults to `0.0`):
            Nats that each document must be worth.

    Returns:
        [`ScoredQuestions`]: in float64, on the CPU.
    """
    logps = read.logits.cpu().double() / rag.query_likelihood_scale
    retriever = torch.zeros_like(logps)
    for row, question in enumerate(questions):
        count = len(question["documents"])
        logps[row, count + 1 :] = -math.inf
        prior = rag.document_logits(question)
        if prior is not None:
            retriever[row, 1 : count + 1] = torch.tensor(prior, dtype=torch.float64) / rag.retriever_prior
    cost = document_cost * (samples.permutations > 0).sum(dim=-1)
    # Of distinct permutations there can be fewer than samples.
    log_weights = (answer_logps - cost - samples.proposal_logps).masked_fill(samples.logps.isneginf(), -math.inf)
    return ScoredQuestions(logps, retriever, samples.permutations.cpu(), log_weights.cpu().double())


def fitting_rows(args: DROConfig, size: int) -> list[int]:
    """Rows of the training set that [`fit_selector`] is to see, of `size` in all: the same for the same seed."""
    return random.Random(f"{args.seed}, fit").sample(range(size), min(size, args.selector_fit_questions))


def fit_selector(rag: RAGModel, records: Sequence[dict[str, Any]], args: DROConfig) -> ScoreWeights:
    """
    An E-step over some questions, and the weights that [`fit_weights`] finds by it.

    Args:
        rag ([`~model.rag_model.RAGModel`]):
            A system whose selector scores documents.
        records (`list[dict]`):
            Questions with `answers` and their candidates.
        args ([`DROConfig`]):
            How permutations are drawn and answers scored.

    Returns:
        [`ScoreWeights`]
    """
    found: list[ScoredQuestions] = []
    size, mean = args.per_device_train_batch_size, args.answer_likelihood == "mean"
    how: dict[str, Any] = {"temperature": args.temperature, "top_p": args.top_p, "sampling": args.sampling}
    starts = range(0, len(records), size)
    for start in tqdm(starts, desc="Fitting the selector", leave=False, disable=args.disable_tqdm):
        chosen = records[start : start + size]
        keys = [f"{args.seed}, fit, question {start + number}" for number in range(len(chosen))]
        orders, targets, seeds = draw(chosen, keys, args.shuffle_candidates, cast(Any, args.answer_target))
        questions = reordered(chosen, orders)
        read = rag.read(questions)
        samples = rag.sample(questions, args.num_permutations, seeds=seeds, read=read, **how)
        logps = rag.answer_logps(questions, targets, samples.permutations, mean)
        found.append(scored_questions(rag, questions, read, samples, logps, args.document_cost))
    present = ScoreWeights(rag.query_likelihood_scale, rag.retriever_prior)
    return fit_weights(present, ScoredQuestions(*map(torch.cat, zip(*found, strict=True))), args.min_selected)


def choice_logps(weights: ScoreWeights, questions: ScoredQuestions, min_selected: int | None = None) -> Tensor:
    r"""
    \\( \log p(z_j \mid x) \\) under some weights, by Plackett and Luce, differentiable in them.

    Args:
        weights ([`ScoreWeights`]):
            The weights.
        questions ([`ScoredQuestions`]):
            Questions and permutations.
        min_selected (`int`, *optional*):
            Documents from which a permutation may end; by default it has all K.

    Returns:
        `Tensor` of shape `(B, m)`: nats; `-inf` for what cannot be drawn.
    """
    known = questions.question_logps.isfinite()
    shape = (-1, questions.permutations.shape[1], -1)
    scores = weights.query_likelihood_scale * questions.question_logps.where(known, 0.0).unsqueeze(1).expand(shape)
    prior = weights.retriever_prior * questions.retriever_logits.unsqueeze(1).expand(shape)
    free = known.unsqueeze(1).expand(shape).clone()
    ended = torch.zeros_like(free[..., 0])
    total = torch.zeros_like(scores[..., 0])
    for length, chosen in enumerate(questions.permutations.unbind(dim=-1)):
        free[..., 0] = False
        said = prior
        if min_selected is not None and length >= min_selected:
            # The retriever says which document and not how many, see codec.py.
            others = free.sum(dim=-1, keepdim=True)
            said = prior - prior.masked_fill(~free, -math.inf).logsumexp(dim=-1, keepdim=True) + others.log()
            said = said.masked_fill(torch.arange(said.shape[-1]) == 0, 0.0)
            free[..., 0] = True
        branch = (scores + said).masked_fill(~free, -math.inf).log_softmax(dim=-1)
        logp = branch.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        total = total + logp.masked_fill(ended, 0.0)
        ended = ended | (chosen == 0)
        free = free.scatter(-1, chosen.unsqueeze(-1), False)
    return total


def answer_bound(weights: ScoreWeights, questions: ScoredQuestions, min_selected: int | None = None) -> Tensor:
    r"""
    Bound on the log-likelihood of each question's answer under some weights (Burda et al. 2016,
    https://huggingface.co/papers/1509.00519), of permutations drawn under others: the exact value where all distinct
    permutations were drawn.

    Args:
        weights ([`ScoreWeights`]):
            The weights.
        questions ([`ScoredQuestions`]):
            Questions and permutations.
        min_selected (`int`, *optional*):
            See [`choice_logps`].

    Returns:
        `Tensor` of shape `(B',)`: nats, without questions whose answer cannot be said at all.
    """
    usable = questions.log_weights.isfinite().any(dim=-1) & ~questions.log_weights.isnan().any(dim=-1)
    chosen = ScoredQuestions(*(tensor[usable] for tensor in questions))
    drawn = chosen.log_weights.isfinite()
    logps = choice_logps(weights, chosen, min_selected)
    terms = torch.where(drawn, logps, 0.0) + chosen.log_weights
    return terms.logsumexp(dim=-1) - math.log(terms.shape[-1])  # iwae_bound in float64, for L-BFGS


@torch.enable_grad()
def fit_weights(start: ScoreWeights, questions: ScoredQuestions, min_selected: int | None = None) -> ScoreWeights:
    """
    Weights that make the answers most likely, by L-BFGS over their logarithms. The logarithm of each has a standard
    normal prior about where it starts, worth one question in all: hundreds outweigh it, and a handful, under which
    the likelihood may have no maximum, cannot carry a weight away.

    Args:
        start ([`ScoreWeights`]):
            Where to start. A prior of 0 stays 0.
        questions ([`ScoredQuestions`]):
            The questions.
        min_selected (`int`, *optional*):
            See [`choice_logps`].

    Returns:
        [`ScoreWeights`]: floats of four digits; `start` if no question is usable.

    Example:

    ```python
    >>> import torch
    >>> from trl_dro.trainer.fitting import ScoredQuestions, ScoreWeights, fit_weights

    >>> # Two documents each; the answer follows from the one behind which the question is likelier, 9 times of 10.
    >>> logps = torch.tensor([[0.0, -20.0, -30.0]]).expand(100, 3).double()
    >>> answers = torch.tensor([[0.0, -50.0]] * 90 + [[-50.0, 0.0]] * 10).double()
    >>> permutations = torch.tensor([[1], [2]]).expand(100, 2, 1)
    >>> questions = ScoredQuestions(logps, torch.zeros_like(logps), permutations, answers)
    >>> fit_weights(ScoreWeights(0.1, 0.0), questions)  # e^(10 scale) is nearly 9
    ScoreWeights(query_likelihood_scale=0.2158, retriever_prior=0.0)
    ```
    """
    names = [name for name, value in start._asdict().items() if value > 0]
    origin = torch.tensor([math.log(getattr(start, name)) for name in names], dtype=torch.float64)
    logs = origin.clone().requires_grad_()
    count = len(answer_bound(start, questions, min_selected))
    if not count or not names:
        return start

    def weights() -> ScoreWeights:
        return start._replace(**dict(zip(names, logs.exp(), strict=True)))

    def loss() -> Tensor:
        optimizer.zero_grad()
        prior = 0.5 * (logs - origin).square().sum() / count
        value = prior - answer_bound(weights(), questions, min_selected).mean()
        value.backward()
        return value

    optimizer = torch.optim.LBFGS([logs], max_iter=200, line_search_fn="strong_wolfe")
    optimizer.step(loss)  # type: ignore[no-untyped-call]
    logs.requires_grad_(False)
    return ScoreWeights(*(float(f"{float(value):.4g}") for value in weights()))
