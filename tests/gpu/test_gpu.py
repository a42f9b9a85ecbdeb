# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""What holds on the CPU in float32 holds on a GPU in bfloat16: `pytest tests/gpu tests/test_quantization.py`."""

import warnings

import pytest
import torch
from peft import LoraConfig

from trl_dro import DROConfig, DROTrainer
from trl_dro.model.codec import PermutationCodec
from trl_dro.model.likelihood import completion_logits
from trl_dro.model.permutation import permutation_logps
from trl_dro.model.roles import ROLES
from trl_dro.model.sampling import sample_permutations
from trl_dro.model.shared_prefix import PackedModel

from ..tiny_models import TOKENIZERS, bpe_tokenizer, tiny_llama
from ..trainer.test_dro_trainer import (
    ONE_QUESTION,
    exact_gradients,
    gradients,
    make_dataset,
    randomize_adapters,
    relative_error,
    run_step,
)


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")


def make_trainer(tmp_path, **settings):
    tokenizer = bpe_tokenizer(split_digits=False)
    settings = {
        "num_selected": 2,
        "max_candidates": 4,
        "num_permutations": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_steps": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": True,
    } | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        trainer = DROTrainer(
            tiny_llama(tokenizer),
            DROConfig(str(tmp_path), **settings),
            make_dataset(1 if settings["per_device_train_batch_size"] == 1 else 8),
            make_dataset(2),
            tokenizer,
            LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
        )
    randomize_adapters(trainer)
    return trainer


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.25)])
def test_sampled_log_probabilities_equal_scored_ones(kind, dtype, tolerance):
    tokenizer = TOKENIZERS[kind]()
    model = tiny_llama(tokenizer).to(CUDA, dtype)
    codec = PermutationCodec(tokenizer, 20, num_selected=4)
    prompts = [tokenizer(text).input_ids for text in ("Question: who?", "Question: who wrote the book in Paris? " * 3)]
    packed = PackedModel(model, model.config, 0, CUDA, dtype)
    with torch.no_grad():
        read = packed.read(prompts, [codec.forced_start(n) for n in (20, 13)])
    samples = sample_permutations(packed, codec, read, [20, 13], 8)
    for i, n in enumerate((20, 13)):
        with torch.no_grad():
            scored = permutation_logps(
                lambda tokens, i=i: completion_logits(model, [prompts[i]] * 8, tokens, 0, CUDA),
                codec,
                samples.permutations[i].tolist(),
                [n] * 8,
            )
        torch.testing.assert_close(samples.logps[i], scored, atol=tolerance, rtol=0)


def test_bfloat16_gradient_matches_enumeration(tmp_path):
    trainer = make_trainer(tmp_path, **ONE_QUESTION | {"selector_estimator": "rws_centered"})
    with trainer.accelerator.autocast():
        exact = exact_gradients(trainer, trainer.train_dataset[0])
    run_step(trainer)
    for role in ROLES:
        assert relative_error(gradients(trainer, role), exact[role]) < 0.2


def test_bfloat16_checkpointed_gradients_equal_plain_ones(tmp_path):
    results = []
    for checkpointing in (False, True):
        trainer = make_trainer(tmp_path, gradient_checkpointing=checkpointing)
        if checkpointing:
            trainer.model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        run_step(trainer)
        results.append({role: gradients(trainer, role) for role in ROLES})
    for role in ROLES:
        assert relative_error(results[1][role], results[0][role]) < 0.05


def test_bfloat16_training_moves_both_adapters_and_evaluates(tmp_path):
    trainer = make_trainer(tmp_path)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != bool(set(name.split(".")) & set(ROLES)), name
    assert trainer.evaluate()["eval_elbo"] < 0
