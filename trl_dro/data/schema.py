# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""The one record type of the package, and its validation.

| column | type | meaning |
|---|---|---|
| `question` | string, or a list of `{role, content}` messages that ends with the user's | what is asked |
| `answers` | non-empty list of strings | gold answers; the first is the training target |
| `documents` | list of `{id?, title?, text, page?, score?, rank?}` | the candidates, in retrieval order; ranks and \
pages count from 1 |
| `positive_ids` | list of strings, *optional* | ids of the documents known to be relevant, retrieved or not |

Other columns (an `id`, say) are left alone.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple, NotRequired, TypedDict

from datasets import Dataset, DatasetDict, Features, LargeList, List, Value, concatenate_datasets


class DatasetError(ValueError):
    """Data that cannot be used: one line that says where, what is wrong, and how to mend it."""


class BadRow(NamedTuple):
    """A row that cannot be used: its number, from 0, its id if it has one, and why."""

    row: int
    id: Any
    reason: str


@contextmanager
def collecting(bad_rows: list[BadRow] | None, row: int, row_id: Any = None) -> Iterator[None]:
    """Adds a row whose check fails to `bad_rows` and goes on; with `None` the first such row is an error."""
    try:
        yield
    except DatasetError as error:
        if bad_rows is None:
            raise
        bad_rows.append(BadRow(row, row_id, str(error)))


class Message(TypedDict):
    """One turn of a dialogue."""

    role: str
    content: str


class Document(TypedDict):
    """One candidate document. A key that a dataset lacks for this document reads as `None`."""

    id: NotRequired[str | None]
    title: NotRequired[str | None]
    text: str
    page: NotRequired[int | None]
    score: NotRequired[float | None]
    rank: NotRequired[int | None]


class Record(TypedDict):
    """One row of a DRO dataset."""

    question: str | list[Message]
    answers: list[str]
    documents: list[Document]
    positive_ids: NotRequired[list[str] | None]


REQUIRED_COLUMNS = ("question", "answers", "documents")
ROLES = ("system", "user", "assistant")

# The names that other projects give to our columns, most likely first.
ALIASES = {
    "question": ("query", "input", "prompt"),
    "answers": ("golden_answers", "answer", "gold_answers"),
    "documents": ("ctxs", "contexts", "passages", "docs", "candidates"),
}
RETRIEVE_HINT = "retrieve them with trl_dro.retrieval.retrieve_candidates"


def validate_dataset(dataset: Dataset, num_selected: int, name: str = "train_dataset") -> None:
    """Checks that every row of a dataset is a record from which `num_selected` documents can be selected.

    Column types are checked first, so that a wrongly typed column fails at once; then the rows, in batches, so that
    memory does not grow with the dataset.

    Args:
        dataset (`Dataset`): dataset with the columns `question`, `answers`, `documents` and, optionally,
            `positive_ids`. A positive id need not be among the row's documents: the retriever may have missed it.
        num_selected (`int`): number of documents in a permutation, the fewest that a row may have.
        name (`str`, *optional*, defaults to `"train_dataset"`): what the dataset is called in error messages.

    Raises:
        `DatasetError`: the first problem found, in one line that names the dataset, the row, the column and the cure.
    """
    if isinstance(dataset, DatasetDict):
        raise DatasetError(f"{name} holds several splits ({', '.join(dataset)}); pass one, e.g. dataset['train']")
    if not isinstance(dataset, Dataset):
        raise DatasetError(
            f"{name} must be a datasets.Dataset, not {type(dataset).__name__}; "
            "build one with Dataset.from_list(list_of_records)"
        )
    if dataset.format["type"] in ("pandas", "arrow", "polars"):
        raise DatasetError(
            f"{name} has the format {dataset.format['type']!r}, in which a row is no dict; pass "
            "dataset.with_format(None)"
        )
    if len(dataset) == 0:
        raise DatasetError(f"{name} has no rows; check the file, split or filter it came from")
    require_columns(dataset, REQUIRED_COLUMNS, name)
    check_types(dataset.features, name)

    columns = [column for column in (*REQUIRED_COLUMNS, "positive_ids") if column in dataset.column_names]
    row = 0
    for batch in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        for record in batch.to_pylist():
            check_record(record, f"{name}, row {row}", num_selected)
            row += 1


def check_record(record: Mapping[str, Any], where: str, num_selected: int = 1) -> None:
    """Checks one record, given as Python values.

    Args:
        record (`Mapping`): the record.
        where (`str`): place of the record, with which an error message starts, e.g. `"train_dataset, row 3"`.
        num_selected (`int`, *optional*, defaults to `1`): the fewest documents that the record may have.

    Raises:
        `DatasetError`: a value is missing, empty or of the wrong type, an id occurs twice, or documents are too few.
    """
    check_question(record.get("question"), where)
    check_answers(record.get("answers"), where)
    check_documents(record.get("documents"), where, num_selected)
    check_positive_ids(record.get("positive_ids"), where)


def check_question(question: Any, where: str) -> None:
    """Checks the question of one record; see [`check_record`]."""
    if isinstance(question, str):
        if not question.strip():
            raise DatasetError(f"{where}, column question: is empty; write the question or drop the row")
        return
    if not isinstance(question, list) or not question:
        raise DatasetError(
            f"{where}, column question: must be a string or a non-empty list of {{role, content}} messages, not "
            f"{_show(question)}; write the question or drop the row"
        )
    for turn, message in enumerate(question):
        at = f"{where}, column question[{turn}]"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DatasetError(
                f"{at}: must be a message with the keys role and content, not {_show(message)}; rename its keys"
            )
        if message["role"] not in ROLES:
            raise DatasetError(
                f"{at}.role: must be one of {', '.join(ROLES)}, not {_show(message['role'])}; rename it"
            )
        if not isinstance(message["content"], str) or not message["content"].strip():
            raise DatasetError(
                f"{at}.content: must be a non-empty string, not {_show(message['content'])}; write it or drop the turn"
            )
    if question[-1]["role"] != "user":
        raise DatasetError(
            f"{where}, column question[{len(question) - 1}].role: the last message must come from the user, not "
            f"{_show(question[-1]['role'])}; cut the dialogue after a user turn"
        )


def check_answers(answers: Any, where: str) -> None:
    """Checks the gold answers of one record; see [`check_record`]."""
    if isinstance(answers, str):
        raise DatasetError(
            f"{where}, column answers: must be a list of strings, not the string {_show(answers)}; "
            "put the answer in a list"
        )
    if not isinstance(answers, list) or not answers:
        raise DatasetError(
            f"{where}, column answers: must be a non-empty list of strings, not {_show(answers)}; "
            "add a gold answer or drop the row"
        )
    for position, answer in enumerate(answers):
        if not isinstance(answer, str) or not answer.strip():
            raise DatasetError(
                f"{where}, column answers[{position}]: must be a non-empty string, not {_show(answer)}; "
                "remove this answer or convert it with str()"
            )


def check_positive_ids(positive_ids: Any, where: str) -> None:
    """Checks the positive ids of one record, which may be `None`; see [`check_record`]."""
    if positive_ids is None:
        return
    if not isinstance(positive_ids, list) or not all(isinstance(document_id, str) for document_id in positive_ids):
        raise DatasetError(
            f"{where}, column positive_ids: must be a list of document ids (strings), not {_show(positive_ids)}; "
            "convert the ids with str(), or remove the column"
        )


def check_documents(documents: Any, where: str, num_selected: int) -> None:
    """Checks the candidates of one record; see [`check_record`]."""
    if not isinstance(documents, list) or not documents:
        raise DatasetError(
            f"{where}, column documents: must be a non-empty list of {{id, title, text}}, not {_show(documents)}; "
            f"{RETRIEVE_HINT} or drop the row"
        )
    positions: dict[str, int] = {}
    for position, document in enumerate(documents):
        at = f"{where}, column documents[{position}]"
        if not isinstance(document, dict):
            raise DatasetError(f'{at}: must be {{id, title, text}}, not {_show(document)}; write {{"text": ...}}')
        document_id = document.get("id")
        for key in ("id", "title"):
            if not isinstance(document.get(key), str | None):
                raise DatasetError(
                    f"{at}.{key}: must be a string, not {_show(document[key])}; convert it with str() or leave it out"
                )
        if not isinstance(document.get("page"), int | None):
            raise DatasetError(
                f"{at}.page: must be a whole number, not {_show(document['page'])}; convert it or leave it out"
            )
        text = document.get("text")
        if not isinstance(text, str) or not text.strip():
            raise DatasetError(
                f"{at}.text (id {_show(document_id)}): must be a non-empty string, not {_show(text)}; "
                "fill it or drop the document"
            )
        if document_id is None:
            continue
        if document_id in positions:
            raise DatasetError(
                f"{at}.id: {_show(document_id)} is also the id of documents[{positions[document_id]}]; "
                "drop the repeated document or give it an id of its own"
            )
        positions[document_id] = position
    if len(documents) < num_selected:
        raise DatasetError(
            f"{where}, column documents: has {len(documents)} documents, fewer than num_selected={num_selected}; "
            "retrieve more documents, lower num_selected or drop the row"
        )


def build_dataset(records: Iterable[Mapping[str, Any]]) -> Dataset:
    """Builds a dataset from records, one at a time, with the same column types whatever the values.

    Types inferred from values would turn a column of `None` titles into the null type, and one Arrow array cannot
    hold the more than 2 GB of text of a large benchmark's candidates.

    Args:
        records (`Iterable[Mapping]`): records, or questions with their answers only. Of each, `id`, `question`,
            `answers`, `documents` and `positive_ids` are kept where the first record has them.

    Returns:
        `Dataset`: one row per record.

    Raises:
        `DatasetError`: there is no record, or some questions are strings and others lists of messages.
    """
    if isinstance(records, str) or not isinstance(records, Iterable):
        raise DatasetError(f"records must be dicts with a question, one per row, not {_show(records)}; pass a list")
    records = iter(records)
    chunk = list(islice(records, 1000))
    if not chunk:
        raise DatasetError("there are no records to build a dataset from; check the file or filter they come from")
    for row, record in enumerate(chunk):
        if not isinstance(record, Mapping) or "question" not in record:
            raise DatasetError(
                f"row {row}: must be a dict with a question, not {_show(record)}; write one for each row"
            )
        for position, candidate in enumerate(record.get("documents") or []):
            if not isinstance(candidate, Mapping):
                raise DatasetError(
                    f"row {row}, column documents[{position}]: must be a dict with id, title and text, not "
                    f"{_show(candidate)}; e.g. {{'id': 'a', 'title': None, 'text': …}}"
                )
    is_chat = isinstance(chunk[0]["question"], list)
    document = {"id": Value("string"), "title": Value("string"), "text": Value("string")}
    keys = {key for record in chunk for candidate in record.get("documents") or [] for key in candidate}
    document |= {"page": Value("int32")} if "page" in keys else {}
    document |= {"score": Value("float32"), "rank": Value("int32")} if "rank" in keys else {}
    features = Features(
        {
            "id": Value("string"),
            "question": List({"role": Value("string"), "content": Value("string")}) if is_chat else Value("string"),
            "answers": List(Value("string")),
            "documents": List(document),
            "positive_ids": List(Value("string")),
        }
    )
    features = Features({column: feature for column, feature in features.items() if column in chunk[0]})

    parts: list[Dataset] = []
    while chunk:
        for row, record in enumerate(chunk, start=1000 * len(parts)):
            if isinstance(record["question"], list) != is_chat:
                raise DatasetError(
                    f"row {row}, column question: is {_show(record['question'])}, but row 0 holds "
                    f"{'messages' if is_chat else 'a string'}; use one form for the whole dataset"
                )
        columns = {column: [record.get(column) for record in chunk] for column in features}
        parts.append(Dataset.from_dict(columns, features=features))
        chunk = list(islice(records, 1000))
    return concatenate_datasets(parts)


def require_columns(dataset: Dataset, columns: Iterable[str], name: str) -> None:
    """
    Raises a [`DatasetError`] when it is no dataset, or a column is missing, with the renaming that mends it where one
    is likely.
    """
    if not isinstance(dataset, Dataset):
        raise DatasetError(
            f"{name} must be a datasets.Dataset, not {type(dataset).__name__}; build one with "
            "Dataset.from_list(list_of_records)"
        )
    present = dataset.column_names
    for column in columns:
        if column not in present:
            alias = next((alias for alias in ALIASES[column] if alias in present), None)
            if alias is not None:
                cure = f'rename it: dataset.rename_column("{alias}", "{column}")'
            elif column == "documents":
                cure = RETRIEVE_HINT
            else:
                cure = "add it or rename yours with dataset.rename_column"
            raise DatasetError(f"{name} has no column {column}, only {', '.join(map(repr, present))}; {cure}")


def check_types(features: Features, name: str) -> None:
    """Checks the types of a dataset's columns, see [`validate_dataset`], without looking at a row."""
    question, answers, documents = (features[column] for column in REQUIRED_COLUMNS)
    if not (_is_text(question) or _is_list_of_structs(question, required={"role", "content"})):
        raise DatasetError(
            f"{name}, column question: must hold a string or a list of {{role, content}} messages in every row, but "
            f"its type is {_show(question)}; convert it with dataset.map"
        )
    if not _is_list_of_text(answers):
        cure = "[row['answers']]" if isinstance(answers, Value) and _is_text(answers) else "[str(a) for a in ...]"
        raise DatasetError(
            f"{name}, column answers: must hold a list of strings in every row, but its type is {_show(answers)}; "
            f"convert it with dataset.map(lambda row: {{'answers': {cure}}})"
        )
    if not _is_list_of_structs(documents, required={"text"}, optional={"id", "title"}):
        raise DatasetError(
            f"{name}, column documents: must hold a list of {{id, title, text}} (all strings) in every row, but its "
            f"type is {_show(documents)}; convert it with dataset.map(lambda row: {{'documents': "
            "[{'id': ..., 'title': ..., 'text': ...}, ...]})"
        )
    if "positive_ids" in features and not _is_list_of_text(features["positive_ids"]):
        raise DatasetError(
            f"{name}, column positive_ids: must hold a list of strings in every row, but its type is "
            f"{_show(features['positive_ids'])}; convert the ids with str(), or remove the column"
        )


# The null type is that of a column or list without any value: the rows are then checked, which names the first one.


def _is_null(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype == "null"


def _is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view", "null")


def _is_list_of_text(feature: Any) -> bool:
    return _is_null(feature) or (isinstance(feature, List | LargeList) and _is_text(feature.feature))


def _is_list_of_structs(feature: Any, required: set[str], optional: frozenset[str] | set[str] = frozenset()) -> bool:
    if _is_null(feature):
        return True
    if not isinstance(feature, List | LargeList):
        return False
    struct = feature.feature
    if not isinstance(struct, dict):
        return _is_null(struct)
    return required <= struct.keys() and all(_is_text(struct[key]) for key in struct if key in required | optional)


def _show(value: Any) -> str:
    """A value for a one-line message: `repr` has no line breaks, and long ones are cut."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
