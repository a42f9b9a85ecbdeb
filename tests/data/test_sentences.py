# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import random

import pytest

from trl_dro.data.sentences import split_sentences


@pytest.mark.parametrize(
    "sentences",
    [
        ["Bees make honey.", "Wasps do not!", "Do they?", "No."],
        ["Dr. J. Doe and Mrs. A. B. Roe wrote it, e.g. in fig. 3.", "He did not."],
        ['She said "No."', "(He did not hear it.)", "Then she left."],
        ["It costs 3.50 EUR.", "Version 2.0 of 1999 is free."],
        ["1. Buy bread.", "2. Eat it."],
        ["The min. price is 5 ct. a piece.", "It is low."],
        ["Die Straße ist z.B. lang.", "Ähnlich ist die zweite."],
        ["蜜蜂酿蜜。", "黄蜂不酿！"],
        ["水車は1921年に建てられた。", "誰が建てたのか？", "今も動いている！"],
        ["彼は「はい。」と答えた。", "彼女は黙っていた。"],  # what is quoted ends, and the sentence does not
        ["他说：“我明天来。”", "“真的吗？”", "没有人回答。"],
    ],
)
def test_sentences_end_where_a_reader_ends_them(sentences):
    assert split_sentences(" ".join(sentences)) == sentences
    assert split_sentences("\n".join(sentences)) == sentences


def test_an_empty_line_ends_a_heading():
    assert split_sentences("Of bees\n \nBees make\nhoney.\n\n") == ["Of bees", "Bees make\nhoney."]


def test_no_word_is_lost_or_added():
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choices(["a", "B", "é", ".", "!", "?", '"', ")", " ", "\n", "。", "1", "Dr"], k=60))
        assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())
