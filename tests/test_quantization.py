# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Training on a 4-bit base: on the CPU wherever bitsandbytes is installed, and on a GPU where there is one."""

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from trl_dro import DROConfig, DROTrainer
from trl_dro.roles import ROLES

from .test_dro_trainer import make_dataset
from .tiny_models import bpe_tokenizer, tiny_llama


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
    for module in trainer.model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # On some CPUs a forward without gradients repacks the weights, and gradients are lost afterwards.
            module.support_avx512bf16_for_cpu = False
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
