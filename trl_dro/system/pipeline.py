# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""A question and its candidate documents in, the selected documents and an answer out."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self, overload

import torch
from transformers import TextIteratorStreamer

from ..data.schema import DatasetError, Document, check_documents, check_question
from ..model.control_tokens import end_token_id
from ..model.prompts import Question, question_text
from ..model.rag_model import RAGModel
from ..model.roles import Role, note_role
from ..retrieval import Retriever
from .abstention import answer_logps
from .citations import Citation, cite
from .mixture import answer_questions
from .rag_config import RAGConfig
from .run_folder import LoadOptions, RoleSource, export_merged, find_system, load_rag, with_num_selected
from .selection import SelectedDocument, selected_documents


@dataclass
class RAGOutput:
    """
    An answered question.

    Args:
        answer (`str`):
            Greedy answer or, with `config.answer_permutations`, that with the greatest sum over permutations.
        documents (`list[SelectedDocument]`):
            Selected documents in the selector's order, which is the order that the generator reads; none if it was
            allowed to select none and the answer is the generator's own. Of a sum, those that give the most to it.
        logp (`float`):
            Log-probability in nats that these documents are selected and the answer is given from them, or its sum;
            while the answer is being written, of the selection alone.
        citations (`list[Citation]`):
            What the answer rests on among the documents, see [`~citations.cite`]; none while it is being written.
        gain (`float`, *optional*):
            Nats by which the documents make the answer likelier, see [`~abstention.AnswerLogps`]; computed if
            `config.min_gain` is set.
        abstained (`bool`):
            Whether that is less than `config.min_gain`: the documents do not support the answer.
    """

    answer: str
    documents: list[SelectedDocument]
    logp: float = 0.0
    citations: list[Citation] = field(default_factory=list)
    gain: float | None = None
    abstained: bool = False


# Sees a question's place and its output so far, or `None` while nothing of it is certain; returns whether to leave it.
Watch = Callable[[int, RAGOutput | None], bool]


class RAGStream(NamedTuple):
    """Selected documents, and an iterator over the pieces of the answer while it is written."""

    documents: list[SelectedDocument]
    pieces: Iterator[str]


class RAGPipeline:
    """
    Selector and generator of a trained system, ready to answer. Several threads may share one pipeline: they take
    turns.

    Args:
        rag ([`~rag_model.RAGModel`]):
            Both roles, in evaluation mode.
        config ([`~rag_config.RAGConfig`]):
            Prompts and sizes.
        retriever (`Retriever`, *optional*):
            Object with `search(queries, k)` that finds the candidates of questions asked without documents.
        sources (`dict[str, RoleSource]`, *optional*):
            Where each role was loaded from, for [`~RAGPipeline.export_merged`].
        options ([`~run_folder.LoadOptions`], *optional*):
            How it was loaded.

    Example:

    ```python
    from trl_dro import RAGPipeline

    pipe = RAGPipeline.from_pretrained("llama3-dro")  # a run folder or a Hub repo
    output = pipe("who wrote the origin of species", documents=[{"id": "7", "title": "…", "text": "…"}])
    output.answer, [(document.id, document.probability) for document in output.documents]
    ```
    """

    def __init__(
        self,
        rag: RAGModel,
        config: RAGConfig,
        retriever: Retriever | None = None,
        sources: dict[Role, RoleSource] | None = None,
        options: LoadOptions | None = None,
    ):
        self.rag = rag
        self.config = config
        self.retriever = retriever
        self.sources = sources
        self.options = options
        self._by_num_selected = {config.num_selected: rag}
        # Roles switch adapters of one model, which is a state that threads would share.
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        selector: str | Path | None = None,
        retriever: Retriever | None = None,
        revision: str | None = None,
        base_model: str | None = None,
        options: LoadOptions | None = None,
        **config: Any,
    ) -> Self:
        """
        Loads a system from where training left it. If both roles share their base it is loaded once.

        Args:
            path (`str` or `Path`):
                Run folder, checkpoint or Hub repo with `selector/` and `generator/`; or the generator alone.
            selector (`str` or `Path`, *optional*):
                Selector, if it is elsewhere: a folder or repo of a run, an adapter or a model.
            retriever (`Retriever`, *optional*):
                Finds the candidates of questions asked without documents.
            revision (`str`, *optional*):
                Branch, tag or commit of the Hub repo `path`.
            base_model (`str`, *optional*):
                Base of the adapters, instead of the one they name.
            options ([`~run_folder.LoadOptions`], *optional*):
                Precision, device, quantization, token.
            config:
                Fields of [`~rag_config.RAGConfig`] to change.

        Returns:
            [`RAGPipeline`]

        Raises:
            `ValueError`: there is no such folder, repo or revision, it holds no model, or its base is unknown.
        """
        options = options or LoadOptions()
        sources, rag_config = find_system(path, selector, revision, base_model, options, **config)
        rag = load_rag(sources["selector"], sources["generator"], rag_config, options)
        return cls(rag, rag_config, retriever, sources, options)

    @overload
    def __call__(
        self,
        question: str,
        documents: Sequence[Document | str] | None = ...,
        retriever: Retriever | None = ...,
        batch_size: int = ...,
        watch: Watch | None = ...,
    ) -> RAGOutput: ...

    @overload
    def __call__(
        self,
        question: Sequence[Any],
        documents: Sequence[Any] | None = ...,
        retriever: Retriever | None = ...,
        batch_size: int = ...,
        watch: Watch | None = ...,
    ) -> Any: ...

    def __call__(self, question, documents=None, retriever=None, batch_size=8, watch=None):
        """
        Selects documents and answers from them.

        Args:
            question (`str`, `list[dict]`, or a sequence of either):
                A question, a dialogue (`{role, content}` messages that end with the user's), or several of them.
            documents (`list[dict]` or `list[str]`, or one such list per question, *optional*):
                Candidates in retrieval order, with `text` and optionally `id` and `title`. The first
                `config.max_candidates` are looked at. Among several lists, `None` stands for what the retriever finds.
            retriever (`Retriever`, *optional*):
                Finds the candidates where no documents are given; by default the pipeline's own.
            batch_size (`int`, *optional*, defaults to `8`):
                Questions per forward.
            watch (`Callable`, *optional*):
                Called with a question's place and its [`RAGOutput`] so far, when its documents are selected and after
                every token of its answer; where it returns `True`, that question is left unfinished. With several
                `config.answer_permutations` it is called with `None`, as no documents are selected before the end.

        Returns:
            [`RAGOutput`], or a list of them for several questions.

        Raises:
            `DatasetError`: a question or a document is malformed, or there are no documents.
            [`~prompts.PromptTooLongError`]: a question is too long however short its documents are cut.
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number from 1, not {batch_size!r}: raise it")
        # A column of a dataset is a sequence, but no list.
        several = isinstance(question, Sequence) and not isinstance(question, str) and not _is_dialogue(question)
        questions = list(question) if several else [question]
        candidates = documents if several or documents is None else [documents]
        records = self._records(questions, candidates, retriever or self.retriever)
        outputs: list[RAGOutput] = []
        for start in range(0, len(records), batch_size):
            seen = None if watch is None else partial(_watch_from, watch, start)
            with self._lock:
                batch = records[start : start + batch_size]
                outputs += self._judged(batch, self._answer(batch, seen))
        for record, output in zip(records, outputs, strict=True):
            output.citations = cite(record["question"], output.answer, output.documents)
        return outputs if several else outputs[0]

    def select(
        self,
        questions: Sequence[Question],
        documents: Sequence[Sequence[Document | str]],
        batch_size: int = 8,
    ) -> list[list[SelectedDocument]]:
        """
        Selects documents without answering; see [`~RAGPipeline.__call__`] for arguments and errors.

        Returns:
            `list[list[SelectedDocument]]`: one selection per question, best first.
        """
        records = self._records(questions, documents, None)
        selections: list[list[SelectedDocument]] = []
        for start in range(0, len(records), batch_size):
            with self._lock:
                outputs = self._select(records[start : start + batch_size])
            selections += [output.documents for output in outputs]
        return selections

    def stream(
        self,
        question: Question,
        documents: Sequence[Document | str] | None = None,
        retriever: Retriever | None = None,
    ) -> RAGStream:
        """
        Selects documents, then answers piece by piece; see [`~RAGPipeline.__call__`] for arguments and errors. Other
        threads wait until the pieces are read to the end or the iterator is closed.

        Returns:
            [`RAGStream`]: joined and stripped, the pieces are the answer of [`~RAGPipeline.__call__`]. With several
            `config.answer_permutations` there is one piece, as no answer has won before the end.
        """
        records = self._records([question], None if documents is None else [documents], retriever or self.retriever)
        with self._lock:
            if self.config.answer_permutations > 1:
                [output] = self._answer(records)
                return RAGStream(output.documents, iter([output.answer]))
            [output] = self._select(records)
        return RAGStream(output.documents, self._pieces(records[0], output.documents))

    def export_merged(self, role: Role, folder: str | Path) -> None:
        """
        Writes one role as a plain model folder, its adapter merged into a fresh copy of its base, for vLLM, TGI,
        llama.cpp and others. See [`~run_folder.export_merged`] for arguments.

        Raises:
            `ValueError`: the pipeline was not loaded by [`~RAGPipeline.from_pretrained`], or the folder has files.
        """
        if self.sources is None:
            raise ValueError(
                "this pipeline was not loaded by from_pretrained, so its weights are not on disk: save it"
            )
        export_merged(self.sources[role], folder, LoadOptions(token=(self.options or LoadOptions()).token))
        note_role(folder, role)
        self.config.save(folder)  # as it is asked here, which may differ from how it was trained

    def _records(
        self, questions: Sequence[Any], documents: Sequence[Any] | None, retriever: Retriever | None
    ) -> list[dict[str, Any]]:
        """Checked questions with their candidates."""
        for i, question in enumerate(questions):
            check_question(question, f"question {i}")
        documents = [None] * len(questions) if documents is None else list(documents)
        for i, candidates in enumerate(documents):
            if candidates is not None and (isinstance(candidates, str) or not isinstance(candidates, Sequence)):
                raise DatasetError(
                    f"documents of question {i} must be a list, not {str(candidates)[:60]!r}: pass one list of "
                    "documents for each question"
                )
        if missing := [i for i, candidates in enumerate(documents) if candidates is None and i < len(questions)]:
            if retriever is None:
                raise DatasetError("there are no documents to answer from: pass documents=… or retriever=…")
            queries = [question_text(questions[i]) for i in missing]
            for i, found in zip(missing, retriever.search(queries, self.config.max_candidates), strict=True):
                documents[i] = found
        if len(documents) != len(questions):
            raise DatasetError(
                f"{len(questions)} questions have {len(documents)} lists of documents: pass one list for each"
            )
        records = []
        for i, (question, candidates) in enumerate(zip(questions, documents, strict=True)):
            candidates = [{"text": each} if isinstance(each, str) else each for each in candidates]
            candidates = candidates[: self.config.max_candidates]
            check_documents(candidates, f"question {i}", num_selected=1)
            records.append({"question": question, "documents": candidates})
        return records

    def _rag_for(self, record: dict[str, Any]) -> RAGModel:
        """The models, asked for no more documents than the question has."""
        num_selected = min(self.config.num_selected, len(record["documents"]))
        if num_selected not in self._by_num_selected:
            self._by_num_selected[num_selected] = with_num_selected(self.rag, self.config, num_selected)
        return self._by_num_selected[num_selected]

    def _groups(self, records: list[dict[str, Any]]) -> list[tuple[RAGModel, list[int]]]:
        """Rows by how many documents can be selected for them."""
        groups: dict[int, tuple[RAGModel, list[int]]] = {}
        for row, record in enumerate(records):
            rag = self._rag_for(record)
            groups.setdefault(rag.codec.num_selected, (rag, []))[1].append(row)
        return list(groups.values())

    def _select(self, records: list[dict[str, Any]]) -> list[RAGOutput]:
        """Outputs without answers, and the log-probabilities of their selections."""
        outputs = [RAGOutput("", [])] * len(records)
        for rag, rows in self._groups(records):
            group = [records[row] for row in rows]
            with torch.no_grad():
                read = rag.read(group)  # once, to select and to tell with what probability
            samples = rag.sample(group, 1, greedy=True, read=read)
            selections = selected_documents(rag, group, samples.permutations[:, 0].tolist(), read)
            for row, selection, logp in zip(rows, selections, samples.logps[:, 0].tolist(), strict=True):
                outputs[row] = RAGOutput("", selection, logp)
        return outputs

    def _answer(self, records: list[dict[str, Any]], watch: Watch | None = None) -> list[RAGOutput]:
        if self.config.answer_permutations > 1:
            return self._answer_by_sum(records, watch)
        outputs = self._select(records)
        left = set() if watch is None else {row for row, output in enumerate(outputs) if watch(row, output)}
        for rag, group in self._groups(records):
            rows = [row for row in group if row not in left]
            if not rows:
                continue
            places = [[document.position for document in outputs[row].documents] for row in rows]
            permutations = torch.tensor([rag.codec.padded(each) for each in places])
            seen = None if watch is None else partial(_watch_answers, watch, rows, outputs)
            length = self.config.max_answer_length
            answers = rag.write_answers([records[row] for row in rows], permutations, length, watch=seen)
            for row, answer in zip(rows, answers, strict=True):
                logp = outputs[row].logp + answer.logp
                outputs[row] = RAGOutput(answer.text, outputs[row].documents, logp)
        return outputs

    def _answer_by_sum(self, records: list[dict[str, Any]], watch: Watch | None) -> list[RAGOutput]:
        outputs = [RAGOutput("", [])] * len(records)
        left = set() if watch is None else {row for row in range(len(records)) if watch(row, None)}
        for rag, group in self._groups(records):
            rows = [row for row in group if row not in left]
            if not rows:
                continue
            asked = [records[row] for row in rows]
            with torch.no_grad():
                read = rag.read(asked)
            seen = None if watch is None else partial(_watch_places, watch, rows)
            number, length = self.config.answer_permutations, self.config.max_answer_length
            answers = answer_questions(rag, asked, number, length, read, seen)
            selections = selected_documents(rag, asked, [answer.permutation for answer in answers], read)
            for row, answer, selection in zip(rows, answers, selections, strict=True):
                outputs[row] = RAGOutput(answer.text, selection, answer.logp)
        return outputs

    def _judged(self, records: list[dict[str, Any]], outputs: list[RAGOutput]) -> list[RAGOutput]:
        """Outputs that tell whether they abstain, if they can."""
        if (least := self.config.min_gain) is None:
            return outputs
        judged = list(outputs)
        for rag, rows in self._groups(records):
            places = [[document.position for document in outputs[row].documents] for row in rows]
            permutations = torch.tensor([rag.codec.padded(each) for each in places])
            asked, answers = [records[row] for row in rows], [outputs[row].answer for row in rows]
            for row, logps in zip(rows, answer_logps(rag, asked, answers, permutations), strict=True):
                judged[row] = replace(outputs[row], gain=logps.gain, abstained=logps.gain < least)
        return judged

    def _pieces(self, record: dict[str, Any], selection: list[SelectedDocument]) -> Iterator[str]:
        rag = self._rag_for(record)
        tokenizer = rag.tokenizers["generator"]
        streamer = _Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        streamer.end_of_turn = end_token_id(tokenizer)
        permutation = torch.tensor([[document.position for document in selection]])

        def write() -> None:
            try:
                rag.write_answers([record], permutation, self.config.max_answer_length, streamer)
            except _Closed:
                pass
            except BaseException as error:
                streamer.text_queue.put(error)

        with self._lock:
            thread = threading.Thread(target=write, daemon=True)
            thread.start()
            try:
                for piece in streamer:
                    if isinstance(piece, BaseException):
                        raise piece
                    yield piece
            finally:
                streamer.closed = True
                thread.join()


def _watch_from(watch: Watch, start: int, row: int, output: RAGOutput | None) -> bool:
    """`watch` for a batch of questions of which the first is at place `start`."""
    return watch(start + row, output)


def _watch_answers(watch: Watch, rows: list[int], outputs: list[RAGOutput], i: int, answer: str) -> bool:
    """`watch` for the answers of the questions at the places `rows`."""
    return watch(rows[i], replace(outputs[rows[i]], answer=answer))


def _watch_places(watch: Watch, rows: list[int], i: int, answer: str) -> bool:
    """`watch` for questions at the places `rows`, of whose answers none has won yet."""
    return watch(rows[i], None)


class _Closed(Exception):
    """Nobody reads the answer any more."""


class _Streamer(TextIteratorStreamer):
    closed = False
    end_of_turn = -1

    def put(self, value):
        if self.closed:
            raise _Closed
        if not self.next_tokens_are_prompt:  # the end of a turn need not be declared special
            value = value[value != self.end_of_turn]
        if len(value):
            super().put(value)


def _is_dialogue(question: Sequence[Any]) -> bool:
    return bool(question) and isinstance(question[0], dict)
