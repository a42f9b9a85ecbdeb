# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Exact match as an `evaluate.Metric`.

evaluate.load("trl_dro/metrics/kilt_exact_match.py")      # or KILTExactMatch()
"""

# On separate lines, without which evaluate.load takes them for one package of that name.
import datasets
import evaluate

from trl_dro.metrics.text import exact_match


class KILTExactMatch(evaluate.Metric):
    """
    Share of predictions that equal a gold answer after KILT's normalisation, see [`~metrics.exact_match`].

    [`~evaluate.Metric.compute`] takes `predictions` (`list[str]`) and `references` (`list[list[str]]`, the gold
    answers of each question, or `list[str]`), and optionally `per_example=True`, and returns `em` from 0 to 1 and,
    if asked for, `em_per_example`.

    Example:

    ```python
    >>> from trl_dro.metrics import KILTExactMatch

    >>> KILTExactMatch().compute(predictions=["the Beatles!"], references=[["The Rolling Stones", "Beatles"]])
    {'em': 1.0}
    ```
    """

    def _info(self):
        answers = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        aliases = datasets.Features(
            {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
        )
        return evaluate.MetricInfo(
            description="Exact match after the normalisation of KILT",
            citation="Petroni et al., KILT: a Benchmark for Knowledge Intensive Language Tasks, NAACL 2021",
            inputs_description="predictions: answers; references: gold answers of each; per_example: bool",
            features=[aliases, answers],
        )

    def _compute(self, predictions, references, per_example=False):
        scores = [
            exact_match(prediction, [gold] if isinstance(gold, str) else gold)
            for prediction, gold in zip(predictions, references, strict=True)
        ]
        results = {"em": sum(scores) / len(scores)}
        return results | {"em_per_example": scores} if per_example else results
