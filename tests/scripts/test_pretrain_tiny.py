# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from trl_dro.demo.tiny import TINY_MODEL
from trl_dro.demo.world import draw_world


@pytest.fixture
def skills(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "scripts")
    import pretrain_tiny

    skills = pretrain_tiny.Skills(AutoTokenizer.from_pretrained(TINY_MODEL), seed=0)
    skills.hardness = 1.0
    return skills


@pytest.mark.parametrize("practises_chains", [False, True])
def test_no_question_can_be_answered_by_copying_the_answer_to_another(skills, practises_chains):
    skills.practises_chains = practises_chains
    for n in [1, 3, 6, 20] * 25:
        _, questions = skills.passages(n)
        asked = [(tuple(question.passages)) for question in questions]
        assert len(asked) == len(set(asked)) > 0


def test_the_second_hop_is_about_whom_the_first_passage_names(skills):
    skills.practises_chains = True
    found = 0
    for _ in range(50):
        passages, questions = skills.passages(6)
        for question in questions:
            if question.skill in ("2 hops", "follow"):
                first, second = (passages[i] for i in question.passages)
                assert second[0] in first[1] and second[0] not in second[1] and second[0] not in question.text
                assert first[0] in question.text or question.skill == "follow"
                assert question.answer in second[1]
                found += 1
    assert found > 50


def test_tokens_that_count_are_the_ones_asked_for(skills):
    """An answer's span holds the ids of the passages, or the id and the answer; pointers stand before ids."""
    ids = set(skills.id_token.values())
    for n in [2, 5, 20] * 10:
        row = skills.selecting(n)
        assert len(row.tokens) == len(row.weights)
        for skill, start, _ in row.answers:
            assert row.tokens[start] in ids, skill
        assert all(pointer in ids for _, pointer in row.pointers)
        assert {row.tokens[position + 1] for position, _ in row.pointers} <= ids
        [(skill, start, end)] = skills.reading(min(n, 5)).answers
        assert skill.startswith("Reply") and end > start


def test_its_names_are_not_the_worlds(skills):
    names = {entity.name for entities in skills.entities.values() for entity in entities}
    names |= {skills.namesake(skills.entity()).name for _ in range(2000)}
    for split in ("train", "eval"):
        world = draw_world(0, split)
        titles = {passage["title"] for passage in world.corpus}
        answers = {answer for question in world.single_hop for answer in question["answers"]}
        assert not names & (titles | answers)
