# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""The page of a trained system on the Hub: what it is, how to load it, and its results as metadata."""

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from huggingface_hub import EvalResult, ModelCard, ModelCardData


# Metrics of an evaluation that a page shows, by their names in the logs, with the Hub's type of each.
METRICS = {"em": ("Exact match", "exact_match"), "f1": ("F1", "f1")}
METRICS |= {f"recall@{k}": (f"Recall@{k} of the selection", "recall") for k in range(1, 6)}

BODY = """
# {name}

A retrieval-augmented system trained with [DRO]({paper_url}), Direct Retrieval-augmented Optimization: a **selector** \
that picks and orders {num_selected} of up to {max_candidates} retrieved documents, and a **generator** that answers \
from them. Both were trained on the likelihood of the right answer{dataset}.

- `selector/` and `generator/`: {kind}
- `rag_config.json`: prompts and sizes, as in training

## Use

```python
from trl_dro import RAGPipeline

pipe = RAGPipeline.from_pretrained("{repo_id}")
output = pipe("who wrote the origin of species", documents=[{{"id": "7", "title": "…", "text": "…"}}])
print(output.answer, [(document.id, document.probability) for document in output.documents])
```

{plain}

{results}## Training

With `DROTrainer` of trl_dro, an extension of [TRL](https://github.com/huggingface/trl): trl_dro {trl_dro}, \
TRL {trl}, Transformers {transformers}, PEFT {peft}, PyTorch {torch}.

| setting | value |
|---|---|
{settings}

## Citation

```bibtex
{citation}
```
"""

ADAPTERS = """Each role is a plain peft adapter:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base})
selector = PeftModel.from_pretrained(base, "{repo_id}", subfolder="selector")
```"""

MODELS = """Each role is a plain model:

```python
from transformers import AutoModelForCausalLM

selector = AutoModelForCausalLM.from_pretrained("{repo_id}", subfolder="selector")
```"""


def build_model_card(
    name: str,
    repo_id: str,
    bases: Sequence[str],
    adapters: bool,
    dataset_name: str | None,
    metrics: Mapping[str, float],
    settings: Mapping[str, object],
    tags: Sequence[str],
    paper_id: str,
    citation: str,
) -> ModelCard:
    """
    Model card with results as model-index metadata.

    Args:
        name (`str`):
            Name of the system.
        repo_id (`str`):
            Its repo, or its folder where there is none.
        bases (`list[str]`):
            Hub ids of the base models, or folders, of which the name is shown; empty if they are saved in `base/`.
        adapters (`bool`):
            Whether the roles are adapters.
        dataset_name (`str`, *optional*):
            Dataset it was trained and evaluated on.
        metrics (`dict[str, float]`):
            Last evaluation, by the names of [`METRICS`], from 0 to 1.
        settings (`dict`):
            Training arguments to list.
        tags (`list[str]`):
            Tags.
        paper_id (`str`):
            ArXiv id of the method.
        citation (`str`):
            BibTeX entry of the method.

    Returns:
        [`~huggingface_hub.ModelCard`]
    """
    bases = list(dict.fromkeys(bases))
    names = [os.path.basename(base.rstrip("/")) if os.path.isdir(base) else base for base in bases]
    shown = {metric: 100 * metrics[metric] for metric in METRICS if metric in metrics}
    is_on_hub = dataset_name is not None and dataset_name.count("/") == 1 and not os.path.exists(dataset_name)
    if dataset_name is not None and not is_on_hub:
        dataset_name = os.path.basename(dataset_name.rstrip("/"))
    data = ModelCardData(
        model_name=name,
        base_model=[base for base in bases if not os.path.isdir(base)] or None,
        datasets=[dataset_name] if is_on_hub and dataset_name else None,
        library_name="peft" if adapters else "transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(["generated_from_trainer", "rag", *tags])),
        eval_results=_eval_results(shown, dataset_name) or None,
    )
    base = f'"{names[0]}"' if names else f'"{repo_id}", subfolder="base"'
    body = BODY.format(
        name=name,
        paper_url=f"https://huggingface.co/papers/{paper_id}",
        num_selected=settings["num_selected"],
        max_candidates=settings["max_candidates"],
        dataset=f" on {dataset_name}" if dataset_name else "",
        kind=(f"adapters on {' and '.join(names) or 'the model in `base/`'}" if adapters else "full models"),
        repo_id=repo_id,
        plain=(ADAPTERS if adapters else MODELS).format(base=base, repo_id=repo_id),
        results=_results(shown, metrics),
        settings="\n".join(f"| `{key}` | {_cell(value)} |" for key, value in settings.items()),
        citation=citation.strip(),
        **{package: version(package) for package in ("trl_dro", "trl", "transformers", "peft", "torch")},
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{body}")


def _eval_results(shown: Mapping[str, float], dataset_name: str | None) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="question-answering",
            dataset_type=dataset_name or "custom",
            dataset_name=dataset_name or "evaluation set",
            metric_type=METRICS[metric][1],
            metric_name=METRICS[metric][0],
            metric_value=round(value, 2),
        )
        for metric, value in shown.items()
    ]


def _results(shown: Mapping[str, float], metrics: Mapping[str, float]) -> str:
    if not shown:
        return ""
    rows = []
    for metric, value in shown.items():
        retriever = f"{100 * metrics[f'retriever_{metric}']:.1f}" if f"retriever_{metric}" in metrics else ""
        rows.append(f"| {METRICS[metric][0]} | {value:.1f} | {retriever} |")
    return "\n".join(["## Results", "", "| % | this system | retriever's order |", "|---|---|---|", *rows, "", ""])


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", "⏎")
