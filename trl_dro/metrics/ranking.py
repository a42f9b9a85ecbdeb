# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Standard ranking measures, by `ir-measures`."""

from collections.abc import Sequence


def ranking_measures(
    rankings: Sequence[Sequence[str]],
    supporting_ids: Sequence[Sequence[str]],
    measures: Sequence[str] = ("nDCG@5", "RR@5", "R@5", "AP"),
) -> dict[str, list[float]]:
    """Ranking measures of every question, computed by [`ir-measures`](https://ir-measur.es).

    Args:
        rankings (`Sequence[Sequence[str]]`): document ids of each question in rank order.
        supporting_ids (`Sequence[Sequence[str]]`): ids of each question's relevant documents, at least one.
        measures (`Sequence[str]`, *optional*, defaults to `("nDCG@5", "RR@5", "R@5", "AP")`): names that `ir-measures`
            knows.

    Returns:
        `dict[str, list[float]]`: by measure, one value per question; the mean is what is usually reported.

    Raises:
        `ImportError`: `ir-measures` is not installed.
        `ValueError`: a measure is unknown, a question has no supporting document or ranks one twice, or the two lists
            differ in length.

    Example:
    ```python
    >>> ranking_measures([["a", "b", "c"]], [["b"]], measures=["RR", "R@1"])
    {'RR': [0.5], 'R@1': [0.0]}
    ```
    """
    try:
        import ir_measures
    except ImportError:
        raise ImportError("ranking measures need ir-measures: pip install 'trl_dro[ranking]'") from None

    if len(rankings) != len(supporting_ids):
        raise ValueError(f"{len(rankings)} rankings and supporting ids of {len(supporting_ids)} questions: pair them")
    for question, (ranking, supporting) in enumerate(zip(rankings, supporting_ids, strict=True)):
        if not supporting:
            raise ValueError(f"question {question} has no supporting document, so no measure is defined: leave it out")
        if len(set(ranking)) < len(ranking):
            raise ValueError(f"question {question} ranks a document twice: keep its first place only")
    try:
        parsed = {name: ir_measures.parse_measure(name) for name in measures}
    except (NameError, ValueError) as error:
        raise ValueError(f"unknown measure ({error}): see https://ir-measur.es/en/latest/measures.html") from None
    # Each measure works on scores, so the rank becomes one.
    run = {
        str(question): {document_id: float(len(ranking) - rank) for rank, document_id in enumerate(ranking)}
        for question, ranking in enumerate(rankings)
    }
    qrels = {str(question): dict.fromkeys(supporting, 1) for question, supporting in enumerate(supporting_ids)}
    values: dict[str, list[float]] = {name: [0.0] * len(rankings) for name in measures}
    names = {measure: name for name, measure in parsed.items()}
    for metric in ir_measures.iter_calc(list(parsed.values()), qrels, run):
        values[names[metric.measure]][int(metric.query_id)] = float(metric.value)
    return values
