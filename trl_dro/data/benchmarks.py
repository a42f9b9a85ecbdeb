# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""The five benchmarks of the paper, from the files and Hub datasets that people have, as records."""

import json
import logging
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from .lines import dataset_rows, first_line, read_jsonl, require_file
from .schema import DatasetError, Document, build_dataset, check_answers, check_question, check_record


logger = logging.getLogger(__name__)

# Questions for training and evaluation in Table 1 of the paper.
BENCHMARKS = {
    "nq": (58_622, 6_489),
    "hotpotqa": (90_185, 7_384),
    "musique": (19_938, 2_417),
    "2wikimultihopqa": (167_454, 12_576),
    "wow": (63_734, 3_054),
}
DEFAULT_SOURCE = "RUC-NLPIR/FlashRAG_datasets"
# Configurations of Hub datasets that have several.
CONFIGS = {
    DEFAULT_SOURCE: dict(zip(BENCHMARKS, BENCHMARKS, strict=True)),
    "hotpotqa/hotpot_qa": {"hotpotqa": "distractor"},
    "facebook/kilt_tasks": {"nq": "nq", "hotpotqa": "hotpotqa", "wow": "wow"},
}

Row = dict[str, Any]


def load_benchmark(name: str, split: str = "train", source: str | os.PathLike | None = None) -> Dataset:
    """Loads a benchmark as records, from the Hub or from files.

    | source | benchmarks | candidates |
    |---|---|---|
    | `RUC-NLPIR/FlashRAG_datasets` (default) | all | of HotpotQA and 2WikiMultihopQA |
    | official files | HotpotQA, 2WikiMultihopQA, MuSiQue, Wizard of Wikipedia (ParlAI), NQ-open | all but NQ-open |
    | `hotpotqa/hotpot_qa` | HotpotQA | yes |
    | `Tevatron/wikipedia-nq`, DPR's `biencoder-nq-*.json` | NQ | positive and negative passages, shuffled |
    | `facebook/kilt_tasks`, KILT's files | NQ, HotpotQA, Wizard of Wikipedia | no |

    The form of a source is told by its columns, so a copy of any of these under another name is read too. Answers
    hold all aliases, the first one is the answer itself; those of 2WikiMultihopQA are read from `id_aliases.json`
    where it lies beside the file. A dialogue of Wizard of Wikipedia gives one record per turn of the wizard, whose
    question is the dialogue so far as chat messages. Questions of MuSiQue that cannot be answered are left out, and
    how many is said in a warning, as for rows without an answer.

    Args:
        name (`str`): `nq`, `hotpotqa`, `musique`, `2wikimultihopqa` or `wow`.
        split (`str`, *optional*, defaults to `"train"`): split to take from the Hub; a file is read whole.
        source (`str` or `os.PathLike`, *optional*): `.json`, `.jsonl` (may be `.gz`) or `.parquet` file, folder of
            `Dataset.save_to_disk`, or id of a Hub dataset.

    Returns:
        `Dataset`: columns `id`, `question`, `answers`, `positive_ids` and, where the source has the paragraphs that
        belong to a question, `documents`: the distractor setting, candidates without any retriever.

    Raises:
        `DatasetError`: there is no such benchmark, the source cannot be read, or a row is broken; the message says
            where and how to mend it.

    Example:
    ```python
    # needs MuSiQue's file
    from trl_dro.data import load_benchmark

    questions = load_benchmark("musique", "dev", source="musique_ans_v1.0_dev.jsonl")
    ```
    """
    if name not in BENCHMARKS:
        raise DatasetError(f"there is no benchmark {name!r}; choose one of {', '.join(BENCHMARKS)}")
    source = os.fspath(source or DEFAULT_SOURCE)
    rows = _read(name, split, source)
    first = next(rows, None)
    if first is None:
        raise DatasetError(f"{source}: has no rows; check the file, or the split")
    convert = _converter(first[1], source)
    aliases = _read_aliases(source)
    left_out: Counter[str] = Counter()

    def records() -> Iterator[Row]:
        for where, row in chain([first], rows):
            for number, record in enumerate(convert(row, where)):
                record["id"] = str(record["id"] or f"{name}-{split}-{where.rpartition(' ')[2]}")
                if record.pop("answerable", True) is False:
                    left_out["questions that cannot be answered"] += 1
                    continue
                record["answers"] = _distinct(record["answers"] + aliases.get(row.get("answer_id"), []))
                if not record["answers"]:
                    left_out["rows without an answer"] += 1
                    continue
                if name == "wow" and isinstance(record["question"], str):
                    record["question"] = _as_dialogue(record["question"])
                place = where if number == 0 else f"{where}, turn {number}"
                if "documents" in record:
                    check_record(record, place)
                else:
                    check_question(record["question"], place)
                    check_answers(record["answers"], place)
                yield record

    dataset = build_dataset(records())
    for what, count in left_out.items():
        logger.warning("%s: %d %s are left out", source, count, what)
    return dataset


def benchmark_summary(name: str, split: str, questions: Dataset) -> str:
    """One line on what was loaded, beside what Table 1 of the paper says, where the split is one of its two."""
    position = {"train": 0, "dev": 1, "validation": 1, "test": 1}.get(split)
    text = f"{name} {split}: {len(questions):,} questions"
    if position is not None:
        expected = BENCHMARKS[name][position]
        same = "as many as" if len(questions) == expected else f"{expected:,}"
        text += f" ({same} in Table 1 of the paper)"
    return text


# One function per form. Each yields the records of a row, most of them one.


def _from_flashrag(row: Row, where: str) -> Iterable[Row]:
    metadata = row.get("metadata") or {}
    paragraphs = {}
    if metadata.get("context") and metadata.get("supporting_facts"):
        paragraphs = _with_supporting_facts(metadata["context"], metadata["supporting_facts"])
    yield {
        "id": row.get("id"),
        "question": row["question"],
        "answers": list(row["golden_answers"]),
        "positive_ids": None,
        **paragraphs,
    }


def _from_hotpotqa(row: Row, where: str) -> Iterable[Row]:
    yield {
        "id": row.get("_id") or row.get("id"),
        "question": row["question"],
        "answers": [row["answer"]] if row.get("answer") else [],
        **_with_supporting_facts(row["context"], row["supporting_facts"]),
    }


def _with_supporting_facts(context: Any, supporting_facts: Any) -> Row:
    """Documents and positive ids of paragraphs given as pairs (official files) or as columns (Hub)."""
    if isinstance(context, dict):
        context = zip(context["title"], context.get("sentences") or context["content"], strict=True)
    if isinstance(supporting_facts, dict):
        supporting = set(supporting_facts["title"])
    else:
        supporting = {title for title, _ in supporting_facts}
    occurrences: Counter[str] = Counter()
    documents: list[Document] = []
    positive_ids: list[str] = []
    for title, sentences in context:
        occurrences[title] += 1
        # Titles name the articles of Wikipedia. A few questions have two paragraphs of one title.
        document_id = title if occurrences[title] == 1 else f"{title} ({occurrences[title]})"
        documents.append(Document(id=document_id, title=title, text=_joined(sentences)))
        if title in supporting:
            positive_ids.append(document_id)
    return {"documents": documents, "positive_ids": positive_ids}


def _from_musique(row: Row, where: str) -> Iterable[Row]:
    documents, positive_ids = [], []
    for paragraph in row["paragraphs"]:
        # Not the title, which several paragraphs of one question share.
        document_id = f"{row['id']}/{paragraph['idx']}"
        documents.append(Document(id=document_id, title=paragraph["title"], text=paragraph["paragraph_text"]))
        if paragraph.get("is_supporting"):
            positive_ids.append(document_id)
    yield {
        "id": row["id"],
        "question": row["question"],
        "answers": [row["answer"], *(row.get("answer_aliases") or [])] if row.get("answer") else [],
        "documents": documents,
        "positive_ids": positive_ids,
        "answerable": row.get("answerable", True),
    }


def _from_tevatron(row: Row, where: str) -> Iterable[Row]:
    positives, negatives = row["positive_passages"], row["negative_passages"]
    passages = [
        Document(id=str(passage["docid"]), title=passage.get("title") or "", text=passage["text"])
        for passage in [*positives, *negatives]
    ]
    yield {
        "id": row["query_id"],
        "question": row["query"],
        "answers": list(row.get("answers") or []),
        "documents": _shuffled(passages, row["query_id"]),
        "positive_ids": [str(passage["docid"]) for passage in positives],
    }


def _from_dpr(row: Row, where: str) -> Iterable[Row]:
    groups = [row[group] or [] for group in ("positive_ctxs", "hard_negative_ctxs", "negative_ctxs")]
    id_key = "passage_id" if any("passage_id" in passage for group in groups for passage in group) else "psg_id"
    passages = [
        Document(id=str(passage[id_key]), title=passage.get("title") or "", text=passage["text"])
        for group in groups
        for passage in group
    ]
    yield {
        "id": None,
        "question": row["question"],
        "answers": list(row["answers"]),
        "documents": _shuffled(passages, row["question"]),
        "positive_ids": [str(passage[id_key]) for passage in groups[0]],
    }


def _shuffled(passages: list[Document], seed: str) -> list[Document]:
    """
    Each passage once, in an order of chance that is the same at every call: positives that come first would tell
    which they are.
    """
    unique = list({passage["id"]: passage for passage in passages}.values())
    random.Random(seed).shuffle(unique)
    return unique


def _from_kilt(row: Row, where: str) -> Iterable[Row]:
    outputs = row["output"] or []
    pages = [str(page["wikipedia_id"]) for output in outputs for page in output.get("provenance") or []]
    yield {
        "id": row["id"],
        "question": row["input"],
        "answers": [output["answer"] for output in outputs if output.get("answer")],
        "positive_ids": _distinct(pages),
    }


def _from_plain(row: Row, where: str) -> Iterable[Row]:
    answers = row["answers"] if "answers" in row else row["answer"]
    yield {
        "id": row.get("id"),
        "question": row["question"],
        "answers": [answers] if isinstance(answers, str) else list(answers),
        "positive_ids": None,
    }


def _from_parlai(dialogue: Row, where: str) -> Iterable[Row]:
    """
    One record per turn of the wizard. What the wizard could read are the passages of the chosen topic and those
    retrieved for the apprentice's last turn and for the wizard's own before it.
    """
    topic = dialogue["chosen_topic"]
    messages: list[dict[str, str]] = []
    turns = dialogue["dialog"]
    for position, turn in enumerate(turns):
        if not turn["speaker"].endswith("Wizard"):
            messages.append({"role": "user", "content": turn["text"]})
            continue
        if not messages:
            # The wizard opens: all that was said so far is what to talk about.
            messages.append({"role": "user", "content": topic})
        offered = {topic: dialogue["chosen_topic_passage"]}
        for before in reversed(turns[max(0, position - 2) : position]):
            for passage in before.get("retrieved_passages") or []:
                offered.update({title: text for title, text in passage.items() if title not in offered})
        said = set((turn.get("checked_sentence") or {}).values())
        yield {
            "id": f"{where.rpartition(' ')[2]}-{position}",
            "question": list(messages),
            "answers": [turn["text"]],
            "documents": [
                Document(id=title, title=title, text=_joined(sentences))
                for title, sentences in offered.items()
                if _joined(sentences)
            ],
            "positive_ids": [title for title, sentences in offered.items() if said & set(sentences)],
        }
        messages.append({"role": "assistant", "content": turn["text"]})


# Columns that only this form has, the most telling first.
FORMS: tuple[tuple[set[str], Callable[[Row, str], Iterable[Row]]], ...] = (
    ({"chosen_topic", "dialog"}, _from_parlai),
    ({"input", "output"}, _from_kilt),
    ({"query", "positive_passages", "negative_passages"}, _from_tevatron),
    ({"question", "positive_ctxs", "hard_negative_ctxs", "negative_ctxs"}, _from_dpr),
    ({"question", "paragraphs"}, _from_musique),
    ({"question", "context", "supporting_facts"}, _from_hotpotqa),
    ({"question", "golden_answers"}, _from_flashrag),
    ({"question", "answers"}, _from_plain),
    ({"question", "answer"}, _from_plain),
)


def _converter(row: Row, source: str) -> Callable[[Row, str], Iterable[Row]]:
    for columns, convert in FORMS:
        if columns <= row.keys():
            return _checked(convert, columns)
    raise DatasetError(
        f"{source}: the columns {', '.join(map(repr, row))} are those of no known form; give an official file, "
        "or rename yours to question and answers"
    )


def _checked(convert: Callable[[Row, str], Iterable[Row]], columns: set[str]) -> Callable[[Row, str], Iterable[Row]]:
    """Turns what a broken row raises into an error that says where it is."""

    def checked(row: Row, where: str) -> Iterator[Row]:
        if missing := sorted(columns - row.keys()):
            raise DatasetError(f"{where}: has no {', '.join(missing)}, unlike the first row; mend or drop the row")
        try:
            yield from convert(row, where)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, DatasetError):
                raise
            raise DatasetError(
                f"{where}: is not of the form of the first row ({first_line(error)}); mend it"
            ) from error

    return checked


def _as_dialogue(text: str) -> list[dict[str, str]]:
    """Turns on lines of their own, the last one the user's."""
    turns = [line for line in text.split("\n") if line.strip()]
    roles = ("user", "assistant")
    return [{"role": roles[(len(turns) - 1 - position) % 2], "content": turn} for position, turn in enumerate(turns)]


def _read(name: str, split: str, source: str) -> Iterator[tuple[str, Row]]:
    path = Path(source)
    if path.is_dir():
        loaded = load_from_disk(source)
        yield from dataset_rows(_split_of(loaded, split, source), source)
    elif source.removesuffix(".gz").endswith(".jsonl"):
        yield from read_jsonl(source)
    elif path.suffix == ".json":
        yield from _read_json(source)
    elif path.suffix == ".parquet":
        require_file(source)
        yield from dataset_rows(Dataset.from_parquet(source), source)
    else:
        config = CONFIGS.get(source, {})
        if config and name not in config:
            raise DatasetError(f"{source} has no {name}, only {', '.join(config)}; name another source")
        try:
            loaded = load_dataset(source, config.get(name))
        except (OSError, ValueError) as error:
            raise DatasetError(
                f"{source!r} is no file or folder here, and the Hub did not give it ({first_line(error)}); check the "
                f"name and the network, or give a local file: --source FILE, in Python "
                f'load_benchmark("{name}", "{split}", source=FILE)'
            ) from error
        yield from dataset_rows(_split_of(loaded, split, source), source)


def _read_json(path: str) -> Iterator[tuple[str, Row]]:
    require_file(path)
    try:
        with open(path, encoding="utf-8-sig") as file:
            rows = json.load(file)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # KILT and DPR give some JSON Lines files the suffix .json
            yield from read_jsonl(path)
            return
        raise DatasetError(
            f"{path}, line {error.lineno}: is not valid JSON ({error.msg}); if this is the last line, the file is cut "
            "short: copy it again"
        ) from None
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: is not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    if isinstance(rows, dict):
        rows = [rows]
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DatasetError(f"{path}, row {number}: is a {type(row).__name__}, not an object; drop it")
        yield f"{path}, row {number}", row


def _split_of(loaded: Dataset | DatasetDict, split: str, source: str) -> Dataset:
    if isinstance(loaded, Dataset):
        return loaded
    if split not in loaded:
        raise DatasetError(f"{source} has the splits {', '.join(loaded)}, not {split!r}; name one of them")
    return loaded[split]


def _read_aliases(source: str) -> dict[str | None, list[str]]:
    path = Path(source).parent / "id_aliases.json"
    if not path.is_file():
        return {}
    return {row["Q_id"]: [*row["aliases"], *row.get("demonyms", [])] for _, row in read_jsonl(path)}


def _joined(sentences: Iterable[str]) -> str:
    return " ".join(sentence.strip() for sentence in sentences if sentence.strip())


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
