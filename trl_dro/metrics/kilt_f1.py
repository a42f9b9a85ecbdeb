# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""F1 as an `evaluate.Metric`.

evaluate.load("trl_dro/metrics/kilt_f1.py")      # or KILTF1()
"""

# On separate lines, without which evaluate.load takes them for one package of that name.
import datasets
import evaluate

from trl_dro.metrics.text import f1


class KILTF1(evaluate.Metric):
    """
    Mean F1 of words over predictions, the best over gold answers, see [`~metrics.f1`].

    [`~evaluate.Metric.compute`] takes `predictions` (`list[str]`) and `references` (`list[list[str]]`, the gold
    answers of each question, or `list[str]`), and optionally `per_example=True`, and returns `f1` from 0 to 1 and,
    if asked for, `f1_per_example`.

    Example:

    ```python
    >>> from trl_dro.metrics import KILTF1

    >>> KILTF1().compute(predictions=["the Beatles!"], references=[["The Rolling Stones", "Beatles"]])
    {'f1': 1.0}
    ```
    """

    def _info(self):
        answers = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        aliases = datasets.Features(
            {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
        )
        return evaluate.MetricInfo(
            description="F1 of words after the normalisation of KILT",
            citation="Petroni et al., KILT: a Benchmark for Knowledge Intensive Language Tasks, NAACL 2021",
            inputs_description="predictions: answers; references: gold answers of each; per_example: bool",
            features=[aliases, answers],
        )

    def _compute(self, predictions, references, per_example=False):
        scores = [
            f1(prediction, [gold] if isinstance(gold, str) else gold)
            for prediction, gold in zip(predictions, references, strict=True)
        ]
        results = {"f1": sum(scores) / len(scores)}
        return results | {"f1_per_example": scores} if per_example else results
