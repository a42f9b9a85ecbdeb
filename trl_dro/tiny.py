# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""A language model small enough to be trained from nothing on two CPU cores in under a minute.

It serves the demo and the tests, which run offline. Its vocabulary is the words of the synthetic world, and its
attention starts out with the two habits that small transformers take longest to find: the first layer reads the
nearest tokens, later layers look for positions whose surroundings resemble their own. The rest is random.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .data.synthetic import synthetic_world
from .prompts import document_body, question_text


# The question stands right before the completion, within reach of the first layer.
SELECTOR_TEMPLATE = "{documents}\nRank: {question}"
GENERATOR_TEMPLATE = "{documents}\nReply: {question}"

MAX_ID = 20

Record = dict[str, Any]
Pair = tuple[str, str]


def tiny_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """
    Word-level tokenizer for a closed vocabulary.

    Words, punctuation marks and document ids (`[1]` to `[20]`) are tokens, whitespace is dropped.

    Args:
        texts (`Iterable[str]`):
            Every text whose words must be known. Other words become `<unk>`.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]: with the special tokens `<pad>`, `<eos>` and `<unk>`.

    Example:

    ```python
    >>> from trl_dro.tiny import tiny_tokenizer

    >>> tokenizer = tiny_tokenizer(["Where was Ada Lind born?"])
    >>> tokenizer.tokenize("[12] > [3]")
    ['[12]', '>', '[3]']
    ```
    """
    split = pre_tokenizers.Split(Regex(r"\[\d+\]|\w+|[^\w\s]"), behavior="removed", invert=True)
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    words |= {word for word, _ in split.pre_tokenize_str(SELECTOR_TEMPLATE + GENERATOR_TEMPLATE)}
    ids = [f"[{i}]" for i in range(1, MAX_ID + 1)]
    vocabulary = ["<pad>", "<eos>", "<unk>", ">", *ids, *sorted(words - {">", *ids})]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def tiny_llama(
    tokenizer: PreTrainedTokenizerBase,
    hidden_size: int = 128,
    num_layers: int = 2,
    num_heads: int = 4,
    max_length: int = 512,
    seed: int = 0,
) -> LlamaForCausalLM:
    """
    Untrained Llama in float32, about 350,000 parameters by default, with tied embeddings.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer with a padding and an end-of-sequence token.
        hidden_size (`int`, *optional*, defaults to `128`):
            Width; the feed-forward layers are twice as wide.
        num_layers (`int`, *optional*, defaults to `2`):
            Number of layers, at least 2 for a model that is to learn anything.
        num_heads (`int`, *optional*, defaults to `4`):
            Attention heads per layer.
        max_length (`int`, *optional*, defaults to `512`):
            Longest sequence in tokens.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the initial weights. The global random state is left as it was.

    Returns:
        [`~transformers.LlamaForCausalLM`]: the model, in training mode.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=max_length,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        _shape_attention(model)
    return model.train()


@torch.no_grad()
def _shape_attention(model: LlamaForCausalLM) -> None:
    hidden_size, num_heads = model.config.hidden_size, model.config.num_attention_heads
    head_dim = hidden_size // num_heads
    frequencies = model.model.rotary_emb.inv_freq  # [head_dim / 2], radians per token

    # Every embedding shares one direction: queries and keys made from it alone depend on the distance only.
    shared = torch.nn.functional.normalize(torch.randn(hidden_size), dim=0)
    content = torch.eye(hidden_size) - torch.outer(shared, shared)
    embeddings = torch.nn.functional.normalize(torch.randn(model.config.vocab_size, hidden_size) @ content, dim=1)
    model.model.embed_tokens.weight.copy_(embeddings + shared)

    # These rotations have turned away after a dozen tokens, so that the score is highest nearby.
    near = ((frequencies > 0.02) & (frequencies < 0.3)).float()
    sharpness = torch.linspace(0.2, 0.4, num_heads).repeat_interleave(head_dim)
    nearness = torch.outer(sharpness * torch.cat([near, torch.zeros_like(near)]).repeat(num_heads), shared)

    # These hardly turn within a prompt, so that equal content matches at any distance.
    far = (frequencies < 0.025).float() + 0.1
    similarity = torch.cat([far, far]).repeat(num_heads)[:, None]  # [hidden_size, 1]

    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        match = nearness if index == 0 else similarity * _orthogonal(hidden_size) @ content
        copy = _orthogonal(hidden_size) @ content
        attention.q_proj.weight.normal_(std=0.02).add_(match)
        attention.k_proj.weight.normal_(std=0.02).add_(match)
        attention.v_proj.weight.normal_(std=0.02).add_(copy)
        attention.o_proj.weight.normal_(std=0.02).add_(copy.T, alpha=3.0)


def _orthogonal(size: int) -> Tensor:
    return torch.nn.init.orthogonal_(torch.empty(size, size))


def warm_up(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    records: Iterable[Record],
    num_selected: int = 2,
    finding_steps: int = 220,
    reading_steps: int = 150,
    teacher_steps: int = 30,
    batch_size: int = 64,
    seed: int = 0,
) -> None:
    """
    Trains all weights of an untrained model, in place, until it is a fair generator and a poor selector.

    Three phases: to *find* the document that answers a question, first among unrelated ones; to *read* the answer
    from the selected documents, without forgetting to find; and to imitate a mediocre *teacher*, who prefers documents
    about the right person whatever they say. That teacher is what DRO then has to outgrow.

    Args:
        model ([`~transformers.LlamaForCausalLM`]):
            Model from [`tiny_llama`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        records (`Iterable[dict]`):
            Training records as in [`~trl_dro.data.synthetic.synthetic_world`], a few thousand, with equally many
            documents each. Their retrieval order is not used.
        num_selected (`int`, *optional*, defaults to `2`):
            Documents in a permutation, K.
        finding_steps (`int`, *optional*, defaults to `220`):
            Updates of the first phase.
        reading_steps (`int`, *optional*, defaults to `150`):
            Updates of the second phase.
        teacher_steps (`int`, *optional*, defaults to `30`):
            Updates of the third phase.
        batch_size (`int`, *optional*, defaults to `64`):
            Examples per update.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the examples drawn.
    """
    records = list(records)
    rng = random.Random(seed)

    def find(progress: float) -> Pair:
        record = _shuffled(rng, rng.choice(records))
        # All of them for the first third, so that the name alone is enough to start with; none at the end.
        share_unrelated = min(1.0, max(0.0, 2.0 - progress / 0.35))
        documents = [
            rng.choice(rng.choice(records)["documents"])
            if document["id"] not in record["positive_ids"] and rng.random() < share_unrelated
            else document
            for document in record["documents"]
        ]
        return selector_pair(record["question"], documents, [_positive(record)])

    def find_or_read(progress: float) -> Pair:
        record = _shuffled(rng, rng.choice(records))
        positive = _positive(record)
        others = [index for index in range(len(record["documents"])) if index != positive]
        permutation = [positive, *rng.sample(others, num_selected - 1)]
        if rng.random() < 0.5:
            return selector_pair(record["question"], record["documents"], permutation)
        rng.shuffle(permutation)
        return generator_pair(record["question"], [record["documents"][i] for i in permutation], record["answers"][0])

    def imitate_or_read(progress: float) -> Pair:
        if rng.random() < 0.3:
            return find_or_read(progress)
        record = _shuffled(rng, rng.choice(records))
        documents = record["documents"]
        person = documents[_positive(record)]["title"]
        permutation = sorted(range(len(documents)), key=lambda index: documents[index]["title"] != person)
        return selector_pair(record["question"], documents, permutation[:num_selected])

    with tqdm(total=finding_steps + reading_steps + teacher_steps, desc="Warm-up") as bar:
        # An end-of-sequence target right after the id keeps the first phase from ever taking off.
        _fit(model, tokenizer, find, finding_steps, batch_size, bar, close=False)
        _fit(model, tokenizer, find_or_read, reading_steps, batch_size, bar)
        _fit(model, tokenizer, imitate_or_read, teacher_steps, batch_size, bar)


def selector_pair(question: str, documents: Sequence[Record], permutation: Sequence[int]) -> Pair:
    """Selector prompt and the permutation (indices into `documents`, from 0) written as ids from 1."""
    prompt = SELECTOR_TEMPLATE.format(question=question, documents=_document_block(documents))
    return prompt, " > ".join(f"[{index + 1}]" for index in permutation)


def generator_pair(question: str, documents: Sequence[Record], answer: str) -> Pair:
    """Generator prompt that shows `documents` in this order, and the answer."""
    return GENERATOR_TEMPLATE.format(question=question, documents=_document_block(documents)), answer


def _document_block(documents: Sequence[Record]) -> str:
    return "\n".join(f"[{i}] {document['title']}\n{document['text']}" for i, document in enumerate(documents, start=1))


def _shuffled(rng: random.Random, record: Record) -> Record:
    return {**record, "documents": rng.sample(record["documents"], len(record["documents"]))}


def _positive(record: Record) -> int:
    return [document["id"] for document in record["documents"]].index(record["positive_ids"][0])


def _fit(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    draw: Callable[[float], Pair],
    num_steps: int,
    batch_size: int,
    bar: tqdm,
    close: bool = True,
    learning_rate: float = 1e-3,
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    num_rising = min(30, num_steps // 4 + 1)
    for step in range(num_steps):
        progress = step / num_steps
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / num_rising) * (1.0 - 0.9 * progress)
        pairs = [draw(progress) for _ in range(batch_size)]
        loss = completion_loss(model, tokenizer, pairs, close)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)


def completion_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], close: bool = True
) -> Tensor:
    """
    Mean cross-entropy over the completion tokens.

    Args:
        model ([`~transformers.LlamaForCausalLM`]):
            Model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        pairs (`Sequence[tuple[str, str]]`):
            Prompts and completions.
        close (`bool`, *optional*, defaults to `True`):
            Whether the end-of-sequence token is part of the completion.

    Returns:
        `Tensor` of shape `()`: the loss in nats per token.
    """
    prompts = tokenizer([prompt for prompt, _ in pairs]).input_ids
    completions = tokenizer([completion for _, completion in pairs]).input_ids
    end = [tokenizer.eos_token_id] if close else []
    # Padding stands at the end, where causal attention never sees it.
    rows = [torch.tensor(prompt + completion + end) for prompt, completion in zip(prompts, completions, strict=True)]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # [B, T]
    is_target = torch.zeros_like(tokens, dtype=torch.bool)
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        is_target[i, len(prompt) : len(row)] = True
    states = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state  # [B, T - 1, hidden_size]
    return cross_entropy(model.lm_head(states[is_target[:, 1:]]), tokens[is_target])


def demo_system(
    num_train: int = 4000, num_eval: int = 300, num_documents: int = 5, seed: int = 0
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase, Dataset, Dataset]:
    """
    World, tokenizer and warmed-up model of the demo, made in about half a minute on two cores.

    Args:
        num_train (`int`, *optional*, defaults to `4000`):
            Training questions.
        num_eval (`int`, *optional*, defaults to `220`):
            Evaluation questions.
        num_documents (`int`, *optional*, defaults to `5`):
            Candidates per question.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the world, the initial weights and the warm-up.

    Returns:
        `tuple[LlamaForCausalLM, PreTrainedTokenizerBase, Dataset, Dataset]`: model, tokenizer, training and evaluation
        set.
    """
    train_dataset, eval_dataset = synthetic_world(num_train, num_eval, num_documents, seed)
    records = train_dataset.to_list()
    tokenizer = tiny_tokenizer(text for record in [*records, *eval_dataset.to_list()] for text in _texts(record))
    model = tiny_llama(tokenizer, seed=seed)
    warm_up(model, tokenizer, records, seed=seed)
    return model, tokenizer, train_dataset, eval_dataset


def tiny_system(dataset: Dataset, seed: int = 0) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """
    Byte-level BPE tokenizer trained on a dataset's first thousand records, and a random Llama to go with it: enough to
    see whether data and settings work, and nothing more.

    Args:
        dataset (`Dataset`):
            Records with `question`, `answers` and `documents`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights.

    Returns:
        `tuple[LlamaForCausalLM, PreTrainedTokenizerBase]`: model with a context of 8,192 tokens, and tokenizer.
    """
    records = dataset.select(range(min(len(dataset), 1000))).to_list()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for record in records for text in _texts(record)), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    return tiny_llama(wrapped, hidden_size=64, max_length=8192, seed=seed), wrapped


def _texts(record: Record) -> Iterator[str]:
    yield question_text(record["question"])
    yield from record["answers"]
    yield from (document_body(document) for document in record["documents"])
