# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import json
import shutil

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_dro import DROConfig, DROTrainer, LoadOptions, RAGPipeline
from trl_dro.model.roles import ROLES, RolePair
from trl_dro.system.rag_config import RAGConfig
from trl_dro.system.run_folder import export_merged, find_role

from ..model.test_control_tokens import turns_tokenizer
from ..test_faults import LORA, TOKENIZER, make_trainer
from ..tiny_models import tiny_llama
from ..trainer.test_dro_trainer import make_dataset, randomize_adapters


RECORDS = make_dataset(4).to_list()
CPU = LoadOptions(device="cpu")


def trainer_on(model, folder, peft=True, selector_model=None, **settings):
    trainer = DROTrainer(
        model,
        DROConfig(
            str(folder),
            num_selected=2,
            max_candidates=4,
            max_answer_length=6,
            report_to="none",
            use_cpu=True,
            gradient_checkpointing=False,
            **settings,
        ),
        make_dataset(),
        processing_class=TOKENIZER,
        peft_config=LoraConfig(**LORA) if peft else None,
        selector_model=selector_model,
    )
    randomize_adapters(trainer)
    return trainer


def logits(rag, role):
    prompt = torch.tensor([rag.prompts[role]("who?", RECORDS[0]["documents"][:2])])
    with torch.no_grad():
        return rag.roles.forward(role, input_ids=prompt).logits


def assert_loads_as_trained(trainer, folder, **arguments):
    pipe = RAGPipeline.from_pretrained(folder, options=CPU, **arguments)
    trainer.model.eval()
    for role in ROLES:
        torch.testing.assert_close(logits(pipe.rag, role), logits(trainer.rag, role), atol=1e-5, rtol=1e-5)
    return pipe


@pytest.fixture
def base(tmp_path):
    tiny_llama(TOKENIZER).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_adapters_on_one_base_are_loaded_onto_one_base(base, tmp_path):
    trainer = trainer_on(base, tmp_path / "run")
    trainer.save_model()
    assert not (tmp_path / "run" / "base").exists()  # it has a place of its own
    assert_loads_as_trained(trainer, tmp_path / "run")


def test_a_base_made_in_memory_is_saved_beside_its_adapters(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.save_model()
    assert find_role(tmp_path / "selector", "selector").base == str(tmp_path / "base")
    pipe = assert_loads_as_trained(trainer, tmp_path)
    assert pipe.config.num_selected == 2
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "selector")
    with torch.no_grad():
        prompt = torch.tensor([pipe.rag.prompts["selector"]("who?", RECORDS[0]["documents"][:2])])
        torch.testing.assert_close(plain(prompt).logits, logits(pipe.rag, "selector"), atol=1e-5, rtol=1e-5)


def test_a_checkpoint_finds_the_base_of_its_run(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    assert not (tmp_path / "checkpoint-1" / "base").exists()
    assert_loads_as_trained(trainer, tmp_path / "checkpoint-1")


def test_a_folder_beside_a_run_that_is_called_base_is_not_its_base(base, tmp_path):
    trainer = trainer_on(base, tmp_path / "run")
    trainer.save_model()
    for stranger in (tmp_path / "base", tmp_path / "run" / "base"):
        tiny_llama(TOKENIZER, seed=7).save_pretrained(stranger)
    assert find_role(tmp_path / "run", "selector").base == base
    assert_loads_as_trained(trainer, tmp_path / "run")

    in_memory = make_trainer(tmp_path / "memory")
    in_memory.save_model()
    shutil.rmtree(tmp_path / "memory" / "base")
    with pytest.raises(ValueError, match="trained on a model that is not here .unnamed.: pass its folder"):
        find_role(tmp_path / "memory", "selector")


def test_two_bases_made_in_memory_are_saved_each_with_its_role(tmp_path):
    trainer = trainer_on(tiny_llama(TOKENIZER), tmp_path, selector_model=tiny_llama(TOKENIZER, seed=5))
    trainer.save_model()
    assert (tmp_path / "selector" / "base").is_dir() and (tmp_path / "generator" / "base").is_dir()
    assert isinstance(assert_loads_as_trained(trainer, tmp_path).rag.roles.model, RolePair)


def test_two_full_models_are_loaded_as_two(tmp_path):
    trainer = trainer_on(tiny_llama(TOKENIZER), tmp_path, peft=False, selector_model=tiny_llama(TOKENIZER, seed=5))
    trainer.save_model()
    assert isinstance(assert_loads_as_trained(trainer, tmp_path).rag.roles.model, RolePair)


def test_an_adapter_joins_its_bare_base_without_a_second_copy(base, tmp_path):
    trainer = trainer_on(base, tmp_path / "run")
    trainer.save_model()
    pipe = RAGPipeline.from_pretrained(base, selector=tmp_path / "run", options=CPU)
    assert isinstance(pipe.rag.roles.model, PeftModel) and pipe.config.num_selected == 2
    prompt = torch.tensor([pipe.rag.prompts["generator"]("who?", RECORDS[0]["documents"][:2])])
    bare = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        torch.testing.assert_close(bare(prompt).logits, logits(pipe.rag, "generator"), atol=1e-5, rtol=1e-5)
    trainer.model.eval()
    torch.testing.assert_close(logits(pipe.rag, "selector"), logits(trainer.rag, "selector"), atol=1e-5, rtol=1e-5)


def test_a_bare_base_serves_both_roles_as_one_object(base):
    pair = RAGPipeline.from_pretrained(base, options=CPU).rag.roles.model
    assert pair.selector is pair.generator


def test_the_base_can_be_named(base, tmp_path):
    trainer = trainer_on(base, tmp_path / "run")
    trainer.save_model()
    shutil.move(base, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="pass its folder or Hub id as base_model"):
        RAGPipeline.from_pretrained(tmp_path / "run", options=CPU)
    assert_loads_as_trained(trainer, tmp_path / "run", base_model=str(tmp_path / "elsewhere"))


def test_prompts_and_sizes_are_those_of_training(tmp_path):
    template = "{documents}\nQ: {question} {format}"
    trainer = make_trainer(tmp_path, selector_template=template, max_document_length=9, max_answer_length=3)
    trainer.save_model()
    config = RAGPipeline.from_pretrained(tmp_path, options=CPU).config
    assert (config.selector_template, config.max_document_length, config.max_answer_length) == (template, 9, 3)
    assert config == RAGConfig.of_training(trainer.args)


def ask(question, documents, **_):
    return f"{documents} {question}"


def test_a_template_that_is_a_function_must_be_passed_again(tmp_path):
    make_trainer(tmp_path, generator_template=ask).save_model()
    with pytest.raises(ValueError, match="generator_template .* was a function"):
        RAGPipeline.from_pretrained(tmp_path, options=CPU)
    assert RAGPipeline.from_pretrained(tmp_path, options=CPU, generator_template=ask).config.generator_template is ask


@pytest.mark.parametrize(
    "content, message", [('{"num_selected": 2', "is damaged"), ('{"num_chosen": 2}', "unknown settings num_chosen")]
)
def test_damaged_settings_are_named(tmp_path, content, message):
    (tmp_path / "rag_config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        RAGConfig.load(tmp_path / "rag_config.json")


def test_what_is_no_model_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        find_role(tmp_path / "missing", "selector")
    with pytest.raises(ValueError, match="neither a model .* nor an adapter"):
        find_role(tmp_path, "selector")
    with pytest.raises(ValueError, match="neither a folder nor a Hub id"):
        find_role("a/b/c", "selector")
    with pytest.raises(ValueError, match="not in the cache, and the Hub cannot be reached"):
        find_role("someone/nothing", "selector")


def test_a_model_in_the_cache_is_found_without_network(base, tmp_path, monkeypatch):
    cache = tmp_path / "cache" / "models--someone--tiny"
    shutil.copytree(base, cache / "snapshots" / "abc123")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc123")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert find_role("someone/tiny", "selector").path == "someone/tiny"  # a plain model, which transformers finds
    (cache / "snapshots" / "abc123" / "adapter_config.json").write_text('{"base_model_name_or_path": "a/base"}')
    assert find_role("someone/tiny", "selector").base == "a/base"
    with pytest.raises(ValueError, match="not in the cache"):
        find_role("someone/else", "selector")


def test_a_merged_role_is_asked_as_it_was_trained(base, tmp_path):
    template = "{documents}\nQ: {question} {format}"
    trainer_on(base, tmp_path / "run", selector_template=template).save_model()
    pipe = RAGPipeline.from_pretrained(tmp_path / "run", options=CPU)
    for role in ROLES:
        pipe.export_merged(role, tmp_path / role)
    export_merged(find_role(tmp_path / "run", "generator"), tmp_path / "plain", CPU)
    loaded = RAGPipeline.from_pretrained(tmp_path / "generator", selector=tmp_path / "selector", options=CPU)
    assert loaded.config == pipe.config and loaded.config.num_selected == 2
    assert loaded.config.selector_template == template
    assert RAGPipeline.from_pretrained(tmp_path / "plain", options=CPU).config == pipe.config


def test_a_merged_role_stops_where_its_answers_ended(base, tmp_path):
    tokenizer = turns_tokenizer(special=False)
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    model = tiny_llama(tokenizer)
    model.generation_config.eos_token_id = 7  # what the base declares
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    export_merged(find_role(tmp_path / "base", "generator"), tmp_path / "merged", CPU)
    written = json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"]
    assert written == sorted({7, end, tokenizer.eos_token_id}) and len(written) == 3


def swap(folder):
    (folder / "selector").rename(folder / "x")
    (folder / "generator").rename(folder / "selector")
    (folder / "x").rename(folder / "generator")


@pytest.mark.parametrize(
    "damage, message",
    [
        (swap, "is asked to be the .*, but holds the .* \\(role.json\\): take the folder of"),
        (lambda folder: [path.unlink() for path in folder.rglob("tokenizer*")], "has lost the tokenizer that it was"),
        (lambda folder: (folder / "base").mkdir(), "base is empty: copy the run again"),
    ],
    ids=["swapped roles", "no tokenizer", "an empty base"],
)
def test_a_run_that_was_damaged_in_copying_is_refused(base, tmp_path, damage, message):
    trainer_on(base, tmp_path / "run").save_model()
    RAGPipeline.from_pretrained(tmp_path / "run", options=CPU)
    damage(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        RAGPipeline.from_pretrained(tmp_path / "run", options=CPU)


def test_a_local_folder_has_no_revisions(base):
    assert find_role(base, "selector", revision="main")
    with pytest.raises(ValueError, match="which has no revision 'v1': leave the revision out"):
        find_role(base, "selector", revision="v1")


def test_a_quantized_base_is_not_merged_into(base, tmp_path):
    options = LoadOptions(device="cpu", quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    with pytest.raises(ValueError, match="cannot be merged exactly"):
        export_merged(find_role(base, "selector"), tmp_path / "out", options)


def test_the_base_is_loaded_in_the_precision_asked_for(base):
    pipe = RAGPipeline.from_pretrained(base, options=LoadOptions(dtype="bfloat16", device="cpu"))
    assert pipe.rag.roles.module("selector").dtype == torch.bfloat16


def test_saving_twice_leaves_one_whole_file(tmp_path):
    RAGConfig(num_selected=3).save(tmp_path)
    RAGConfig(num_selected=4).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["rag_config.json"]
    assert json.loads((tmp_path / "rag_config.json").read_text())["num_selected"] == 4
