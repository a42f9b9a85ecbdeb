# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import pytest

from trl_dro.data import DatasetError
from trl_dro.data.schema import BadRow
from trl_dro.model.codec import PermutationCodec
from trl_dro.system.questions import Questions, too_long
from trl_dro.system.rag_config import RAGConfig

from ..test_faults import TOKENIZER
from ..trainer.test_dro_trainer import make_dataset


DATASET = make_dataset(6)
BAD = [BadRow(1, "b", "is broken"), BadRow(4, None, "is empty")]


def test_first_rows_are_those_of_the_source_not_of_what_is_left_of_it():
    questions = Questions(DATASET.select([0, 2, 3, 5]), list(BAD), "x")
    questions.keep_first(3)
    assert questions.dataset["question"] == DATASET.select([0, 2])["question"]
    assert questions.skipped == BAD[:1]


def test_rows_that_fail_a_check_keep_their_numbers_and_ids_in_the_source():
    dataset = DATASET.add_column("id", list("abcdef")).select([0, 2, 3, 5])
    questions = Questions(dataset, list(BAD), "x")

    def check(record, where):
        if record["question"] in DATASET.select([3, 5])["question"]:
            raise DatasetError(f"{where}: is odd")

    questions.check(["question"], check)
    assert questions.dataset["id"] == ["a", "c"]
    assert questions.skipped[2:] == [BadRow(3, "d", "x, row 3: is odd"), BadRow(5, "f", "x, row 5: is odd")]
    questions.settle("skip")
    assert [row.row for row in questions.skipped] == [1, 3, 4, 5]
    with pytest.raises(DatasetError, match=r"4 of 6 rows of x cannot be asked; row 1 \(id 'b'\): is broken; or leave"):
        questions.settle("stop")


def test_if_no_row_is_left_that_is_an_error():
    with pytest.raises(DatasetError, match=r"none of the 2 rows of x can be asked; row 1 \(id 'b'\): is broken"):
        Questions(DATASET.select([]), list(BAD), "x").settle("skip")


def test_a_long_question_is_too_long_with_its_own_documents_only():
    config = RAGConfig(num_selected=2, max_candidates=4, max_answer_length=8)
    codec = PermutationCodec(TOKENIZER, 4, 2)

    def prompts(limit):
        return RAGConfig(**vars(config) | {"max_prompt_length": limit}).build_prompts(
            {"selector": TOKENIZER, "generator": TOKENIZER}, codec, {"selector": None, "generator": None}
        )

    rows = DATASET.to_list()
    rows[2]["question"] = rows[4]["question"] = "who wrote it " * 20
    rows[4]["documents"] = [{**document, "title": None, "text": "a"} for document in rows[4]["documents"]]
    dataset = DATASET.from_list(rows)
    # What the question with short documents needs, and no token more.
    limit = len(prompts(None)["selector"](rows[4]["question"], rows[4]["documents"]))
    found = too_long(dataset, prompts(limit), config)
    assert list(found) == [2] and found[2].startswith("selector: the prompt has ")
    assert too_long(dataset, prompts(None), config) == {}
