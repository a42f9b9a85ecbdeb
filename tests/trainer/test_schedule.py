# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from accelerate import skip_first_batches

from trl_dro.trainer.schedule import EstimationDataLoader, EstimationSampler, QuestionBatch


def micro_batches(num_questions, batch_size, epoch=0, **kwargs):
    sampler = EstimationSampler(num_questions, batch_size, **kwargs)
    sampler.set_epoch(epoch)
    steps = [micro_batch for [micro_batch] in sampler]
    assert len(steps) == len(sampler)
    return steps


def visited(steps):
    """Rows of every step that are counted, in order."""
    shares = [step.block[step.position] for step in steps if step.block]
    return [row for share in shares for row, counted in zip(share.rows, share.counted, strict=True) if counted]


SCHEDULES = [(1, 1), (2, 1), (3, 2), (-1, 1), (-1, 3), (100, 2)]


@pytest.mark.parametrize("steps_per_estimation, maximization_epochs", SCHEDULES)
def test_every_question_comes_once_per_epoch_and_visit(steps_per_estimation, maximization_epochs):
    steps = micro_batches(
        11, 2, steps_per_estimation=steps_per_estimation, maximization_epochs=maximization_epochs, seed=3
    )
    assert sorted(visited(steps)) == sorted(list(range(11)) * maximization_epochs)
    # A visit goes through the whole block before the next one begins.
    for index in {step.block_index for step in steps}:
        positions = [step.position for step in steps if step.block_index == index]
        block = next(step.block for step in steps if step.block_index == index)
        assert positions == list(range(len(block))) * maximization_epochs


@pytest.mark.parametrize("steps_per_estimation, sizes", [(1, [1] * 6), (4, [4, 2]), (6, [6]), (100, [6]), (-1, [6])])
def test_blocks_cut_the_epoch_and_count_on_over_epochs(steps_per_estimation, sizes):
    first, second = (micro_batches(11, 2, steps_per_estimation=steps_per_estimation, epoch=epoch) for epoch in (0, 1))
    blocks = {step.block_index: len(step.block) for step in first}
    assert list(blocks.values()) == sizes and list(blocks) == list(range(len(sizes)))
    assert {step.block_index for step in second} == {len(sizes) + index for index in blocks}


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("num_questions", [1, 11, 13, 24])
def test_processes_together_have_the_batch_of_one(num_questions, world_size):
    alone = micro_batches(num_questions, 12, seed=5)
    ranks = [
        micro_batches(num_questions, 12 // world_size, seed=5, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for whole, *parts in zip(alone, *ranks, strict=True):
        shares = [part.block[part.position] for part in parts]
        assert len({len(share.rows) for share in shares}) == 1  # no process waits for another's forward
        together = [row for share in shares for row, counted in zip(share.rows, share.counted, strict=True) if counted]
        assert sorted(together) == sorted(whole.block[whole.position].rows)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_questions", [1, 10, 12, 13])
def test_losses_averaged_over_processes_equal_the_mean_over_questions(num_questions, world_size):
    losses = torch.rand(num_questions, dtype=torch.float64)
    ranks = [
        micro_batches(num_questions, 12 // world_size, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    alone = micro_batches(num_questions, 12)
    for whole, *parts in zip(alone, *ranks, strict=True):
        per_process = [
            sum(losses[row] for row, counted in zip(share.rows, share.counted, strict=True) if counted)
            / part.update_size
            for part, share in ((part, part.block[part.position]) for part in parts)
        ]
        expected = losses[whole.block[whole.position].rows].mean()
        assert sum(per_process).item() / world_size == pytest.approx(expected.item())


def test_an_incomplete_last_batch_is_kept_or_dropped_as_asked():
    assert len(visited(micro_batches(11, 4))) == 11
    assert len(visited(micro_batches(11, 4, drop_last=True))) == 8
    with pytest.raises(ValueError, match="3 questions do not fill one batch of 4: lower per_device_train_batch_size"):
        EstimationSampler(3, 4, drop_last=True)


def test_order_is_that_of_seed_and_epoch():
    def order(**kwargs):
        return visited(micro_batches(20, 3, **kwargs))

    assert order(seed=1, epoch=2) == order(seed=1, epoch=2)
    assert order(seed=1, epoch=2) != order(seed=1, epoch=3)
    assert order(seed=1, epoch=2) != order(seed=4, epoch=2)
    assert order(seed=1, epoch=2) != list(range(20))


def test_order_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    micro_batches(20, 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_resumed_loader_goes_on_where_the_epoch_stopped():
    def loader():
        return EstimationDataLoader(EstimationSampler(11, 2, steps_per_estimation=2, maximization_epochs=2, seed=7))

    whole = loader()
    whole.set_epoch(3)
    expected = list(whole)
    assert len(expected) == len(whole) == 12

    resumed = skip_first_batches(loader(), 5)
    # transformers' Trainer reaches the sampler of a skipping loader in this way.
    resumed.batch_sampler.batch_sampler.set_epoch(3)
    assert list(resumed) == expected[5:]


def test_loader_counts_questions_for_the_trainers_speed_metrics():
    assert len(EstimationDataLoader(EstimationSampler(11, 2)).dataset) == 11


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("maximization_epochs", [1, 2])
def test_every_question_of_an_update_weighs_the_same_however_the_update_is_cut(world_size, maximization_epochs):
    # 5 questions, 4 at a time: a micro-batch of 4 and one of 1 make an update.
    losses = torch.rand(5, dtype=torch.float64)
    ranks = [
        micro_batches(
            5,
            4 // world_size,
            gradient_accumulation_steps=2,
            maximization_epochs=maximization_epochs,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    updates = len(ranks[0]) // 2
    assert updates == maximization_epochs
    for update in range(updates):
        total = sum(
            losses[row] / step.update_size / world_size
            for steps in ranks
            for step in steps[2 * update : 2 * update + 2]
            for row in visited([step])
        )
        assert total.item() == pytest.approx(losses.mean().item())


def test_a_second_visit_to_a_block_begins_with_a_new_update():
    # As drawn in the module's docstring.
    steps = micro_batches(6, 2, steps_per_estimation=2, maximization_epochs=2, gradient_accumulation_steps=2)
    drawn = [(step.block_index, step.position if step.block else "-") for step in steps]
    assert drawn == [(0, 0), (0, 1), (0, 0), (0, 1), (1, "-"), (1, 0), (1, "-"), (1, 0)]
    assert [step.update_size for step in steps] == [4, 4, 4, 4, 2, 2, 2, 2]


def test_blocks_visited_twice_are_rounded_up_to_whole_updates_and_others_are_not():
    for visits, sizes in ((1, [1] * 4), (2, [2, 2])):
        steps = micro_batches(8, 2, maximization_epochs=visits, gradient_accumulation_steps=2)
        assert list({step.block_index: len(step.block) for step in steps}.values()) == sizes


def test_parts_of_a_batch_have_its_questions():
    batch = QuestionBatch([5, 6, 7], [True, True, False])
    assert batch.split([[2, 0], [1]]) == [QuestionBatch([7, 5], [False, True]), QuestionBatch([6], [True])]
