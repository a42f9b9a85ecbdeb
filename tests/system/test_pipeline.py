# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import itertools
import threading

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_dro import LoadOptions, RAGPipeline
from trl_dro.data import DatasetError
from trl_dro.model.prompts import PromptTooLongError
from trl_dro.model.roles import ROLES, RolePair
from trl_dro.retrieval import BM25Retriever
from trl_dro.system.mixture import answer_questions
from trl_dro.system.pipeline import _Streamer
from trl_dro.system.selection import choice_probabilities

from ..test_faults import make_trainer
from ..trainer.test_dro_trainer import make_dataset


RECORDS = make_dataset(6, num_documents=4).to_list()
CPU = LoadOptions(device="cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder, and what its trainer selects and answers."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(folder, max_answer_length=6)
    trainer.save_model()
    with trainer._inference():
        permutations = trainer.rag.sample(RECORDS, 1, greedy=True).permutations[:, 0]
        answers = trainer.rag.answer(RECORDS, permutations, 6)
    return folder, permutations.tolist(), answers


@pytest.fixture(scope="module")
def pipe(run):
    return RAGPipeline.from_pretrained(run[0], options=CPU)


def ask_all(pipe):
    return pipe([r["question"] for r in RECORDS], documents=[r["documents"] for r in RECORDS])


def places(output):
    return [document.position for document in output.documents]


def test_a_loaded_run_selects_and_answers_as_its_trainer_did(pipe, run):
    outputs = ask_all(pipe)
    assert [places(output) for output in outputs] == run[1]
    assert [output.answer for output in outputs] == run[2]
    assert len(set(run[2])) > 1 and len({tuple(places) for places in run[1]}) > 1
    for output, record in zip(outputs, RECORDS, strict=True):
        for document in output.documents:
            source = record["documents"][document.position - 1]
            assert (document.id, document.title, document.text) == (source["id"], source["title"], source["text"])


def test_one_question_alone_is_answered_as_in_a_batch(pipe):
    assert (
        pipe(RECORDS[0]["question"], documents=RECORDS[0]["documents"])
        == pipe([RECORDS[0]["question"]], documents=[RECORDS[0]["documents"]])[0]
    )
    alone = [pipe(record["question"], documents=record["documents"]) for record in RECORDS]
    together = pipe([r["question"] for r in RECORDS], documents=[r["documents"] for r in RECORDS], batch_size=4)
    assert [(o.answer, places(o)) for o in alone] == [(o.answer, places(o)) for o in together]


def test_probabilities_of_the_choices_multiply_to_that_of_the_permutation(pipe):
    every = [list(z) for z in itertools.permutations(range(1, 5), 2)]
    questions = RECORDS[:1] * len(every)
    probabilities = torch.tensor(choice_probabilities(pipe.rag, questions, every))
    with torch.no_grad():
        expected = pipe.rag.permutation_logps(RECORDS[:1], torch.tensor([every])).exp()[0]
    torch.testing.assert_close(probabilities.prod(dim=-1), expected.float(), atol=1e-5, rtol=1e-4)
    first = {z[0]: p for z, p in zip(every, probabilities[:, 0].tolist(), strict=True)}
    assert sum(first.values()) == pytest.approx(1, abs=1e-5)
    for i in range(1, 5):
        assert sum(p for z, p in zip(every, probabilities[:, 1].tolist(), strict=True) if z[0] == i) == pytest.approx(
            1, abs=1e-5
        )


def test_the_retrievers_prior_is_part_of_the_choices_and_of_their_probabilities(run):
    strong, mild = (RAGPipeline.from_pretrained(run[0], options=CPU, retriever_prior=prior) for prior in (1e3, 1.0))
    assert all(places(output) == [1, 2] for output in ask_all(strong))
    # Fewer documents than are selected are ranked by a model of their own.
    assert places(strong("who?", documents=RECORDS[0]["documents"][:1])) == [1]
    every = [list(z) for z in itertools.permutations(range(1, 5), 2)]
    probabilities = torch.tensor(choice_probabilities(mild.rag, RECORDS[:1] * len(every), every)).prod(dim=-1)
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    with torch.no_grad():
        expected = mild.rag.permutation_logps(RECORDS[:1], torch.tensor([every])).exp()[0]
    torch.testing.assert_close(probabilities, expected, atol=1e-5, rtol=1e-4)


def test_the_base_is_in_memory_once(pipe):
    model = pipe.rag.roles.model
    assert isinstance(model, PeftModel) and set(model.peft_config) == set(ROLES)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_documents_can_be_plain_texts(pipe):
    texts = [document["text"] for document in RECORDS[0]["documents"]]
    output = pipe("who wrote number 0?", documents=texts)
    assert [document.text for document in output.documents] == [texts[i - 1] for i in places(output)]
    assert {document.id for document in output.documents} == {None}


def test_selected_documents_keep_their_page(pipe):
    documents = [{"text": f"number {page}", "page": page} for page in (3, 5)]
    output = pipe("who wrote number 0?", documents=documents)
    assert [document.page for document in output.documents] == [2 * place + 1 for place in places(output)]


def test_fewer_documents_than_are_selected_are_all_ranked(pipe):
    outputs = pipe(["who?", "who wrote?"], documents=[RECORDS[0]["documents"][:1], RECORDS[0]["documents"]])
    assert places(outputs[0]) == [1] and outputs[0].documents[0].probability == 1.0
    assert len(outputs[1].documents) == 2


def test_no_more_candidates_are_read_than_in_training(pipe):
    documents = RECORDS[0]["documents"]
    more = [*documents, {"id": "x", "title": "number 7", "text": "one too many"}]
    assert pipe("who?", documents=more) == pipe("who?", documents=documents)


def test_a_dialogue_is_one_question(pipe):
    dialogue = [
        {"role": "user", "content": "who wrote number 1?"},
        {"role": "assistant", "content": "Anna 1"},
        {"role": "user", "content": "and number 2?"},
    ]
    assert (
        pipe(dialogue, documents=RECORDS[0]["documents"]) == pipe([dialogue], documents=[RECORDS[0]["documents"]])[0]
    )


def test_a_retriever_finds_the_candidates(run):
    corpus = [{**document, "id": f"p{i}"} for i, document in enumerate(RECORDS[0]["documents"] + [{"text": "Rome"}])]
    retriever = BM25Retriever(corpus, show_progress=False)
    own = RAGPipeline.from_pretrained(run[0], retriever=retriever, options=CPU)
    question = "who wrote number 2?"
    [candidates] = retriever.search([question], 4)
    expected = own(question, documents=candidates)
    assert own(question) == expected == own([question], retriever=retriever)[0]


def test_candidates_are_retrieved_for_the_questions_that_have_none(run):
    corpus = [{"id": d["id"], "title": d["title"], "text": d["text"]} for d in RECORDS[0]["documents"]]
    pipe = RAGPipeline.from_pretrained(run[0], retriever=BM25Retriever(corpus), options=CPU)
    own = RECORDS[1]["documents"]
    outputs = pipe([RECORDS[0]["question"]] * 2, documents=[None, own])
    assert {document.id for document in outputs[0].documents} <= {document["id"] for document in corpus}
    assert {document.id for document in outputs[1].documents} <= {document["id"] for document in own}


def test_streamed_pieces_make_the_answer(pipe, run):
    for record, answer in zip(RECORDS, run[2], strict=True):
        documents, pieces = pipe.stream(record["question"], documents=record["documents"])
        pieces = list(pieces)
        assert "".join(pieces).strip() == answer
        assert documents == pipe.select([record["question"]], [record["documents"]])[0]
    assert len(pieces) > 1


def test_a_stream_leaves_out_the_end_of_a_turn_that_is_not_declared_special(run, monkeypatch):
    pipe = RAGPipeline.from_pretrained(run[0], options=CPU)
    tokenizer = pipe.rag.tokenizers["generator"]
    question, documents = RECORDS[0]["question"], RECORDS[0]["documents"]
    written: list[int] = []
    put = _Streamer.put

    def keep(self, value):
        written.extend([] if self.next_tokens_are_prompt else value.tolist())
        put(self, value)

    with monkeypatch.context() as patch:
        patch.setattr(_Streamer, "put", keep)
        list(pipe.stream(question, documents=documents).pieces)
    end = written[3]
    assert end not in written[:3] and not set(written[:4]) & set(tokenizer.all_special_ids)
    for module in ("trl_dro.model.rag_model", "trl_dro.system.pipeline", "trl_dro.model.control_tokens"):
        monkeypatch.setattr(f"{module}.end_token_id", lambda tokenizer: end)
    answer = pipe(question, documents=documents).answer
    assert answer == tokenizer.decode(written[:3]).strip()
    assert "".join(pipe.stream(question, documents=documents).pieces).strip() == answer


def test_whoever_watches_sees_each_output_grow_and_can_leave_one_unfinished(pipe, run):
    seen = {}

    def watch(i, output):
        seen.setdefault(i, []).append(output)
        return i == 3 and len(seen[3]) == 3  # after the documents and two tokens

    questions, documents = [r["question"] for r in RECORDS], [r["documents"] for r in RECORDS]
    outputs = pipe(questions, documents=documents, batch_size=4, watch=watch)
    for i, expected in enumerate(run[2]):
        assert [output.answer for output in seen[i][:1]] == [""] and places(seen[i][0]) == run[1][i]
        assert all(later.answer.startswith(earlier.answer) for earlier, later in itertools.pairwise(seen[i]))
        assert outputs[i].answer.rstrip("\ufffd") == seen[i][-1].answer
        assert outputs[i].answer == expected if i != 3 else expected.startswith(seen[3][-1].answer)
    assert len(outputs[3].answer) < len(run[2][3])


def test_answers_by_a_sum_are_those_of_the_mixture_with_its_strongest_documents(run):
    pipe = RAGPipeline.from_pretrained(run[0], options=CPU, answer_permutations=6)
    few = {**RECORDS[5], "documents": RECORDS[5]["documents"][:1]}  # selects one document only
    records = [*RECORDS[:5], few]
    outputs = pipe([r["question"] for r in records], documents=[r["documents"] for r in records], batch_size=4)
    expected = answer_questions(pipe.rag, RECORDS[:5], 6, 6)
    assert [output.answer for output in outputs[:5]] == [answer.text for answer in expected]
    assert [places(output) for output in outputs[:5]] == [answer.permutation for answer in expected]
    assert [output.logp for output in outputs[:5]] == pytest.approx([a.logp for a in expected], abs=1e-4)
    assert any(len({text for _, text, _ in answer.written}) > 1 for answer in expected)
    assert places(outputs[5]) == [1] and outputs[5].documents[0].probability == pytest.approx(1)
    stream = pipe.stream(RECORDS[0]["question"], documents=RECORDS[0]["documents"])
    assert stream.documents == pipe(RECORDS[0]["question"], documents=RECORDS[0]["documents"]).documents
    assert list(stream.pieces) == [outputs[0].answer]


def test_whoever_watches_a_sum_sees_nothing_before_the_end_and_can_leave_it(run):
    pipe = RAGPipeline.from_pretrained(run[0], options=CPU, answer_permutations=3)
    seen = []

    def watch(i, output):
        seen.append((i, output))
        return i == 1

    outputs = pipe([r["question"] for r in RECORDS[:3]], [r["documents"] for r in RECORDS[:3]], watch=watch)
    assert {output for _, output in seen} == {None} and len(seen) > 3
    assert [i for i, _ in seen].count(1) == 1
    assert (outputs[1].answer, outputs[1].documents) == ("", []) and outputs[0].documents and outputs[2].documents


def test_the_log_probability_of_an_answer_is_that_of_its_documents_and_its_own(pipe):
    output = ask_all(pipe)[0]
    with torch.no_grad():
        selection = pipe.rag.permutation_logps(RECORDS[:1], torch.tensor([[places(output)]])).item()
    [written] = pipe.rag.write_answers(RECORDS[:1], torch.tensor([places(output)]), 6)
    assert output.logp == pytest.approx(selection + written.logp, abs=1e-4)


def test_a_question_left_at_its_documents_is_not_answered(pipe, run):
    questions, documents = [r["question"] for r in RECORDS], [r["documents"] for r in RECORDS]
    outputs = pipe(questions, documents=documents, watch=lambda i, output: i in (0, 4))
    assert [output.answer for output in outputs] == ["" if i in (0, 4) else run[2][i] for i in range(6)]


def test_an_abandoned_stream_lets_others_in(pipe):
    _, pieces = pipe.stream(RECORDS[0]["question"], documents=RECORDS[0]["documents"])
    next(pieces)
    pieces.close()
    assert pipe("who?", documents=["a text", "another"]).answer is not None


def test_an_error_while_streaming_reaches_the_reader(pipe, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("broken")

    monkeypatch.setattr(pipe.rag, "write_answers", fail)
    _, pieces = pipe.stream(RECORDS[0]["question"], documents=RECORDS[0]["documents"])
    with pytest.raises(RuntimeError, match="broken"):
        list(pieces)


def test_threads_get_the_answers_they_would_get_alone(pipe, run):
    answers = {}

    def ask(i):
        answers[i] = pipe(RECORDS[i]["question"], documents=RECORDS[i]["documents"]).answer

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(RECORDS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[i] for i in range(len(RECORDS))] == run[2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"question": " ", "documents": ["a"]}, "question 0, column question: is empty"),
        ({"question": "who?"}, "pass documents=… or retriever=…"),
        ({"question": "who?", "documents": []}, "question 0, column documents"),
        ({"question": "who?", "documents": ["a", {"title": "no text"}]}, r"documents\[1\].text"),
        ({"question": ["who?", "what?"], "documents": [["a"]]}, "2 questions have 1 lists"),
    ],
)
def test_bad_input_is_named(pipe, arguments, message):
    with pytest.raises(DatasetError, match=message) as error:
        pipe(**arguments)
    assert "\n" not in str(error.value)


def test_a_question_that_cannot_fit_is_refused(run):
    pipe = RAGPipeline.from_pretrained(run[0], options=CPU, max_prompt_length=150)
    with pytest.raises(PromptTooLongError, match="raise max_prompt_length"):
        pipe("who wrote " * 200, documents=["a", "b"])


def test_settings_can_be_changed_when_loading(run):
    pipe = RAGPipeline.from_pretrained(run[0], options=CPU, num_selected=3, max_answer_length=1)
    output = pipe("who wrote number 0?", documents=RECORDS[0]["documents"])
    assert len(output.documents) == 3 and len(pipe.rag.tokenizers["generator"](output.answer).input_ids) <= 2


def test_a_merged_role_is_a_plain_model_that_writes_the_same(pipe, run, tmp_path):
    for role in ROLES:
        pipe.export_merged(role, tmp_path / role)
        assert not list((tmp_path / role).glob("adapter*"))
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / role)
        prompt = torch.tensor([pipe.rag.prompts[role]("who?", RECORDS[0]["documents"])])
        with torch.no_grad():
            expected = pipe.rag.roles.forward(role, input_ids=prompt).logits
            torch.testing.assert_close(merged(prompt).logits, expected, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "selector")("who?").input_ids
    with pytest.raises(ValueError, match="is not empty"):
        pipe.export_merged("selector", tmp_path / "selector")

    from_merged = RAGPipeline.from_pretrained(
        tmp_path / "generator", selector=tmp_path / "selector", options=CPU, num_selected=2, max_answer_length=6
    )
    assert isinstance(from_merged.rag.roles.model, RolePair)
    outputs = ask_all(from_merged)
    assert [output.answer for output in outputs] == run[2] and [places(o) for o in outputs] == run[1]
