# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Training on a 4-bit base: on the CPU wherever bitsandbytes is installed, and on a GPU where there is one."""

import hashlib

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig
from trl import ModelConfig, TrlParser, get_quantization_config

from trl_dro import DROConfig, DROTrainer
from trl_dro.model.roles import ROLES

from .tiny_models import bpe_tokenizer, tiny_llama
from .trainer.test_dro_trainer import make_dataset


bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the extra: pip install trl_dro[quantization]")
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)


@pytest.fixture
def trainer(tmp_path):
    tokenizer = bpe_tokenizer(split_digits=False)
    # bitsandbytes quantises in blocks of 64.
    tiny_llama(tokenizer, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    args = DROConfig(
        output_dir=str(tmp_path / "run"),
        num_selected=2,
        max_candidates=4,
        num_permutations=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        max_steps=8,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        model_init_kwargs={"dtype": torch.bfloat16},
    )
    trainer = DROTrainer(
        str(tmp_path / "base"),
        args,
        make_dataset(),
        make_dataset(2),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
        quantization_config=NF4,
    )
    return trainer


def test_both_adapters_learn_on_one_four_bit_base_that_stays_byte_identical(trainer):
    quantized = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.dtype == torch.uint8}
    adapters = {
        role: [(p.requires_grad, p.dtype, p.detach().clone()) for _, p in trainer.roles.named_parameters(role)]
        for role in ROLES
    }
    assert quantized
    trainer.evaluate()
    trainer.train()
    weights = dict(trainer.model.named_parameters())
    assert all(torch.equal(weights[name], before) for name, before in quantized.items())
    for role in ROLES:
        assert all(trainable and dtype == torch.bfloat16 for trainable, dtype, _ in adapters[role])
        moved = [
            not torch.equal(p, before)
            for (_, p), (_, _, before) in zip(trainer.roles.named_parameters(role), adapters[role], strict=True)
        ]
        assert sum(moved) > len(moved) / 2
    losses = [logs["generator/loss"] for logs in trainer.state.log_history if "generator/loss" in logs]
    assert sum(losses[-2:]) < sum(losses[:2])


def test_quantized_full_training_is_refused(tmp_path):
    with pytest.raises(ValueError, match="pass `peft_config` along with `quantization_config`"):
        DROTrainer("anything", DROConfig(str(tmp_path)), make_dataset(), quantization_config=NF4)


def make_trainer(folder, quantization_config=NF4, lora_rank=4, **settings):
    """Like the fixture above, with a choice of settings; the base is written once per folder."""
    if not (folder / "base").is_dir():
        tokenizer = bpe_tokenizer(split_digits=False)
        tiny_llama(tokenizer, hidden_size=64, intermediate_size=128).save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
    settings = {
        "output_dir": str(folder / "run"),
        "num_selected": 2,
        "max_candidates": 4,
        "num_permutations": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "model_init_kwargs": {"dtype": torch.bfloat16},
    } | settings
    trainer = DROTrainer(
        str(folder / "base"),
        DROConfig(**settings),
        make_dataset(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=lora_rank, target_modules="all-linear"),
        quantization_config=quantization_config,
    )
    return trainer


def hash_of_base(trainer):
    """Digest of every weight and quantisation constant that is not an adapter's."""
    digest = hashlib.sha256()
    for name, tensor in sorted(trainer.model.state_dict().items()):
        if not set(name.split(".")) & set(ROLES):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def losses_of(trainer):
    return [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]


def test_a_paged_eight_bit_optimizer_learns_and_leaves_the_base_byte_identical(tmp_path):
    # States of 8 bits begin at 4096 elements, so the rank is that large.
    trainer = make_trainer(tmp_path, lora_rank=64, learning_rate=4e-3, max_steps=10, optim="paged_adamw_8bit")
    before = hash_of_base(trainer)
    trainer.train()
    assert hash_of_base(trainer) == before
    losses = losses_of(trainer)
    assert sum(losses[-3:]) < 0.85 * sum(losses[:3])
    states = [trainer.optimizer.state[p] for role in ROLES for _, p in trainer.roles.named_parameters(role)]
    assert all(states) and {torch.uint8, torch.float32} == {state["state1"].dtype for state in states}
    with torch.no_grad():  # the digest sees the last bit
        next(p for p in trainer.model.parameters() if p.dtype == torch.uint8).view(-1)[-1] ^= 1
    assert hash_of_base(trainer) != before


def test_a_quantized_run_resumes_to_the_same_weights_with_states_of_eight_bits(tmp_path):
    settings = {"lora_rank": 64, "learning_rate": 2e-3, "max_steps": 4, "optim": "paged_adamw_8bit"}
    whole = make_trainer(tmp_path, save_strategy="steps", save_steps=2, **settings)
    whole.train()
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    for role in ROLES:
        for (name, p), (_, q) in zip(
            whole.roles.named_parameters(role), resumed.roles.named_parameters(role), strict=True
        ):
            assert torch.equal(p, q), name
    assert losses_of(resumed)[-2:] == losses_of(whole)[-2:]


def test_the_flags_of_trls_model_config_give_a_quantized_trainer(tmp_path):
    [model_args] = TrlParser(ModelConfig).parse_args_and_config(
        ["--load_in_4bit", "--use_bnb_nested_quant", "--dtype", "bfloat16"]
    )
    config = get_quantization_config(model_args)
    assert config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    trainer = make_trainer(tmp_path, config, max_steps=1, model_init_kwargs={"dtype": model_args.dtype})
    linears = [m for m in trainer.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(linears) == 2 * 7  # all but the output layer
    assert all(m.weight.quant_type == "nf4" and m.weight.quant_state.nested for m in linears)
    assert {m.compute_dtype for m in linears} == {torch.bfloat16}
    trainer.train()
    assert trainer.state.global_step == 1 and losses_of(trainer)[0] > 0


def test_the_quantized_base_is_saved_with_no_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    weights = list((tmp_path / "run").rglob("*.safetensors"))
    assert {path.parent.name for path in weights} == set(ROLES)
    for path in weights:
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}
