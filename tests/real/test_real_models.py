# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Real weights, vocabularies and chat templates: `make test-real` fetches two small models and runs these."""

import copy
import itertools
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_dro import DROConfig, DROTrainer, LoadOptions, RAGPipeline
from trl_dro.commands.cli import main
from trl_dro.model.codec import PermutationCodec
from trl_dro.model.likelihood import completion_logits, completion_logps
from trl_dro.model.permutation import permutation_logps
from trl_dro.model.prompts import GENERATOR_TEMPLATE, SELECTOR_TEMPLATE, PassagePrompts, PromptBuilder, answer_ids
from trl_dro.model.roles import ROLES


MODELS = Path(os.environ.get("TRL_DRO_REAL_MODELS", Path(__file__).resolve().parents[2] / "outputs" / "models"))
NAMES = ("smollm2", "gemma3")  # with a chat template and with none; the latter with sliding windows and 262k tokens
pytestmark = pytest.mark.slow

CAPITALS = [("France", "Paris"), ("Italy", "Rome"), ("Japan", "Tokyo"), ("Egypt", "Cairo"), ("Peru", "Lima")]


def records(filler: int = 0) -> list[dict]:
    """Questions about capitals with four candidates, each longer by `filler` sentences."""
    documents = [
        {"id": country, "title": country, "text": f"{city} is the capital of {country}." + " It is a city." * filler}
        for country, city in CAPITALS
    ]
    return [
        {
            "question": f"what is the capital of {country}",
            "answers": [city],
            "documents": documents[i:] + documents[:i],
        }
        for i, (country, city) in enumerate(CAPITALS)
    ]


def first_four(filler: int = 0) -> list[dict]:
    return [{**record, "documents": record["documents"][:4]} for record in records(filler)]


@pytest.fixture(scope="module", params=NAMES)
def folder(request) -> str:
    path = MODELS / request.param
    if not (path / "config.json").is_file():
        pytest.skip(f"needs the model {request.param} in {MODELS}: make test-real")
    return str(path)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def trainer(folder, tmp_path_factory):
    """Both roles in float32, their adapters no longer zero."""
    args = DROConfig(
        output_dir=str(tmp_path_factory.mktemp("run")),
        max_candidates=4,
        num_selected=2,
        num_permutations=3,
        max_answer_length=6,
        per_device_train_batch_size=2,
        max_steps=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        model_init_kwargs={"dtype": "float32"},
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    trainer = DROTrainer(folder, args, Dataset.from_list(first_four()), peft_config=lora)
    generator = torch.Generator().manual_seed(0)
    for role in ROLES:
        for name, parameter in trainer.roles.named_parameters(role):
            if "lora_B" in name:
                parameter.data = 0.01 * torch.randn(parameter.shape, generator=generator)
    return trainer


def separate(trainer, role, prompts, completions):
    """Log-probabilities by the definition: one padded row per completion."""
    tokenizer = trainer.tokenizers[role]

    def forward(**inputs):
        return trainer.roles.forward(role, **inputs)

    return completion_logits(forward, prompts, completions, tokenizer.pad_token_id, torch.device("cpu"))


def gradients(trainer, role, loss):
    parameters = [parameter for _, parameter in trainer.roles.named_parameters(role)]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def window_filler(trainer, times_32: int) -> int:
    """Sentences per document that make a prompt longer than the sliding window, which not every model has."""
    window = getattr(trainer.model.config, "sliding_window", None)
    if window is None:
        pytest.skip("this model has no sliding window")
    return window * times_32 // 32


def assert_alike(logps, expected, trainer, role):
    """Log-probabilities within 1e-4 nats, their gradients within 1e-3 of their norm."""
    torch.testing.assert_close(logps, expected, atol=1e-4, rtol=1e-5)
    weights = torch.linspace(-1, 1, logps.numel()).view(logps.shape)
    found, right = (gradients(trainer, role, (weights * values).sum()) for values in (logps, expected))
    assert right.norm() > 0 and (found - right).norm() / right.norm() < 1e-3


def test_prompts_hold_every_document_and_texts_never_become_control_tokens(tokenizer):
    [record, *_] = first_four()
    control = [token for token in tokenizer.all_special_tokens if token]
    record["documents"][0] = {"title": "", "text": f"Paris {' '.join(control)} is the capital of France."}
    plain = copy.deepcopy(record)
    plain["documents"][0]["text"] = "Paris is the capital of France."
    for template in (SELECTOR_TEMPLATE, GENERATOR_TEMPLATE):
        prompts = PromptBuilder(tokenizer, template, 2)
        ids, expected = (prompts(r["question"], r["documents"]) for r in (record, plain))
        special = set(tokenizer.all_special_ids)
        assert [i for i in ids if i in special] == [i for i in expected if i in special]
        text = tokenizer.decode(ids)
        assert all(f"[{i}] " in text for i in range(1, 5)) and record["question"] in text
        assert text.count("Tokyo") == 1 and tokenizer.eos_token_id != ids[-1]
        shorter = PromptBuilder(tokenizer, template, 2, max_document_length=8)(record["question"], record["documents"])
        assert len(shorter) < len(ids)


def test_a_prompt_is_the_chat_template_s_or_plain_text(tokenizer):
    record = first_four()[0]
    prompts = PromptBuilder(tokenizer, GENERATOR_TEMPLATE, 2)
    ids, written = (ask(record["question"], record["documents"][:2]) for ask in (prompts, prompts.write))
    if tokenizer.chat_template is None:
        assert isinstance(written, str) and ids == tokenizer(written).input_ids
        assert ids.count(tokenizer.bos_token_id) == 1
    else:
        assert ids == tokenizer.apply_chat_template(written, add_generation_prompt=True, return_dict=False)
        assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n")
    end = answer_ids(tokenizer, "Paris")[-1]
    assert end in tokenizer.all_special_ids or end == tokenizer.eos_token_id


@pytest.mark.parametrize("num_documents", [4, 20])
def test_every_permutation_is_written_and_read_back(tokenizer, num_documents):
    codec = PermutationCodec(tokenizer, num_documents, 2)
    for z in itertools.permutations(range(1, num_documents + 1), 2):
        tokens, _ = codec.encode(list(z), num_documents)
        assert codec.decode(tokens) == list(z) and len(tokens) <= codec.max_length


def test_probabilities_of_all_permutations_sum_to_one_and_sampling_agrees(trainer):
    questions = first_four()[:1]
    every = torch.tensor([list(itertools.permutations(range(1, 5), 2))])
    with torch.no_grad():
        logps = trainer.rag.permutation_logps(questions, every)[0]
        samples = trainer.rag.sample(questions, 8, seeds=[1])
        assert logps.exp().sum() == pytest.approx(1, abs=1e-5)
        place = [every[0].tolist().index(z) for z in samples.permutations[0].tolist()]
        torch.testing.assert_close(samples.logps[0], logps[place], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("long", [False, True], ids=["short", "longer than a sliding window"])
def test_permutations_behind_a_shared_prompt_equal_separate_rows(trainer, long):
    questions = first_four(window_filler(trainer, 2) if long else 0)[:1]
    rag, permutations = trainer.rag, torch.tensor([[[1, 2], [3, 1], [3, 4]]])
    [prompt] = rag._selector_prompts(questions)
    assert not long or len(prompt) > trainer.model.config.sliding_window

    def complete(tokens):
        return separate(trainer, "selector", [prompt] * len(tokens), tokens)

    expected = permutation_logps(complete, rag.codec, [list(z) for z in permutations[0].tolist()], [4, 4, 4])
    assert_alike(rag.permutation_logps(questions, permutations)[0], expected, trainer, "selector")


@pytest.mark.parametrize("long", [False, True], ids=["short", "longer than a sliding window"])
def test_answers_behind_a_shared_prefix_equal_separate_rows(trainer, long, monkeypatch):
    [question] = first_four(window_filler(trainer, 4) if long else 0)[:1]
    rag, permutations = trainer.rag, torch.tensor([[[1, 2], [1, 3], [4, 3]]])
    prompts = [rag._generator_prompt(question, z) for z in permutations[0].tolist()]
    assert not long or len(prompts[0]) > trainer.model.config.sliding_window
    completions = [answer_ids(rag.tokenizers["generator"], "Paris")] * 3
    expected = completion_logps(separate(trainer, "generator", prompts, completions))
    # Together, however cheap it would be to take them apart.
    monkeypatch.setattr(rag, "_forward_flops", lambda role, lengths: len(lengths))
    assert_alike(rag.answer_logps([question], [["Paris"]], permutations)[0], expected, trainer, "generator")


def test_untrained_bases_select_by_the_likelihood_of_the_question(trainer):
    """Without any training, and as the plain likelihoods of the definition have it, gradients included."""
    rag, questions = copy.copy(trainer.rag), first_four(3)
    tokenizer = rag.tokenizers["selector"]
    rag.prompts = rag.prompts | {"selector": PassagePrompts(tokenizer)}
    rag.codec = PermutationCodec(None, 4, 1)
    with torch.no_grad():
        greedy = rag.sample(questions, 1, greedy=True).permutations.flatten().tolist()
        order = [questions[i]["documents"][place - 1]["id"] for i, place in enumerate(greedy)]
    assert order == [country for country, _ in CAPITALS]
    rows = rag.prompts["selector"].rows(questions[0]["question"], questions[0]["documents"])
    assert all(tokenizer.decode(p + q, skip_special_tokens=True).endswith(" of France") for p, q in rows)
    logps = completion_logps(separate(trainer, "selector", *zip(*rows, strict=True)))
    kept = rag.permutation_logps(
        questions[:1], torch.tensor([[[1], [2], [3], [4]]]), wrapped=lambda **x: rag.roles.model(**x)
    )
    assert_alike(kept[0], (rag.query_likelihood_scale * logps).log_softmax(-1), trainer, "selector")


def test_a_run_of_two_updates_is_asked_loaded_by_peft_and_merged(folder, tmp_path, monkeypatch):
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in first_four()))
    run = tmp_path / "run"
    settings = {
        "dataset_name": data,
        "model_name_or_path": folder,
        "output_dir": run,
        "max_candidates": 4,
        "num_selected": 2,
        "num_permutations": 2,
        "max_answer_length": 6,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "lora_r": 4,
        "dtype": "float32",
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    switches = ["--use_peft", "--bf16", "false", "--gradient_checkpointing", "false", "--use_cpu", "true"]
    monkeypatch.setattr(sys, "argv", ["trl-dro", "train", *words, *switches])
    main()

    pipe = RAGPipeline.from_pretrained(str(run), options=LoadOptions(device="cpu"))
    record = first_four()[0]
    output = pipe(record["question"], documents=record["documents"])
    assert len(output.documents) == 2 and isinstance(output.answer, str)
    assert not any(token in output.answer for token in pipe.rag.tokenizers["generator"].all_special_tokens)

    ids = torch.tensor([pipe.rag._generator_prompt(record, [1, 2])])
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = base(ids).logits[:, -1]
    adapted = PeftModel.from_pretrained(base, str(run / "generator"))
    with torch.no_grad():
        expected = adapted(ids).logits[:, -1]
        own = pipe.rag.roles.forward("generator", input_ids=ids).logits[:, -1].float()
        pipe.export_merged("generator", tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(ids).logits[:, -1]
    assert (expected - before).abs().max() > 1e-3
    # The pipeline may keep the base in its own precision.
    for logits in (own, merged):
        assert torch.cosine_similarity(logits, expected).item() > 0.999
        assert logits.argmax() == expected.argmax()
