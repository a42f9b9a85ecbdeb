# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import random

import pytest

from trl_dro.data.words import count_words, cut_words, join_texts, shingles, split_words


JAPANESE = "国立研究開発法人海洋研究開発機構は、神奈川県横須賀市に本部を置く。"
CHINESE = "长江发源于青藏高原，全长6300公里，是亚洲最长的河流。"
THAI = "กรุงเทพมหานคร เป็นเมืองหลวงของประเทศไทย"


@pytest.mark.parametrize(
    "text, words",
    [
        ("The mill (of 1921) wasn't built by A. Stone — or was it?", 13),
        ("", 0),
        (JAPANESE, 16),
        (CHINESE, 12),  # of which one is the number
        (THAI, 18),  # vowels and tones above and below letters are no characters of their own
        ("東京タワー", 3),  # with its mark of length
        ("「東京」（大阪）", 2),  # punctuation is none
        ("서울은 대한민국의 수도이다.", 3),  # Korean has spaces
        ("Tokio (東京) ist groß.", 4),
    ],
)
def test_words_are_counted_with_spaces_and_without(text, words):
    assert count_words(text) == words


@pytest.mark.parametrize("text", [JAPANESE, CHINESE, THAI, "one two  three\nfour five six seven"])
@pytest.mark.parametrize("most", [1, 3, 100])
def test_a_cut_text_has_no_more_words_than_asked_for_and_loses_none(text, most):
    pieces = list(cut_words(text, most))
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert [count_words(piece) for piece in pieces[:-1]] == [most] * (len(pieces) - 1)
    assert 0 < count_words(pieces[-1]) <= most


def test_words_of_spaced_scripts_are_those_between_white_space():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices(["a", "é", "б", "한", "1", ".", "“", "—", "(", ")", " ", "\n", "\u3000"], k=40))
        assert split_words(text) == text.split()
        assert count_words(text) == len(text.split())
        assert list(cut_words(text, 5)) == [" ".join(text.split()[i : i + 5]) for i in range(0, len(text.split()), 5)]


def test_sentences_are_joined_as_their_script_joins_them():
    assert (
        join_texts(["水車がある。", "「古い。」", "Ada built it.", "速い。"])
        == "水車がある。「古い。」 Ada built it. 速い。"
    )
    assert join_texts(["One.", "Two."]) == "One. Two."
    assert join_texts([]) == ""


def test_texts_of_scripts_without_spaces_are_compared_by_neighbours():
    assert shingles("who built 東京駅 in 明") == ["who", "built", "東京", "京駅", "in", "明"]
