# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""An invented world: people, places, works and organisations, facts about them as short encyclopedia passages, and
questions whose candidates are retrieved with BM25 from all passages.

Questions seldom repeat the wording of the passage that answers them: who was "employed by" a guild is asked for by
its "employer", so BM25, which does not stem, finds the right name and is left to guess among its passages. Other
candidates state the same fact about another name. Two-hop questions name the second person only by an indirect
description, which fits a dozen people of the same nationality; which of them is meant stands in the first passage.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

from datasets import Dataset

from ..data.schema import Document
from ..retrieval import BM25Retriever, retrieve_candidates


Kind = Literal["person", "place", "work", "organisation"]
Split = Literal["train", "eval", "pretrain"]

FIRST_NAMES = """
Ada Agnes Alma Anton Arne Astrid Bela Boris Bruno Carla Clara Cosmo Dag Dora Edda Elena Elsa Emil Enzo Erik Felix
Finn Flora Frida Gerda Gianni Greta Gustav Hanna Hedda Helga Hugo Igor Ilse Ines Ingrid Irma Ivo Jan Jonas Judit
Julia Karin Klara Knut Lars Laszlo Lea Lena Leo Lotte Luca Magda Maja Mara Marco Marta Matteo Milan Mina Nadia Nils
Nina Noemi Nora Olaf Olga Oskar Otto Pablo Paula Pavel Petra Pia Rafael Ragna Rita Rosa Ruth Sara Sigrid Silvia Simon
Sofia Sonja Stefan Sven Tilda Timo Ugo Ulla Vera Viktor Vito Wanda Xenia Yara Yuri Zita Zoran
""".split()
LAST_NAMES = """
Abel Alba Amato Arvid Bach Balint Banyai Berg Bianchi Blum Borg Brandt Bravo Bruun Calvo Caruso Celik Conti Costa
Croft Dahl Demir Diaz Drago Duval Ekman Elias Endo Falk Faust Ferro Fiala Fink Foss Franco Frost Gallo Garay Gero
Glass Grau Grimm Haas Hahn Halla Haug Heidt Hess Holm Horak Huld Ibsen Ito Jara Juhl Kafka Kant Kato Kim Klein Klimt
Koch Kraus Krog Kubo Lamb Lang Laval Leclerc Lind Lopez Lund Magri Maly Mann Marek Matos Mendez Mirza Monti Mori Moss
Muro Nagy Nemeth Neri Noll Novak Oda Olin Orban Ortiz Pace Palma Pasco Paz Pinto Plath Pohl Popa Quist Ramos Rask
Reis Rizzo Roca Roth Rubio Rusk Sabo Salo Sato Schulz Serra Silva Skov Sokol Soto Stark Stein Sund Tanaka Thiel Toth
Ueda Ulloa Vaca Valk Varga Vega Vogt Volta Wahl Weiss Wirth Wolf Xu Yilmaz Zapata Zeman Zorn
""".split()
PLACE_STARTS = """
Al Amber Ash Bel Birk Black Bren Bright Bruns Cal Castel Cliff Cold Crow Dal Dark Deep Dorn Drum East Eichen Elm Fair
Fern Fels Glen Gold Green Grun Hal Hart Hazel High Hirsch Holt Iron Kalt Karl Kings Lach Lang Lauter Lime Linden Long
Mar Mill Mond Moor Neu Nieder North Oak Ober Old Pine Queens Raven Red Rich Rohr Rot Salz Sand Schon Silver South Stan
Steen Stone Storm Sund Swan Thorn Ulm Val Wald Weis West White Wild Wind Winter Wolfs
""".split()
PLACE_ENDS = """
bach berg bo borg brook burg bury by dal dorf fell field fjord ford gate hafen ham haven heim hill hof holm hurst kirk
land mark mond mouth mund ness port rath see stadt stead sted strand thal thorp toft ton town ville wald walde wick
wood worth
""".split()
ADJECTIVES = """
Ancient Bitter Blind Bold Borrowed Brazen Broken Burning Crimson Distant Divided Drowned Eager Empty Endless Faded
Faithful Fallen Famous Final Foreign Forgotten Fragile Frozen Gentle Glass Golden Hidden Hollow Hungry Idle Invisible
Ivory Jealous Joyful Lonely Lost Lucky Marble Merry Midnight Narrow Noble Northern Obscure Open Painted Pale Paper
Patient Perfect Polite Proud Quiet Rapid Restless Royal Sacred Scarlet Secret Seventh Silent Sleeping Slow Solemn
Stolen Stubborn Sudden Sunken Tender Third Timid Twisted Unknown Velvet Violet Wandering Wicked Wooden
""".split()
NOUNS = """
Acrobat Anchor Angel Apple Archer Arrow Autumn Avenue Ballad Bell Bird Bridge Candle Canvas Carnival Castle Cathedral
Circle Clock Cloud Comet Corridor Crown Dancer Daughter Desert Dream Eagle Echo Ember Falcon Feather Festival Fiddle
Flame Forest Fountain Garden Ghost Giant Harbor Harvest Heart Horizon Island Jewel Journey Kingdom Ladder Lantern
Letter Lion Mask Meadow Melody Mirror Monk Morning Mountain Museum Needle Nightingale Ocean Orchard Parade Pearl
Pilgrim Promise Prophet Rain Ribbon River Rose Sailor Shadow Shepherd Shore Song Sparrow Statue Storm Summer Swallow
Tempest Thief Tiger Tower Traveller Valley Violin Voyage Wheel Whisper Widow Window
""".split()
ORGANISATION_WORDS = """
Acorn Alpine Arctic Aurora Azure Baltic Beacon Bronze Cedar Central Citadel Civic Cobalt Copper Coral Crescent Crystal
Delta Diamond Eastern Emerald Falconer Fortuna Galaxy Granite Harmony Helios Heritage Indigo Jade Jupiter Juniper
Laurel Liberty Lotus Lunar Magnolia Maple Meridian Minerva Mosaic Nebula Neptune Noble Nova Olive Onyx Opal Orion
Pacific Palace Phoenix Pioneer Polar Prairie Quartz Ruby Saffron Sapphire Saturn Sierra Solar Spruce Sterling Summit
Tempo Titan Topaz Trident Unity Vanguard Venus Vertex Vesta Victory Vulcan Western Willow Zenith
""".split()
ORGANISATION_KINDS = """
Academy Agency Alliance Archive Association Bank Brewery Chamber Choir Club College Company Council Circus Dairy
Factory Foundation Gallery Group Guild Institute Laboratory League Library Mission Museum Opera Orchestra Press School
Shipyard Society Studio Theatre Trust Union University Works
""".split()
NATIONALITIES = "Danish Dutch Finnish Greek Hungarian Irish Polish Swiss".split()
PROFESSIONS = """
actor architect astronomer banker baker biologist botanist chemist clerk dentist engineer farmer geologist historian
jurist librarian mathematician merchant musician nurse painter philosopher physicist pilot poet priest sculptor singer
soldier surgeon tailor weaver
""".split()


@dataclass(frozen=True)
class Relation:
    """
    One kind of fact.

    Args:
        subject (`str`): kind of entity that the fact is about.
        value (`str`): kind of entity that answers.
        participle (`str`): as in "Ada Lind was *employed* by the Amber Guild".
        preposition (`str`): as in "employed *by*".
        noun (`str`): as in "the *employer* of Ada Lind".
    """

    subject: Kind
    value: Kind
    participle: str
    preposition: str
    noun: str


def _relations(subject: Kind, table: str) -> tuple[Relation, ...]:
    rows = (line.split(maxsplit=3) for line in table.strip().splitlines())
    return tuple(Relation(subject, cast(Kind, value), *words) for value, *words in rows)


RELATIONS = (
    *_relations(
        "person",
        """
        organisation employed by employer
        organisation sponsored by sponsoring body
        organisation educated by education provider
        person married to marriage partner
        person trained by trainer
        person imprisoned by imprisoning officer
        place buried in burial place
        place posted to posting
        place exiled to exiling place
        """,
    ),
    *_relations(
        "work",
        """
        person composed by composer
        person translated by translator
        person edited by editor
        person dedicated to dedication holder
        person reviewed by reviewer
        organisation published by publisher
        organisation financed by financing body
        organisation adapted by adapter
        place printed in printing place
        """,
    ),
    *_relations(
        "organisation",
        """
        person founded by founder
        person directed by director
        person audited by auditor
        person insured by insurer
        organisation owned by owner
        organisation stocked by stocking firm
        place located in location
        place banned in banning place
        place registered in registering place
        """,
    ),
    *_relations(
        "place",
        """
        person governed by governor
        person conquered by conquering hero
        person photographed by photographer
        person discovered by discoverer
        person planned by planner
        organisation protected by protector
        organisation heated by heating firm
        organisation mapped by mapping firm
        place twinned with twinning partner
        """,
    ),
)

KINDS: tuple[Kind, ...] = ("person", "place", "work", "organisation")
WHO = {"person": "who", "place": "which place", "organisation": "which organisation"}
WHOM = WHO | {"person": "whom"}
SORTS = {
    "work": "novel opera play poem film ballet".split(),
    "place": "town village port".split(),
    "organisation": "body house firm".split(),
}

# How many of each kind live in a world, each with as many passages as its kind has relations.
POPULATION: dict[Kind, int] = {"person": 280, "work": 130, "organisation": 130, "place": 110}


@dataclass(frozen=True)
class Entity:
    """Something that has a name and, in a passage of its own, may be called by a description."""

    kind: Kind
    name: str
    description: str


@dataclass(frozen=True)
class Fact:
    """A relation between two entities and how its passage states it: with the participle or with the noun."""

    subject: Entity
    relation: Relation
    value: Entity
    uses_noun: bool
    is_described: bool


def draw_entities(rng: random.Random, kind: Kind, size: int, split: Split) -> list[Entity]:
    """Entities of one kind. Names are pairs of words, and every pair belongs to one split only."""
    starts, ends = {
        "person": (FIRST_NAMES, LAST_NAMES),
        "place": (PLACE_STARTS, PLACE_ENDS),
        "work": (ADJECTIVES, NOUNS),
        "organisation": (ORGANISATION_WORDS, ORGANISATION_KINDS),
    }[kind]
    share = ("train", "eval", "pretrain").index(split)
    pairs = [(a, b) for i, a in enumerate(starts) for j, b in enumerate(ends) if (i + j) % 3 == share]
    joint = "" if kind == "place" else " "
    return [Entity(kind, f"{a}{joint}{b}", draw_description(rng, kind)) for a, b in rng.sample(pairs, size)]


def draw_description(rng: random.Random, kind: Kind) -> str:
    """What an entity may be called instead of its name."""
    if kind == "person":
        return f"the {rng.choice(NATIONALITIES)} {rng.choice(PROFESSIONS)}"
    return f"the {rng.choice(SORTS[kind])}"


def state(rng: random.Random, fact: Fact) -> str:
    """Text of the passage that states a fact."""
    subject, relation, value = fact.subject, fact.relation, fact.value.name
    name = subject.description if fact.is_described else subject.name
    if fact.uses_noun:
        frames = ("The {noun} of {name} was {value}.", "{value} was the {noun} of {name}.")
    else:
        frames = (
            "{name} was {participle} {preposition} {value}.",
            "It was {preposition} {value} that {name} was {participle}.",
        )
    text = rng.choice(frames).format(
        name=name,
        value=value,
        noun=relation.noun,
        participle=relation.participle,
        preposition=relation.preposition,
    )
    return text[0].upper() + text[1:]


def ask(rng: random.Random, relation: Relation, name: str, use_noun: bool) -> str:
    """Question for the value of a relation of what is called `name`."""
    if use_noun:
        frames = ("{who} was the {noun} of {name}?", "what is the name of the {noun} of {name}?")
    else:
        frames = ("{preposition} {whom} was {name} {participle}?", "{name} was {participle} {preposition} {whom}?")
    text = rng.choice(frames).format(
        name=name,
        who=WHO[relation.value],
        whom=WHOM[relation.value],
        noun=relation.noun,
        participle=relation.participle,
        preposition=relation.preposition,
    )
    return text[0].upper() + text[1:]


@dataclass(frozen=True)
class World:
    """
    One population's passages and questions.

    Args:
        corpus (`list[dict]`): passages with `id`, `title` and `text`.
        single_hop (`list[dict]`): questions that one passage answers, with `question`, `answers` and `positive_ids`.
        two_hop (`list[dict]`): questions that need two passages, in the order of `positive_ids`.
    """

    corpus: list[Document]
    single_hop: list[dict[str, Any]]
    two_hop: list[dict[str, Any]]


def draw_world(seed: int, split: Split, overlap: float = 0.2) -> World:
    """
    Draws a world.

    Args:
        seed (`int`):
            The same seed gives the same world.
        split (`str`):
            `"train"` or `"eval"`; no entity occurs in both, whatever the seeds.
        overlap (`float`, *optional*, defaults to `0.2`):
            Share of the single-hop questions that use the wording of the passage they are about. The retriever finds
            these easily.

    Returns:
        [`World`]
    """
    rng = random.Random(f"{seed}, {split}")
    entities = {kind: draw_entities(rng, kind, size, split) for kind, size in POPULATION.items()}
    facts = list(_draw_facts(rng, entities))
    rng.shuffle(facts)
    corpus: list[Document] = [
        {"id": f"{split}-{number}", "title": fact.subject.name, "text": state(rng, fact)}
        for number, fact in enumerate(facts)
    ]
    single_hop = [
        {
            "question": ask(rng, fact.relation, fact.subject.name, fact.uses_noun ^ (rng.random() >= overlap)),
            "answers": [fact.value.name],
            "positive_ids": [passage["id"]],
        }
        for fact, passage in zip(facts, corpus, strict=True)
    ]
    described: dict[Entity, list[tuple[Fact, str]]] = {}
    for fact, passage in zip(facts, corpus, strict=True):
        if fact.subject.kind == "person" and fact.is_described:
            described.setdefault(fact.subject, []).append((fact, str(passage["id"])))
    two_hop = []
    for first, passage in zip(facts, corpus, strict=True):
        if first.subject.kind != "person" and first.value.kind == "person":
            nationality = first.value.description.split()[1]
            bridge = f"the {nationality} {first.relation.noun} of {first.subject.name}"
            two_hop += [
                {
                    "question": ask(rng, second.relation, bridge, second.uses_noun),
                    "answers": [second.value.name],
                    "positive_ids": [passage["id"], second_id],
                }
                for second, second_id in described.get(first.value, [])
            ]
    return World(corpus, single_hop, two_hop)


def _draw_facts(rng: random.Random, entities: dict[Kind, list[Entity]]) -> Iterator[Fact]:
    for relation in RELATIONS:
        for subject in entities[relation.subject]:
            value = rng.choice([entity for entity in entities[relation.value] if entity is not subject])
            yield Fact(subject, relation, value, uses_noun=rng.random() < 0.5, is_described=rng.random() < 0.6)


def synthetic_world(
    num_train: int,
    num_eval: int,
    seed: int = 0,
    two_hop_share: float = 0.0,
    num_documents: int = 20,
    overlap: float = 0.2,
) -> tuple[Dataset, Dataset]:
    """
    Training and evaluation questions over two worlds that share no entity, each with its candidates from BM25 over the
    passages of its world, more than 5,000.

    Args:
        num_train (`int`):
            Training questions.
        num_eval (`int`):
            Evaluation questions.
        seed (`int`, *optional*, defaults to `0`):
            The same seed gives the same records.
        two_hop_share (`float`, *optional*, defaults to `0.0`):
            Share of questions that need two passages.
        num_documents (`int`, *optional*, defaults to `20`):
            Candidates per question.
        overlap (`float`, *optional*, defaults to `0.2`):
            See [`draw_world`].

    Returns:
        `tuple[Dataset, Dataset]`: the training and the evaluation set, with the columns `question` (`str`), `answers`
        (`list[str]`), `positive_ids` (`list[str]`, ids of the passages that are needed, retrieved or not) and
        `documents` (`list` of `{"id", "title", "text"}`, best first).
    """
    splits: dict[Split, int] = {"train": num_train, "eval": num_eval}
    train, test = (
        _with_candidates(draw_world(seed, split, overlap), size, two_hop_share, num_documents, seed)
        for split, size in splits.items()
    )
    return train, test


def _with_candidates(world: World, size: int, two_hop_share: float, num_documents: int, seed: int) -> Dataset:
    rng = random.Random(seed)
    num_two_hop = round(size * two_hop_share)
    questions = rng.sample(world.single_hop, size - num_two_hop) + rng.sample(world.two_hop, num_two_hop)
    rng.shuffle(questions)
    retriever = BM25Retriever(world.corpus, show_progress=False)
    return retrieve_candidates(Dataset.from_list(questions), retriever, num_documents)
