# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import asyncio

import pytest

from trl_dro.data.schema import DatasetError
from trl_dro.model.prompts import PromptTooLongError
from trl_dro.server.limits import ServerLimits
from trl_dro.server.worker import Overloaded, Worker

from .serving import RECORDS, Gate, until


def run(worker, records, open_gate=None):
    """Results of requests that arrive at once."""

    async def result(record):
        never = asyncio.get_running_loop().create_future()
        return [o async for o in worker.outputs(record["question"], record["documents"], False, never)][-1]

    async def all_of_them():
        tasks = [asyncio.create_task(result(record)) for record in records]
        if open_gate is not None:
            while worker.waiting < len(records):
                await asyncio.sleep(0.01)
            open_gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    try:
        return asyncio.run(all_of_them())
    finally:
        worker.close()


def test_requests_of_several_users_go_through_the_models_together_and_are_answered_as_alone(pipe):
    sizes = []
    gate = Gate(pipe)
    records = [RECORDS[i % 6] for i in range(9)]
    outputs = run(Worker(gate, ServerLimits(max_batch=4), sizes.append), records, gate.open)
    assert sum(sizes) == 9 and sorted(sizes)[-2:] == [4, 4] and len(sizes) <= 4
    for record, output in zip(records, outputs, strict=True):
        alone = pipe(**record)
        assert output.answer == alone.answer
        assert [d.id for d in output.documents] == [d.id for d in alone.documents]
        assert [d.probability for d in output.documents] == pytest.approx([d.probability for d in alone.documents])


def test_a_batch_holds_requests_of_similar_length_and_the_first_never_waits_for_another(pipe):
    gate = Gate(pipe)
    short = {"question": "who?", "documents": [{"text": "a"}, {"text": "b"}]}
    records = [RECORDS[0], short, RECORDS[1], short, RECORDS[2]]
    blocker = {"question": "which?", "documents": [{"text": "a" * 500}, {"text": "b"}]}
    worker = Worker(gate, ServerLimits(max_batch=8))
    assert len(run(worker, [blocker, *records], gate.open)) == 6
    long, brief = (sorted(batch) for batch in gate.batches[1:])
    assert long == sorted(r["question"] for r in RECORDS[:3]) and brief == ["who?", "who?"]


def test_one_wrong_request_of_a_batch_fails_alone(pipe):
    gate = Gate(pipe)
    wrong = {"question": "who? " * 100, "documents": RECORDS[0]["documents"]}
    records = [RECORDS[0], RECORDS[1], wrong, RECORDS[2]]
    pipe_limit = Worker(gate, ServerLimits(max_batch=8))
    outputs = run(pipe_limit, records, gate.open)
    assert isinstance(outputs[2], PromptTooLongError | DatasetError)
    assert [outputs[i].answer for i in (0, 1, 3)] == [pipe(**RECORDS[i]).answer for i in (0, 1, 2)]


def test_when_memory_runs_out_batches_become_smaller(pipe):
    import torch

    class Small(Gate):
        def __call__(self, question, *arguments, **settings):
            if len(question) > 2:
                raise torch.OutOfMemoryError
            return super().__call__(question, *arguments, **settings)

    gate = Small(pipe)
    worker = Worker(gate, ServerLimits(max_batch=8))
    records = [RECORDS[i % 6] for i in range(8)]
    outputs = run(worker, records, gate.open)
    assert [output.answer for output in outputs] == [pipe(**record).answer for record in records]
    assert worker.max_batch <= 2 and worker.status == "closing"


def test_a_batch_that_never_ends_is_called_stuck(pipe):
    gate = Gate(pipe)
    worker = Worker(gate, ServerLimits(timeout=0.05))

    async def ask():
        never = asyncio.get_running_loop().create_future()
        return [o async for o in worker.outputs("who?", ["a", "b"], False, never)]

    with pytest.raises(Exception, match="no answer within"):
        asyncio.run(ask())
    until(lambda: worker.status == "stuck")
    gate.open.set()
    until(lambda: worker.status == "ok")
    worker.close()


def test_a_closed_worker_takes_nothing(pipe):
    worker = Worker(pipe, ServerLimits())
    worker.close()
    [error] = run(worker, RECORDS[:1])
    assert isinstance(error, Overloaded)
