# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""What `learning.py` compares DRO with, trainers and data, what it measures, and when."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback

from trl_dro import DROTrainer
from trl_dro.demo.world import ORGANISATION_KINDS
from trl_dro.metrics.text import exact_match, has_answer
from trl_dro.model.codec import PermutationCodec
from trl_dro.model.importance import importance_weights, selector_coefficients
from trl_dro.model.rag_model import RAGModel
from trl_dro.model.sampling import PermutationSamples
from trl_dro.trainer.estimation import Estimate, Weights
from trl_dro.trainer.schedule import MicroBatch


def shuffle_answers(dataset: Dataset, seed: int) -> Dataset:
    answers = list(dataset["answers"])
    random.Random(seed).shuffle(answers)
    return Dataset.from_list([{**record, "answers": a} for record, a in zip(dataset, answers, strict=True)])


def answers_first(record: dict[str, Any]) -> dict[str, Any]:
    """Candidates that contain an answer, then the others, each in the retriever's order."""
    documents = sorted(record["documents"], key=lambda document: not has_answer(document["text"], record["answers"]))
    return {**record, "documents": documents}


class UncorrectedTrainer(DROTrainer):
    """Takes the permutations for draws from the selector itself, whatever they were drawn from."""

    def _sample(self, *args: Any, **kwargs: Any) -> PermutationSamples:
        samples = super()._sample(*args, **kwargs)
        return samples._replace(proposal_logps=samples.logps)


class UniformTrainer(DROTrainer):
    """Gives the selector's permutations the same weight, whatever they do for the answer."""

    def _weigh(self, estimate: Estimate) -> Weights:
        weights = super()._weigh(estimate)
        return weights._replace(selector=torch.full_like(weights.selector, 1 / weights.selector.shape[-1]))


class DocumentwiseRAG(RAGModel):
    """
    A selector that looks at documents one by one: a document's score is the log-odds with which it is chosen over an
    empty one, and its probability the softmax over the candidates' scores.
    """

    def __init__(self, rag: RAGModel):
        super().__init__(rag.roles, rag.tokenizers, rag.prompts, rag.codec, rag.device, rag.max_tokens)
        codec = PermutationCodec(rag.tokenizers["selector"], 2, 1)
        self.pair = RAGModel(rag.roles, rag.tokenizers, rag.prompts, codec, rag.device, rag.max_tokens)

    def document_logps(self, questions: list[dict[str, Any]], wrapped: nn.Module | None = None) -> Tensor:
        """Log-probability of each candidate, `(B, n)`."""
        pairs = [
            {**question, "documents": [document, {"text": ""}]}
            for question in questions
            for document in question["documents"]
        ]
        choices = torch.tensor([[1], [2]]).expand(len(pairs), -1, -1)
        logps = self.pair.permutation_logps(pairs, choices, wrapped=wrapped)  # [B * n, 2]
        return (logps[:, 0] - logps[:, 1]).view(len(questions), -1).log_softmax(-1)

    @torch.no_grad()
    def sample(
        self,
        questions,
        num_permutations,
        temperature=1.0,
        top_p=1.0,
        greedy=False,
        seeds=None,
        read=None,
        sampling="independent",
    ) -> PermutationSamples:
        """The most probable documents if `greedy`, else documents drawn one after the other without repetition."""
        logps = self.document_logps(questions).unsqueeze(1)  # [B, 1, n]
        scores = logps.repeat(1, num_permutations, 1)  # [B, m, n]
        if not greedy:
            # The order of log-probabilities with Gumbel noise is a draw without repetition.
            for row, seed in enumerate(seeds):
                uniform = torch.rand(scores[row].shape, generator=torch.Generator().manual_seed(seed))
                scores[row] -= (-uniform.clamp(1e-20).log()).log()
        chosen = scores.topk(self.codec.num_selected).indices  # [B, m, K]
        chosen_logps = logps.expand_as(scores).gather(-1, chosen)
        # Each is drawn from what those before it have left.
        taken = chosen_logps.exp().cumsum(-1) - chosen_logps.exp()
        total = (chosen_logps - (1 - taken).clamp(1e-9).log()).sum(-1)
        return PermutationSamples(chosen + 1, total, total)


class DocumentwiseTrainer(DROTrainer):
    """
    Document-independent scoring as in REPLUG's LSR (https://huggingface.co/papers/2301.12652): the selector's
    distribution over single documents is drawn towards the answer's likelihood given each document alone. The
    generator is trained as in DRO, on documents drawn from that selector.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.rag = DocumentwiseRAG(self.rag)

    def _em_step(self, model: nn.Module, inputs: MicroBatch) -> Tensor:
        rows = inputs.block[inputs.position].rows
        draws = [random.Random(f"{self.args.seed}, block {inputs.block_index}, row {row}") for row in rows]
        questions = self._records(rows)
        for question, draw in zip(questions, draws, strict=True):
            question["documents"] = draw.sample(question["documents"], len(question["documents"]))
        targets = [question["answers"][:1] for question in questions]
        documents = torch.arange(1, len(questions[0]["documents"]) + 1).expand(len(questions), -1).unsqueeze(-1)
        with self._inference():
            alone = self.rag.answer_logps(questions, targets, documents)  # [B, n]
            seeds = [draw.getrandbits(62) for draw in draws]
            samples = self.rag.sample(questions, self.args.num_permutations, seeds=seeds)
        answer_logps = self.rag.answer_logps(questions, targets, samples.permutations, wrapped=model)
        weights = importance_weights(answer_logps.detach())
        generator_loss = -(weights * answer_logps).sum(-1).mean()
        self.accelerator.backward(generator_loss)
        logps = self.rag.document_logps(questions, model)
        selector_loss = -(importance_weights(alone) * logps).sum(-1).mean()
        self.accelerator.backward(selector_loss)
        self._usable_questions += len(rows)
        return (generator_loss + selector_loss).detach()


def estimator_variance(trainer: DROTrainer, repeats: int, num_questions: int = 16) -> dict[str, float]:
    r"""
    How noisy one E-step and its gradients are at the weights of now, for several m: the same questions, drawn for
    `repeats` times.

    Returns:
        `dict[str, float]`: `weight_variance@m`, of the importance weights of a question; `likelihood_variance@m`, over
        repeats, of the mean of \\( p(y \mid x, d_{z_i}) \\) over permutations; and, over repeats and summed over
        parameters, the variance of each gradient, `rws_gradient_variance@m`, `rws_centered_gradient_variance@m`,
        `generator_gradient_variance@m`.
    """
    rag, trained = trainer.rag, trainer.roles
    questions = trainer._records(list(range(num_questions)))
    targets = [question["answers"][:1] for question in questions]
    results = {}
    was_training = trainer.model.training
    trainer.model.eval()
    for m in (1, 2, 4, 8, 16):
        weight_variances, likelihoods = [], []
        gradients: dict[str, list[Tensor]] = {"rws": [], "rws_centered": [], "generator": []}
        for repeat in range(repeats):
            seeds = [random.Random(f"{repeat}, {row}").getrandbits(62) for row in range(num_questions)]
            permutations = rag.sample(questions, m, seeds=seeds).permutations
            answer_logps = rag.answer_logps(questions, targets, permutations)
            weights = importance_weights(answer_logps.detach())
            weight_variances.append(weights.var(dim=-1, correction=0).mean())
            likelihoods.append(answer_logps.detach().exp().mean(dim=-1))
            loss = -(weights * answer_logps).sum(-1).mean()
            gradients["generator"].append(_gradient(loss, trained.named_parameters("generator")))
            logps = rag.permutation_logps(questions, permutations)
            for estimator in ("rws", "rws_centered"):
                coefficients = selector_coefficients(answer_logps.detach(), estimator=estimator)
                loss = -(coefficients * logps).sum(-1).mean()
                gradients[estimator].append(_gradient(loss, trained.named_parameters("selector"), retain_graph=True))
        results[f"weight_variance@{m}"] = torch.stack(weight_variances).mean().item()
        results[f"likelihood_variance@{m}"] = torch.stack(likelihoods).var(dim=0).mean().item()
        for name, values in gradients.items():
            results[f"{name}_gradient_variance@{m}"] = torch.stack(values).var(dim=0).sum().item()
    trainer.model.train(was_training)
    return results


def _gradient(loss: Tensor, parameters: list[tuple[str, nn.Parameter]], retain_graph: bool = False) -> Tensor:
    gradients = torch.autograd.grad(loss, [parameter for _, parameter in parameters], retain_graph=retain_graph)
    return torch.cat([gradient.flatten() for gradient in gradients])


@torch.no_grad()
def context_reliance(trainer: DROTrainer, repeats: int, batch_size: int = 50) -> dict[str, float]:
    """
    What the evaluation answers owe to the documents selected.

    Returns:
        `dict[str, float]`: `likelihood_gain`, of the answer with the selected documents over empty ones, in nats; and
        of the questions whose selected documents contain the answer, `changed_share` of all, the share that are
        answered with another name once that has taken the answer's place in these documents (`follows`), or still
        with the true answer (`keeps`).
    """
    rag, num_selected = trainer.rag, trainer.args.num_selected
    rng = random.Random(0)
    records = [trainer._with_candidates(record) for record in trainer.eval_dataset]
    names = sorted({record["answers"][0] for record in records})
    was_training = trainer.model.training
    trainer.model.eval()
    gains, follows, keeps = [], [], []
    for start in range(0, len(records), batch_size):
        questions = records[start : start + batch_size]
        selected = rag.sample(questions, 1, greedy=True).permutations[:, 0].tolist()
        targets = [question["answers"][:1] for question in questions]
        in_order = torch.arange(1, num_selected + 1).expand(len(questions), 1, -1)
        shown = [
            {**question, "documents": [question["documents"][i - 1] for i in permutation]}
            for question, permutation in zip(questions, selected, strict=True)
        ]
        empty = [{**question, "documents": [{"text": ""}] * num_selected} for question in questions]
        logps = [rag.answer_logps(variant, targets, in_order)[:, 0] for variant in (shown, empty)]
        gains += (logps[0] - logps[1]).tolist()

        changed, others = [], []
        for question in shown:
            answer = question["answers"][0]
            if any(has_answer(document["text"], [answer]) for document in question["documents"]):
                other = rng.choice([name for name in names if name != answer and _kind(name) == _kind(answer)])
                documents = [{**d, "text": d["text"].replace(answer, other)} for d in question["documents"]]
                changed.append({**question, "documents": documents})
                others.append(other)
        if changed:
            answers = rag.answer(changed, in_order[: len(changed), 0], trainer.args.max_answer_length)
            for question, other, answer in zip(changed, others, answers, strict=True):
                follows.append(exact_match(answer, [other]))
                keeps.append(exact_match(answer, question["answers"]))
    trainer.model.train(was_training)
    return {
        "likelihood_gain": sum(gains) / len(gains),
        "changed_share": len(follows) / len(records),
        "follows": sum(follows) / max(1, len(follows)),
        "keeps": sum(keeps) / max(1, len(keeps)),
    }


def _kind(name: str) -> str:
    """Kind of the entity that bears a name, told by its form."""
    last = name.split()[-1]
    return "organisation" if last in ORGANISATION_KINDS else "place" if last == name else "person or work"


class OnEvaluation(TrainerCallback):
    """Calls `measure` with the iteration and its metrics."""

    def __init__(self, measure: Callable[[int, dict[str, float]], None], updates: int):
        self.measure, self.updates = measure, updates

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.measure(state.global_step // self.updates, metrics)


class SaveAdapter(TrainerCallback):
    """Saves the model after the steps that `saves` names."""

    def __init__(self, saves: dict[int, Path]):
        self.saves = saves

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.saves:
            model.save_pretrained(self.saves[state.global_step])
