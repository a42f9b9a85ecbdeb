# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Recall@k as an `evaluate.Metric`.

evaluate.load("trl_dro/metrics/passage_recall.py")      # or PassageRecall()
"""

# On separate lines, without which evaluate.load takes them for one package of that name.
import datasets
import evaluate

from trl_dro.metrics.text import recall_at_k, recall_of_ids_at_k


class PassageRecall(evaluate.Metric):
    """
    Recall@k of ranked documents, in two configurations:

    | configuration | `documents` | `references` | score of a question |
    | --- | --- | --- | --- |
    | `"answers"` (default) | texts | gold answers | 1 if one of the first k has an answer, [`~metrics.recall_at_k`] |
    | `"supporting_ids"` | ids | ids of relevant ones | their share in the first k, [`~metrics.recall_of_ids_at_k`] |

    [`~evaluate.Metric.compute`] takes `documents` (`list[list[str]]`, in rank order), `references`
    (`list[list[str]]`), and optionally `ks` (`list[int]`, defaults to `[1, 3, 5]`) and `per_example=True`. It returns
    `recall@k` for each k, from 0 to 1, and, if asked for, `recall@k_per_example`.

    Raises:
        `ValueError`: there is no such configuration.

    Example:

    ```python
    >>> from trl_dro.metrics import PassageRecall

    >>> documents = [["Paris is in France.", "Written by John Keats."]]
    >>> PassageRecall().compute(documents=documents, references=[["John Keats"]], ks=[1, 2])
    {'recall@1': 0.0, 'recall@2': 1.0}
    ```
    """

    def __init__(self, config_name=None, **kwargs):
        config_name = config_name or "answers"  # evaluate.load passes None where none is named
        if config_name not in ("answers", "supporting_ids"):
            raise ValueError(f"config_name={config_name!r}: choose answers or supporting_ids")
        super().__init__(config_name=config_name, **kwargs)

    def _info(self):
        texts = datasets.List(datasets.Value("string"))
        return evaluate.MetricInfo(
            description="Recall@k of ranked documents, by answers they contain or by supporting ids",
            citation="Karpukhin et al., Dense Passage Retrieval for Open-Domain Question Answering, EMNLP 2020",
            inputs_description="documents: texts or ids in rank order; references: answers or supporting ids",
            features=datasets.Features({"documents": texts, "references": texts}),
        )

    def _compute(self, documents, references, ks=(1, 3, 5), per_example=False):
        recall = recall_at_k if self.config_name == "answers" else recall_of_ids_at_k
        results: dict[str, float | list[float]] = {}
        for k in ks:
            scores = [recall(ranked, gold, k) for ranked, gold in zip(documents, references, strict=True)]
            results[f"recall@{k}"] = sum(scores) / len(scores)
            if per_example:
                results[f"recall@{k}_per_example"] = scores
        return results
