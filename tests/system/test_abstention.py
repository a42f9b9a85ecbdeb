# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import math
from dataclasses import replace

import pytest
import torch

from trl_dro import LoadOptions, RAGPipeline
from trl_dro.model.prompts import answer_ids
from trl_dro.system.abstention import answer_logps
from trl_dro.system.rag_config import RAGConfig

from ..test_faults import make_trainer
from ..trainer.test_dro_trainer import make_dataset


RECORDS = make_dataset(4, num_documents=4).to_list()
RECORDS[1]["documents"] = RECORDS[1]["documents"][:1]  # fewer than are selected
QUESTIONS = [record["question"] for record in RECORDS]
DOCUMENTS = [record["documents"] for record in RECORDS]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    make_trainer(folder, max_answer_length=6).save_model()
    return RAGPipeline.from_pretrained(folder, options=LoadOptions(device="cpu"), min_gain=0.0)


def logp(rag, record, answer, places):
    """By a forward over one prompt and its answer."""
    prompt = rag.prompts["generator"](record["question"], [record["documents"][place - 1] for place in places])
    target = answer_ids(rag.tokenizers["generator"], answer)
    with torch.no_grad():
        logits = rag.roles.forward("generator", input_ids=torch.tensor([prompt + target])).logits[0]
    logps = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return logps.gather(-1, torch.tensor(target)[:, None]).sum().item()


def test_gain_is_the_likelihood_with_documents_less_that_without(pipe):
    for record, output in zip(RECORDS, pipe(QUESTIONS, documents=DOCUMENTS, batch_size=3), strict=True):
        places = [document.position for document in output.documents]
        rag = pipe._rag_for(record)
        expected = logp(rag, record, output.answer, places) - logp(rag, record, output.answer, [])
        assert output.gain == pytest.approx(expected, abs=1e-3) and output.gain != 0


def test_answers_of_less_gain_are_marked_and_nothing_else_changes(pipe):
    judged = pipe(QUESTIONS, documents=DOCUMENTS)
    least = sorted(output.gain for output in judged)[2]
    strict = RAGPipeline(pipe.rag, replace(pipe.config, min_gain=least))(QUESTIONS, documents=DOCUMENTS)
    assert [output.abstained for output in strict] == [output.gain < least for output in judged]
    assert sum(output.abstained for output in strict) == 2
    plain = RAGPipeline(pipe.rag, replace(pipe.config, min_gain=None))(QUESTIONS, documents=DOCUMENTS)
    assert [replace(output, gain=None, abstained=False) for output in strict] == plain


def test_no_document_is_no_gain(pipe):
    none = torch.zeros(4, 2, dtype=torch.long)
    assert [each.gain for each in answer_logps(pipe.rag, RECORDS, ["Anna"] * 4, none)] == [0.0] * 4


@pytest.mark.parametrize("value", ["high", True, math.nan, math.inf])
def test_a_least_gain_that_is_no_number_is_refused(value):
    with pytest.raises(ValueError, match="here: min_gain must be a finite number or null"):
        RAGConfig(min_gain=value).check("here")
    RAGConfig(min_gain=-1).check("here")
