# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import weakref

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig

from trl_dro import DROConfig, DROTrainer
from trl_dro.model.roles import Roles, prepare_role_model
from trl_dro.trainer import cost
from trl_dro.trainer.plan import Lengths, Models, make_plan

from ..tiny_models import bpe_tokenizer, tiny_llama


LORA = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
TOKENIZER = bpe_tokenizer(split_digits=False)
SIZES = {"hidden_size": 128, "intermediate_size": 448, "num_hidden_layers": 4}
LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations make, while they live, and the most of them at a time."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return output

    def free(self, storage, size):
        self.live -= size
        self.seen.discard(storage)


def make_questions(num_documents=8):
    def text(i):
        return " ".join(f"number {1900 + (7 * i + j) % 90}" for j in range(30))

    return Dataset.from_list(
        [
            {
                "question": f"who wrote book {i}",
                "answers": ["Anna Brown"],
                "documents": [{"id": f"{i}-{j}", "text": text(20 * i + j)} for j in range(num_documents)],
            }
            for i in range(4)
        ]
    )


@pytest.mark.parametrize("peft_config", [LORA, None], ids=["adapters", "full models"])
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "plain"])
def test_memory_of_a_step_is_as_estimated(tmp_path, peft_config, checkpointing):
    model = tiny_llama(TOKENIZER, **SIZES)
    args = DROConfig(
        str(tmp_path),
        use_cpu=True,
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_checkpointing=checkpointing,
        num_selected=3,
        max_candidates=8,
        num_permutations=4,
        max_answer_length=8,
        optim="adamw_torch",
        save_strategy="no",
        report_to="none",
    )
    questions = make_questions()
    config = model.config
    trainer = DROTrainer(model, args, questions, processing_class=TOKENIZER, peft_config=peft_config)
    step, bytes_of_step = trainer.training_step, LiveBytes()

    def measured(*arguments, **kwargs):
        with bytes_of_step:
            return step(*arguments, **kwargs)

    trainer.training_step = measured
    trainer.train()

    lengths = Lengths.of_data(questions, args, trainer.rag.prompts, trainer.rag.codec)
    plan = make_plan(Models(config, None, peft_config, torch.float32, None), args, lengths, 4, 0, 1)
    weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    states = [
        value
        for state in trainer.optimizer.state.values()
        for name, value in state.items()
        if name != "step"  # one number each
    ]
    assert plan.memory["base"] + plan.memory["adapters"] == weights
    assert plan.memory["optimizer"] == sum(state.numel() * state.element_size() for state in states)
    made = plan.memory["gradients"] + plan.memory["activations"] + plan.memory["logits"]
    assert bytes_of_step.peak / 1.1 < made < 2 * bytes_of_step.peak


def test_cache_is_counted_exactly():
    model = tiny_llama(TOKENIZER, num_attention_heads=4, num_key_value_heads=2)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.ones(2, 7, dtype=torch.long), past_key_values=cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cost.cache_bytes(cost.Shape.of(model.config), 14, 4) == held


@pytest.mark.parametrize("shared", [True, False])
def test_meta_roles_have_the_weights_of_real_ones(shared):
    selector = None if shared else tiny_llama(TOKENIZER, hidden_size=64)
    model = tiny_llama(TOKENIZER)
    configs = (model.config, None if selector is None else selector.config)
    real = Roles(prepare_role_model(model, selector, LORA))
    meta = cost.build_roles(*configs, LORA, torch.float32)
    assert all(parameter.is_meta for parameter in meta.model.parameters())
    shapes = [{name: p.shape for name, p in roles.model.named_parameters()} for roles in (real, meta)]
    assert shapes[0] == shapes[1]
    assert cost.weight_bytes(real) == cost.weight_bytes(meta)


def test_llama_8b_has_the_weights_that_are_known_of_it():
    roles = cost.build_roles(
        LLAMA_8B, None, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"), torch.bfloat16
    )
    assert cost.weight_bytes(roles)["base"] == 2 * 8_030_261_248
    # Embeddings and head stay in bfloat16: 128,256 tokens of 4,096 channels, twice; norms too.
    small = 2 * (2 * 128256 * 4096 + 65 * 4096)
    linear = 8_030_261_248 - small // 2
    assert cost.weight_bytes(roles, cost.BYTES_4BIT)["base"] == small + linear * (0.5 + 4 / 64)


def test_only_trained_roles_need_gradients_and_buckets_come_with_processes():
    config = tiny_llama(TOKENIZER).config
    both, one = (
        cost.build_roles(config, None, LORA, torch.float32, trained)
        for trained in (("selector", "generator"), ("generator",))
    )
    alone = cost.training_bytes(both, "adamw_torch_fused")
    assert cost.training_bytes(one, "adamw_torch_fused")["gradients"] == alone["gradients"] / 2
    assert alone["optimizer"] == 2 * alone["gradients"] and alone["buckets"] == 0
    assert cost.training_bytes(both, "adamw_torch_fused", num_processes=2)["buckets"] == alone["gradients"]
    smaller = [cost.training_bytes(both, optim)["optimizer"] for optim in ("lion_32bit", "adafactor", "sgd")]
    assert smaller == sorted(smaller, reverse=True) and smaller[0] == alone["gradients"] and smaller[-1] == 0


def test_operations_of_a_forward_are_those_that_torch_counts():
    model = tiny_llama(TOKENIZER, **SIZES)
    model.set_attn_implementation("eager")
    tokens = torch.ones(2, 96, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model(tokens, use_cache=False)
    weights = sum(each.numel() for each in model.model.layers.parameters())
    assert counter.get_total_flops() / tokens.numel() == pytest.approx(
        cost.flops_per_token(cost.Shape.of(model.config), weights, 96), rel=0.01
    )


def test_work_follows_the_table_of_the_cost_model():
    # docs/performance.md: tokens through a model, P = 100, c = 5, m = 4, G = 30.
    work = cost.Work(100, 5, 30, 6, num_permutations=4, checkpointing=False)
    assert cost.forward_equivalents("selector", work, True, False) == 120 + 20 + 120
    assert cost.forward_equivalents("generator", work, True, False) == 0 + 120 + 120
    checkpointed = cost.Work(100, 5, 30, 6, num_permutations=4, checkpointing=True)
    assert cost.forward_equivalents("selector", checkpointed, True, False) == 120 + 120 + 2 * 120
    assert cost.forward_equivalents("generator", checkpointed, True, True) == 120 + 3 * 120
    assert cost.forward_equivalents("selector", work, False, False) == 120
    assert cost.forward_equivalents("generator", work, False, False) == 120
    # Rows that share nothing, K = 2: 100 for the first choice, 4 (100 + 2.5) for the second, 2 * 4 (100 + 5) to train.
    separate = cost.Work(100, 5, 30, 6, num_permutations=4, checkpointing=False, separate_choices=2)
    assert cost.forward_equivalents("selector", separate, True, False) == 100 + 410 + 840
