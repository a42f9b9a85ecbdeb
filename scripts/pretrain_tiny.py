# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
Trains the tiny language model of `trl_dro/demo/tiny_model` from nothing, on generic skills over entities and relations
that the invented world of `trl_dro.demo.world` does not have:

- *rank*: write the ids of the passages that answer a question, best first, of one hop or two;
- *mention*: write the id of the passage that mentions a name and two words, of any meaning;
- *follow*: write the id of the passage about whom a given one names;
- *cite*: write the id of the passage that answers a question, then the answer;
- *reply*: answer a question that stands before the passages and behind them.

Reading the right one of several passages is learned in three steps: reading a single passage; reading the one whose id
has just been written (*cite*); and, with a loss on the id that the middle layers point at, reading without writing the
id (*reply*). In trials without the last step it stayed near chance for a thousand updates.

Two hops are learned last, in the second half, which gives half of its updates to few passages with pairs of them. No
pair is asked for twice in a row of questions: where it was, models had learned to copy the answer given before.

The number of passages, and how much they resemble each other, grow whenever the model has mastered the present ones.
A run that was stopped continues where it saved last.

```bash
OMP_NUM_THREADS=1 python scripts/pretrain_tiny.py --out outputs/tiny_model
```
"""

import argparse
import json
import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_dro.demo import world as synthetic
from trl_dro.demo.world import Entity, Fact, Relation, ask, draw_description, draw_entities, state


# Verbs that no relation of the world is made of.
STEMS = """
accept accus admir adopt advis answer applaud appoint arrest assist attack attend balanc bless borrow brew carr carv
cheer clean climb collect comfort command consult cook copi count cover cross danc debat decor defend deliver depict
describ destroy deviat doubt drain elect embroider encount endors entertain envi escort examin export expos farm
favour fenc flood follow forg frighten furnish garden greet guard guid hail harvest haunt honour host hunt imitat
import inherit inspect inspir invad invent invit judg kidnapp label launch lend lift load lobbi mark measur mentor
mock model mourn murder narrat nominat nurs offend oppos order paint pardon parodi pay perform persuad plagiaris
plant polish prais preach prosecut punish question quot rais record recruit refus remember rent repair rescu research
respect restor reward rival roast sail salut satiris scold sculpt search serv shelter sign sketch smuggl solv sort
steer study summon support survey suspect tempt thank threaten toast tour trad transport treat trick tutor urg
veto visit walk warn watch welcom wound wrestl
""".split()
NOUN_SUFFIXES = ["er", "er", "er", "or", "ing", "ing", "ion", "al", "age"]
TRAILERS = [
    "",
    "",
    "",
    " place",
    " firm",
    " body",
    " partner",
    " officer",
    " hero",
    " holder",
    " site",
    " house",
    " agent",
]
PREPOSITIONS = "by by by to in with from at for".split()
FILLERS = "and or with near under over after before while also often never then once more".split()

MAX_ID = 20
POINTER_LAYERS = 4  # after which the model is to know which passage to look at
CHAINS_FROM = 0.5  # share of the training after which pairs of passages are practised most
SHARPNESS = 2.5  # of the attention that training starts with
GAIN = 0.25  # of what its heads pass on


class Row(NamedTuple):
    """Passages, then questions about them and their answers."""

    tokens: list[int]
    weights: list[float]  # how much each token counts in the loss
    answers: list[tuple[str, int, int]]  # skill, and where the part of the answer that counts fully begins and ends
    pointers: list[tuple[int, int]]  # where an answer is about to begin, and the id of the passage to look at

    def add(
        self, prompt: list[int], completion: list[int], counts: list[float], skill: str, pointers: dict[int, int]
    ) -> None:
        """`pointers` has the id to look at before a token of the completion is written."""
        start = len(self.tokens) + len(prompt)
        self.pointers.extend((start + i - 1, pointer) for i, pointer in pointers.items())
        span = [start + i for i, count in enumerate(counts) if count == 1.0]
        self.answers.append((skill, span[0], span[-1] + 1))
        self.tokens.extend([*prompt, *completion])
        self.weights.extend([*[0.0] * len(prompt), *counts])


class Question(NamedTuple):
    """
    What is asked, the passages that are needed, and the answer, where there is one. A question that follows has no
    text but the id of the passage that it follows.
    """

    skill: str
    text: str
    passages: list[int]
    answer: str = ""


# Tokenizer


def train_tokenizer(vocabulary_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which a document id is one token, and endings such as "-ed" are tokens of their own."""
    texts = []
    for split in ("train", "eval"):
        for seed in range(2):
            world = synthetic.draw_world(seed, split)
            texts += [f"{passage['title']}\n{passage['text']}" for passage in world.corpus]
            texts += [question["question"] for question in world.single_hop + world.two_hop[:5000]]
    rng = random.Random(0)
    for _ in range(300):
        for stem in STEMS:
            texts.append(f" {stem}ed by {stem}{rng.choice(NOUN_SUFFIXES)}{rng.choice(TRAILERS)}")
    texts += ["Rank: Reply: Cite: Follow:", "Which passages mention?", " ".join(FILLERS)] * 1000

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # A word has the same token wherever it stands, so that it can be copied.
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=True),
            pre_tokenizers.Split(Regex(r"(?<=\p{Ll}{3})(?:ed|er|ing|ion|al|age|(?<=[nrt])or)$"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - MAX_ID - 1,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(
        [AddedToken(text, normalized=False) for text in (" > ", *(f"[{i}]" for i in range(1, MAX_ID + 1)))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=special[2:],
        padding_side="left",
        chat_template=(
            "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}"
        ),
        model_input_names=["input_ids", "attention_mask"],
    )


# Skills


class Skills:
    """Draws examples of every skill."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int):
        self.rng = random.Random(seed)
        self.tokenizer = tokenizer
        self.entities = {
            kind: draw_entities(random.Random(0), kind, size, "pretrain")
            for kind, size in {"person": 3000, "place": 1000, "work": 2000, "organisation": 1000}.items()
        }
        self.namesakes: dict[str, list[Entity]] = defaultdict(list)  # by each word of the name
        for entity in (entity for entities in self.entities.values() for entity in entities):
            for word in entity.name.split():
                self.namesakes[word].append(entity)
        used = [word for r in synthetic.RELATIONS for word in (r.participle, *r.noun.split())]
        made = [f"{stem}{suffix}" for stem in STEMS for suffix in ("ed", "er", "ing")]
        names = [word for entities in self.entities.values() for e in entities[:200] for word in e.name.split()]
        self.words = [*made, *used * 15, *names[:300], *FILLERS * 5, *synthetic.PROFESSIONS]
        self.forms: dict[str, list[str]] = defaultdict(list)
        self.stem_of: dict[str, str] = {}
        for word in sorted({*made, *used}):
            stem = word
            for suffix in ("ed", "er", "or", "ing", "ion", "al", "age"):
                if word.endswith(suffix) and len(word) > len(suffix) + 2:
                    stem = word[: -len(suffix)]
            self.forms[stem].append(word)
            self.stem_of[word] = stem
        stems = {r.participle.removesuffix("ed") for r in synthetic.RELATIONS}
        self.other_stems = sorted(
            word[1:]
            for word in tokenizer.get_vocab()
            if len(word) > 3
            and word[0] == "Ġ"
            and word[1:].isalpha()
            and not any(s.startswith(word[1:].lower()) for s in stems)
        )
        self.id_token = {i: tokenizer.convert_tokens_to_ids(f"[{i}]") for i in range(1, MAX_ID + 1)}
        self.separator = tokenizer.convert_tokens_to_ids(" > ")
        self.hardness = 0.1  # share of the other passages that resemble the right one
        self.practises_chains = False  # nearly all passages have pairs for two hops, and few other questions
        self.end = tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    # Entities and facts

    def entity(self, kind: str | None = None) -> Entity:
        kind = kind or self.rng.choice(synthetic.KINDS)
        entity = self.rng.choice(self.entities[kind])
        return replace(entity, description=draw_description(self.rng, kind))

    def namesake(self, entity: Entity) -> Entity:
        """Another entity that shares a word of the name, where names have two words."""
        word = self.rng.choice(entity.name.split())
        other = self.rng.choice(self.namesakes[word]) if " " in entity.name else self.entity(entity.kind)
        return replace(other, description=draw_description(self.rng, entity.kind))

    def relation(self, subject: str | None = None, value: str | None = None) -> Relation:
        rng = self.rng
        stem = rng.choice(STEMS)
        draw = rng.random()
        if draw < 0.25:
            stem = rng.choice(self.other_stems)
        elif draw < 0.35:
            stem = rng.choice("bdfgklmprstvz") + rng.choice("aeiou") + rng.choice("lnrst") + rng.choice("dfgkmptv")
        return Relation(
            subject or rng.choice(synthetic.KINDS),
            value or rng.choice(["person", "place", "organisation"]),
            f"{stem}ed",
            rng.choice(PREPOSITIONS),
            f"{stem}{rng.choice(NOUN_SUFFIXES)}{rng.choice(TRAILERS)}",
        )

    def fact(self, subject: Entity, relation: Relation, value: Entity | None = None, **kwargs) -> Fact:
        defaults = {"uses_noun": self.rng.random() < 0.5, "is_described": self.rng.random() < 0.6}
        return Fact(subject, relation, value or self.entity(relation.value), **defaults | kwargs)

    # Rows

    def drawn_passages(self, n: int) -> tuple[str, list[tuple[str, str]], dict[int, int], list[Question]]:
        """Text of `n` passages in random order, their titles and texts, the id of each, and questions about them."""
        passages, questions = self.passages(n)
        # Ids from the whole range, so that the ones of long lists are known before such lists come.
        ids = list(range(1, n + 1)) if self.rng.random() < 0.3 else self.rng.sample(range(1, MAX_ID + 1), n)
        order = self.rng.sample(range(n), n)
        id_of = dict(zip(order, ids, strict=True))
        block = "\n".join(f"[{id_of[i]}] {passages[i][0]}\n{passages[i][1]}" for i in order)
        return block, passages, id_of, questions

    def selecting(self, n: int) -> Row:
        """Passages and several questions, answered with ids, or with the id of the passage and what it says."""
        rng = self.rng
        block, passages, id_of, questions = self.drawn_passages(n)
        row = Row([], [], [], [])
        for number, question in enumerate(questions[:8]):
            gold = question.passages
            others = [i for i in range(n) if i not in gold]
            text, task = question.text, "Rank"
            if question.skill == "follow":
                text, task = f"[{id_of[gold[0]]}]", "Follow"
                completion, pointers = [self.id_token[id_of[gold[1]]], self.end], {0: gold[1]}
                counts = [1.0, 0.02]
            elif question.answer and rng.random() < (0.4 if n <= 6 else 0.1):
                task = "Cite"
                completion = [self.id_token[id_of[gold[-1]]], *self.encode(question.answer), self.end]
                counts, pointers = [1.0] * len(completion), {0: gold[-1]}
            else:
                alike = [i for i in others if passages[i][0] == passages[gold[0]][0]]
                ranking = list(dict.fromkeys([*gold, *alike, *rng.sample(others, len(others))]))
                ranking = ranking[: rng.randint(len(gold), 5)]
                completion = [token for i in ranking for token in (self.id_token[id_of[i]], self.separator)]
                completion[-1] = self.end
                counts = [weight for i in ranking for weight in (1.0 if i in gold else 0.05, 0.02)]
                pointers = {2 * i: passage for i, passage in enumerate(gold)}
            prompt = f"{task}: {text}<|end|><|assistant|>"
            row.add(
                self.encode(f"<|user|>{prompt}" if number else f"<|user|>{block}\n{prompt}"),
                completion,
                counts,
                f"{task}, {question.skill}",
                {at: self.id_token[id_of[passage]] for at, passage in pointers.items()},
            )
        return row

    def reading(self, n: int) -> Row:
        """A question, passages, the question again, and its answer."""
        while True:
            block, _, id_of, questions = self.drawn_passages(n)
            answered = [question for question in questions if question.answer]
            if answered:
                break
        question = answered[0]
        prompt = f"<|user|>Reply: {question.text}\n{block}\nReply: {question.text}<|end|><|assistant|>"
        completion = [*self.encode(question.answer), self.end]
        row = Row([], [], [], [])
        pointers = {0: self.id_token[id_of[question.passages[-1]]]}
        row.add(self.encode(prompt), completion, [1.0] * len(completion), f"Reply, {question.skill}", pointers)
        return row

    def passages(self, n: int) -> tuple[list[tuple[str, str]], list[Question]]:
        """
        Titles and texts, and questions. No two ask for the same passages, or the second could be answered by copying
        the answer to the first.
        """
        rng = self.rng
        subjects = [self.entity() for _ in range(max(1, round(n * (1 - self.hardness)), n // 8))]
        facts: list[Fact | None] = []
        while len(facts) < n:
            subject = rng.choice(subjects)
            draw = rng.random()
            if len(facts) < len(subjects) or draw < 0.4:
                subject = subjects[len(facts)] if len(facts) < len(subjects) else subject
                facts.append(self.fact(subject, self.relation(subject.kind)))
            elif draw < 0.55:
                facts.append(None)
            else:
                known = rng.choice(
                    [fact for fact in facts if fact] or [self.fact(subject, self.relation(subject.kind))]
                )
                if draw < 0.75:
                    relation = known.relation if rng.random() < 0.6 else self.relation(known.subject.kind)
                    facts.append(self.fact(self.namesake(known.subject), relation))
                else:
                    other = self.entity()
                    facts.append(self.fact(other, self.relation(other.kind), known.subject))
        num_chains = 0
        if n >= 3 and self.hardness >= 0.4 and rng.random() < (0.9 if self.practises_chains else 0.5):
            num_chains = rng.randint(1, max(1, n // 3))
            self.chain(facts, num_chains)
        passages = [self.document(fact) if fact else self.random_words(subjects) for fact in facts]

        hops = [self.two_hops(facts, 2 * chain) for chain in range(num_chains)]
        others = [
            self.mention(passages, i) if fact is None or rng.random() < 0.05 else self.one_hop(fact, i)
            for i, fact in enumerate(facts)
        ]
        rng.shuffle(others)
        questions = hops + others[: 2 if self.practises_chains else max(0, 8 - len(hops))]
        if rng.random() < 0.5:
            rng.shuffle(questions)
        return passages, questions

    def one_hop(self, fact: Fact, i: int) -> Question:
        text = ask(self.rng, fact.relation, fact.subject.name, fact.uses_noun ^ (self.rng.random() < 0.7))
        return Question("1 hop", text, [i], fact.value.name)

    def two_hops(self, facts: list[Fact | None], i: int) -> Question:
        """About the value of passage `i`, which passage `i + 1` is about."""
        first, second = facts[i : i + 2]
        if self.rng.random() < 0.25:
            return Question("follow", "", [i, i + 1])
        nationality = second.subject.description.split()[1]
        bridge = f"the {nationality} {first.relation.noun} of {first.subject.name}"
        text = ask(self.rng, second.relation, bridge, second.uses_noun ^ (self.rng.random() < 0.3))
        return Question("2 hops", text, [i, i + 1], second.value.name)

    def mention(self, passages: list[tuple[str, str]], i: int) -> Question:
        """Title and two words of passage `i`, in whatever form."""
        title, text = passages[i]
        words = [word for word in text.strip(".").split() if word[0].isupper() or len(word) > 4]
        words = [
            self.rng.choice(self.forms[self.stem_of.get(word, word)] or [word])
            for word in self.rng.sample(words, min(len(words), 2))
        ]
        words.insert(self.rng.randrange(len(words) + 1), title)
        return Question("mention", " ".join(words), [i])

    def chain(self, facts: list[Fact | None], num_chains: int) -> None:
        """
        Pairs of facts of which the second is about the first's value, and others. What is said of these persons, and
        of more, is alike, so that only the first fact tells which is meant.
        """
        rng = self.rng
        nationality, relation = rng.choice(synthetic.NATIONALITIES), self.relation("person")

        def compatriot() -> Entity:
            return replace(self.entity("person"), description=f"the {nationality} {rng.choice(synthetic.PROFESSIONS)}")

        subjects, persons = [], []
        for i in range(num_chains):
            subject = self.entity(rng.choice(["work", "place", "organisation"]))
            if subjects and rng.random() < 0.3:
                subject = rng.choice(subjects)
            subjects.append(subject)
            persons.append(compatriot())
            facts[2 * i] = self.fact(subject, self.relation(subject.kind, "person"), persons[-1])
            facts[2 * i + 1] = self.fact(persons[-1], relation, is_described=True)
        for i in range(2 * num_chains, len(facts)):
            draw = rng.random()
            if draw < 0.4:
                facts[i] = self.fact(compatriot(), relation, is_described=True)
            elif draw < 0.6:
                subject = rng.choice(subjects)
                facts[i] = self.fact(subject, self.relation(subject.kind))
            elif draw < 0.75:
                facts[i] = self.fact(rng.choice(persons), self.relation("person"), is_described=True)

    def document(self, fact: Fact) -> tuple[str, str]:
        return fact.subject.name, state(self.rng, fact)

    def random_words(self, subjects: list[Entity]) -> tuple[str, str]:
        """A passage without meaning, of any words, those included that the world's relations are made of."""
        return self.rng.choice([self.rng.choice(subjects), self.entity()]).name, " ".join(
            self.rng.sample(self.words, 5)
        ) + "."


# Model


def build_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_layers: int, seed: int) -> LlamaForCausalLM:
    """
    Llama in float32 that starts as a rough pointer network: from random attention, 400 steps had not found the right
    one of two passages, from this fewer than 100 do.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 32,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 1e8},
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    markers = ["ĠRank", "ĠReply", "ĠCite", "ĠFollow", *(f"[{i}]" for i in range(1, MAX_ID + 1))]
    shape_attention(model, [tokenizer.convert_tokens_to_ids(marker) for marker in markers])
    model.set_attn_implementation("eager")  # with autocast to bfloat16, twice as fast as sdpa on a CPU
    return model.train()


@torch.no_grad()
def shape_attention(model: LlamaForCausalLM, markers: list[int]) -> None:
    """
    A rough pointer network to start from. Four parts of the residual stream hold what a token is, the id of the
    passage it is in, the votes for ids that a question's token has collected, and the token before. Layer 0 fills
    in the second and the fourth; in layer 1 tokens look for their like and collect the ids there; in layer 2 the
    last token sums the votes up; in layer 3 it reads the passages it points at.
    """
    hidden_size, num_heads = model.config.hidden_size, model.config.num_attention_heads
    head_dim = hidden_size // num_heads
    frequencies = model.model.rotary_emb.inv_freq  # [head_dim / 2], radians per token
    num_words = hidden_size - 3 * head_dim
    basis = torch.eye(hidden_size)
    words, ids, votes, before = basis.split([num_words, head_dim, head_dim, head_dim])
    # Every embedding shares one direction, and those that open a passage or a question another: queries and keys made
    # from these alone depend on the distance only.
    shared, mark, words = words[0], words[1], words[2:]
    embeddings = (
        torch.nn.functional.normalize(torch.randn(model.config.vocab_size, len(words)), dim=1) @ words + shared
    )
    embeddings[markers] += mark
    model.model.embed_tokens.weight.copy_(embeddings)

    def half(mask: Tensor) -> Tensor:
        return torch.cat([mask.float(), torch.zeros(len(mask))])

    near, window, still = frequencies > 0.09, (frequencies > 0.02) & (frequencies < 0.2), frequencies < 0.005
    # Fewer dimensions turn within a prompt than not.
    unturned = torch.cat([still, still]).nonzero().flatten()
    mixed = _orthogonal(len(words)) @ words
    # Two views of what a token is, the second of what the first leaves out.
    compress, rest = (
        mixed[:head_dim],
        torch.cat([mixed[head_dim:], torch.zeros(2 * head_dim - len(words), hidden_size)]),
    )

    def at_distance(distance: int) -> tuple[Tensor, Tensor]:
        angles = frequencies * distance
        query = torch.cat([near * angles.cos(), near * -angles.sin()])
        return torch.outer(query, shared), torch.outer(half(near), shared)

    def nearby() -> tuple[Tensor, Tensor]:
        both = 0.9 * torch.outer(half(window), shared)
        return both, both

    def latest_marker() -> tuple[Tensor, Tensor]:
        both = 0.7 * half(window | (torch.arange(len(frequencies)) > len(frequencies) - 5))
        return torch.outer(both, shared), torch.outer(both, mark)

    def alike(query_part: Tensor, key_part: Tensor, sharp: float = SHARPNESS) -> tuple[Tensor, Tensor]:
        mix = _orthogonal(max(len(query_part), len(unturned)))[: len(unturned), : len(query_part)]
        query, key = torch.zeros(head_dim, hidden_size), torch.zeros(head_dim, hidden_size)
        query[unturned], key[unturned] = sharp * mix @ query_part, sharp * mix @ key_part
        return query, key

    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        for weight in (
            attention.q_proj.weight,
            attention.k_proj.weight,
            attention.v_proj.weight,
            attention.o_proj.weight,
        ):
            weight.normal_(std=0.02)
        layer.mlp.down_proj.weight.mul_(0.1)  # at first, nothing drowns what the heads pass on
        # Of each head: query and key, what it reads and where it writes it.
        heads = {
            0: [(at_distance(1), compress, before), (latest_marker(), compress, ids)],
            1: [
                (alike(compress, before), ids, votes),
                (alike(compress, before), ids, votes),
                (alike(compress, before), compress, compress),
            ],
            2: [(nearby(), votes, compress), (alike(compress, before), ids, votes)],
            3: [
                (alike(compress, ids, 5.0), compress, votes),
                (alike(compress, ids, 5.0), rest, before),
                (latest_marker(), compress, ids),
            ],
            4: [
                (alike(compress, ids, 5.0), compress, compress),
                (alike(compress, ids, 5.0), rest, rest),
                (alike(compress, before), compress, compress),
            ],
        }.get(index, [(alike(compress, before), compress, compress)])
        for head, ((query, key), source, target) in enumerate(heads):
            part = slice(head * head_dim, (head + 1) * head_dim)
            attention.q_proj.weight[part] += query
            attention.k_proj.weight[part] += key
            attention.v_proj.weight[part] += source
            attention.o_proj.weight[:, part] += GAIN * target.T


def _orthogonal(size: int) -> Tensor:
    return torch.nn.init.orthogonal_(torch.empty(size, size))


# Training


def forward_loss(model: LlamaForCausalLM, rows: Sequence[Row]) -> tuple[Tensor, list[tuple[str, float]]]:
    """
    Weighted cross-entropy, and for every answer its skill and whether all tokens that count fully are right. After
    `POINTER_LAYERS` layers the model is to know which passage to look at, so that the layers above can read it.
    """
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row.tokens) for row in rows], batch_first=True)  # [B, T]
    weights = torch.nn.utils.rnn.pad_sequence([torch.tensor(row.weights) for row in rows], batch_first=True)[:, 1:]
    is_target = weights > 0
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model.model(input_ids=tokens[:, :-1], use_cache=False, output_hidden_states=True)
        logits = model.lm_head(outputs.last_hidden_state[is_target])
        where = [(i, *pointer) for i, row in enumerate(rows) for pointer in row.pointers]
        row_index, position, pointed = torch.tensor(where).unbind(1)
        below = outputs.hidden_states[POINTER_LAYERS][row_index, position]
        pointer_logits = model.lm_head(model.model.norm(below))
    targets = tokens[:, 1:][is_target]
    losses = cross_entropy(logits.float(), targets, reduction="none")
    is_right = torch.ones(tokens.shape, dtype=torch.bool)
    is_right[:, 1:][is_target] = logits.argmax(-1) == targets
    right = [
        (skill, is_right[i, start:end].all().item()) for i, row in enumerate(rows) for skill, start, end in row.answers
    ]
    pointer_loss = cross_entropy(pointer_logits.float(), pointed)
    return (losses * weights[is_target]).sum() / weights.sum() + 0.5 * pointer_loss, right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for model and tokenizer")
    parser.add_argument("--minutes", type=float, default=50.0, help="processor time of the training")
    parser.add_argument("--hidden-size", type=int, default=160, help="width, a multiple of 32")
    parser.add_argument("--layers", type=int, default=6, help="a run that resumes with more of them adds them on top")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--tokens-per-batch", type=int, default=4000)
    parser.add_argument("--vocabulary", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    arguments.out.mkdir(parents=True, exist_ok=True)
    state_file = arguments.out / "training_state.pt"
    if state_file.exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.out)
    else:
        tokenizer = train_tokenizer(arguments.vocabulary)
        tokenizer.save_pretrained(arguments.out)
    skills = Skills(tokenizer, arguments.seed)
    model = build_model(tokenizer, arguments.hidden_size, arguments.layers, arguments.seed)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    model.model.forward = torch.compile(model.model.forward, dynamic=True)  # nearly twice as fast, after a minute
    most, step, before, mastery, mastered_at = 3, 0, 0.0, 0.0, 0
    if state_file.exists():
        saved = torch.load(state_file, weights_only=False)
        missing, _ = model.load_state_dict(saved["model"], strict=False)
        if not missing:  # layers that were added start afresh, and with them the optimizer
            optimizer.load_state_dict(saved["optimizer"])
        most, step, before = saved["most"], saved["step"], saved["seconds"]
        skills.hardness = saved["hardness"]
        skills.rng.setstate(saved["rng"])

    results: dict[str, list[float]] = defaultdict(list)
    start = logged = saved_at = time.process_time()

    def seconds() -> float:
        return before + time.process_time() - start

    def save() -> None:
        model.save_pretrained(arguments.out)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": skills.rng.getstate()}
        state |= {"most": most, "hardness": skills.hardness, "step": step, "seconds": seconds()}
        torch.save(state, state_file.with_suffix(".tmp"))
        os.replace(state_file.with_suffix(".tmp"), state_file)

    while seconds() < 60 * arguments.minutes:
        progress = seconds() / (60 * arguments.minutes)
        decay = 0.5 * (1 + math.cos(math.pi * progress)) * 0.9 + 0.1
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * decay * min(1.0, (step + 1) / 100)
        # Reading is practised on as many passages as a generator sees, one passage included: what a passage says
        # is learned from it first, then which passage to read. Two hops come late, and take most of the time then.
        draw = skills.rng.random()
        skills.practises_chains = progress > CHAINS_FROM and 0.15 < draw < 0.65
        if skills.practises_chains:
            example, n = skills.selecting, skills.rng.randint(3, 6)
        else:
            example = skills.reading if draw >= 0.6 else skills.selecting
            n = most if draw < 0.25 else skills.rng.randint(1, min(5, most))
        rows = [example(n)]
        while (len(rows) + 1) * len(rows[0].tokens) < arguments.tokens_per_batch:
            rows.append(example(n))
        loss, right = forward_loss(model, rows)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1

        for skill, is_right in right:
            results[f"{skill} of {n}"].append(is_right)
        ranked = [is_right for skill, is_right in right if skill == "Rank, 1 hop"]
        if n == most and ranked:
            mastery = 0.95 * mastery + 0.05 * sum(ranked) / len(ranked)
        if mastery > 0.8 and step - mastered_at > 20:
            if skills.hardness < 1.0:
                skills.hardness = min(1.0, skills.hardness + 0.15)
            elif most < MAX_ID:
                most = min(MAX_ID, most + (1 if most < 8 else 2))
            mastery, mastered_at = 0.6, step
        if time.process_time() - logged > 20:
            logged = time.process_time()
            means = {name: round(sum(v) / len(v), 3) for name, v in sorted(results.items()) if len(v) > 20}
            record = {
                "step": step,
                "seconds": round(seconds()),
                "most": most,
                "hardness": round(skills.hardness, 2),
                "loss": round(loss.item(), 3),
                "accuracy": means,
            }
            print(json.dumps(record), flush=True)
            with open(arguments.out / "training_log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
            results.clear()
        if time.process_time() - saved_at > 60:
            saved_at = time.process_time()
            save()
    save()


if __name__ == "__main__":
    main()
