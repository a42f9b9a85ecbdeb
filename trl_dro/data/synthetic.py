# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""A small invented world for demos and tests: people, facts about them, and a retriever that is easily confused.

Every record is drawn afresh, so no fact holds in two records and nothing can be memorised: the answer is only in the
documents. Half of the distractors are about the right person but state another fact, the others state the asked
fact about another person, so that neither the name nor the topic alone gives the right document away.
"""

import random
from dataclasses import dataclass
from typing import Any

from datasets import Dataset


FIRST_NAMES = """
Ada Anton Birgit Boris Clara Cosmo Dmitri Dora Elena Emil Felix Frida Greta Gustav Hanna Hugo Igor Ines Jonas Julia
Karin Lars Mara Nils Olga Pavel Rosa Stefan Tilda Viktor
""".split()
LAST_NAMES = """
Abel Adler Berg Brandt Conti Costa Dahl Duval Eklund Engel Ferrari Grant Holm Ivanov Jansen Keller Lind Moreau Novak
Olsen Petrov Quist Rossi Silva Tanaka Ulrich Varga Weiss Young Zeman
""".split()
PLACES = """
Athens Basel Bergen Cairo Dublin Ghent Kyoto Lima Lyon Madrid Oslo Porto Prague Quito Riga Sofia Tunis Turin Vienna
Warsaw
""".split()
INSTRUMENTS = """
accordion banjo bassoon bugle cello clarinet cornet drums fiddle flute guitar harp oboe organ piano trombone trumpet
tuba viola zither
""".split()
SUBJECTS = """
algebra anatomy astronomy botany chemistry dance drawing geology geometry grammar history law logic medicine optics
physics poetry rhetoric surgery theology
""".split()

# The largest number of documents for which every document can state a different answer.
MAX_DOCUMENTS = 20


@dataclass(frozen=True)
class Relation:
    """One kind of fact: how to ask for it, how documents state it, and its possible answers."""

    questions: tuple[str, ...]
    statements: tuple[str, ...]
    answers: list[str]


RELATIONS = (
    Relation(
        ("Where was {name} born?", "What is the birthplace of {name}?"),
        ("{surname} was born in {answer}.", "The birthplace of {surname} is {answer}."),
        PLACES,
    ),
    Relation(
        ("Where did {name} die?", "In which city did {name} die?"),
        ("{surname} died in {answer}.", "It was in {answer} that {surname} died."),
        PLACES,
    ),
    Relation(
        ("Which instrument did {name} play?", "What did {name} play?"),
        ("{surname} played the {answer}.", "The instrument of {surname} was the {answer}."),
        INSTRUMENTS,
    ),
    Relation(
        ("Which subject did {name} study?", "What did {name} study?"),
        ("{surname} studied {answer}.", "The favourite subject of {surname} was {answer}."),
        SUBJECTS,
    ),
)


def synthetic_world(
    num_train: int, num_eval: int, num_documents: int = 5, seed: int = 0, retriever_noise: float = 4.0
) -> tuple[Dataset, Dataset]:
    """Draws a training and an evaluation set of questions with retrieved documents.

    Exactly one document of a record contains the answer. No person of the training set, named by first and last name,
    occurs in the evaluation set.

    Args:
        num_train (`int`): number of training records.
        num_eval (`int`): number of evaluation records.
        num_documents (`int`, *optional*, defaults to `5`): documents per record, from 2 to 20.
        seed (`int`, *optional*, defaults to `0`): the same seed gives the same records.
        retriever_noise (`float`, *optional*, defaults to `4.0`): standard deviation of the noise in the retriever's
            score, in units of the lead that the right document has over a distractor. `0` always ranks the right
            document first, large values rank it uniformly at random.

    Returns:
        `tuple[Dataset, Dataset]`: the training and the evaluation set, with the columns `question` (`str`), `answers`
        (`list[str]`), `documents` (`list` of `{"id", "title", "text"}`, best retrieval score first) and `positive_ids`
        (`list[str]`, ids of the documents that contain the answer).

    Raises:
        `ValueError`: `num_documents` is not between 2 and 20.

    Example:

    ```python
    >>> from trl_dro.data.synthetic import synthetic_world
    >>> train, test = synthetic_world(num_train=100, num_eval=10)
    >>> len(train[0]["documents"])
    5

    ```
    """
    if not 2 <= num_documents <= MAX_DOCUMENTS:
        raise ValueError(f"num_documents must be between 2 and {MAX_DOCUMENTS}, got {num_documents}.")
    people = [(first, last) for first in FIRST_NAMES for last in LAST_NAMES]
    rng = random.Random(seed)
    rng.shuffle(people)
    num_eval_people = len(people) // 5
    populations = {"eval": people[:num_eval_people], "train": people[num_eval_people:]}

    def draw(split: str, size: int) -> Dataset:
        return Dataset.from_list(
            [
                _draw_record(rng, populations[split], num_documents, retriever_noise, prefix=f"{split}-{index}")
                for index in range(size)
            ]
        )

    return draw("train", num_train), draw("eval", num_eval)


def _draw_record(
    rng: random.Random, people: list[tuple[str, str]], num_documents: int, retriever_noise: float, prefix: str
) -> dict[str, Any]:
    relation, *other_relations = rng.sample(RELATIONS, len(RELATIONS))
    person, *other_people = rng.sample(people, num_documents)
    facts = [(person, relation)]
    for other in other_people:
        same_person = len(facts) % 2 == 1 and other_relations
        facts.append((person, other_relations.pop()) if same_person else (other, relation))

    answers: list[str] = []
    for _, stated in facts:
        answers.append(rng.choice([answer for answer in stated.answers if answer not in answers]))
    documents = [
        {
            "id": f"{prefix}-{number}",
            "title": " ".join(name),
            "text": rng.choice(stated.statements).format(surname=name[-1], answer=answer),
        }
        for number, ((name, stated), answer) in enumerate(zip(facts, answers, strict=True))
    ]
    scores = [float(number == 0) + rng.gauss(0.0, retriever_noise) for number in range(num_documents)]
    ranking = sorted(range(num_documents), key=scores.__getitem__, reverse=True)
    return {
        "question": rng.choice(relation.questions).format(name=" ".join(person)),
        "answers": [answers[0]],
        "documents": [documents[number] for number in ranking],
        "positive_ids": [documents[0]["id"]],
    }
