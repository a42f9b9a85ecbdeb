# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from trl_dro import LoadOptions, RAGPipeline
from trl_dro.integrations.rewards import AnswerLikelihoodReward, prompt_dataset
from trl_dro.model.roles import ROLES

from ..test_faults import make_trainer
from ..tiny_models import tiny_llama
from ..trainer.test_dro_trainer import make_dataset


DATASET = make_dataset(6)
RECORDS = DATASET.to_list()


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    make_trainer(folder, max_answer_length=6).save_model()
    return RAGPipeline.from_pretrained(folder, options=LoadOptions(device="cpu"))


def reward(pipe, completions, record=RECORDS[0], **settings):
    columns = {name: [record[name]] * len(completions) for name in ("question", "answers", "documents")}
    function = AnswerLikelihoodReward(pipe.rag, **settings)
    return function(prompts=[""] * len(completions), completions=completions, trainer_state=None, **columns)


def logp(pipe, permutation, mean=False):
    with torch.no_grad():
        permutations = torch.tensor([[permutation]], dtype=torch.long)
        return pipe.rag.answer_logps(RECORDS[:1], [RECORDS[0]["answers"][:1]], permutations, mean).item()


def test_reward_is_the_log_likelihood_of_the_first_answer(pipe):
    rewards = reward(pipe, ["[3] > [1]", "[1] > [3]", "I choose [2] and [4]."])
    assert rewards == pytest.approx([logp(pipe, z) for z in ([3, 1], [1, 3], [2, 4])], abs=1e-3)
    assert len({round(each, 3) for each in rewards}) == 3
    assert reward(pipe, ["[3] > [1]"], mean=True) == pytest.approx([logp(pipe, [3, 1], mean=True)], abs=1e-3)


def test_faults_of_form_cost_and_the_rest_is_read(pipe):
    completions = ["[3]", "[3] > [3]", "[3] > [9] > [1]", "nothing", ""]
    read = [([3], 1), ([3], 2), ([3, 1], 1), ([], 2), ([], 2)]
    expected = [logp(pipe, z) - 2.0 * num_faults for z, num_faults in read]
    assert reward(pipe, completions, format_penalty=2.0) == pytest.approx(expected, abs=1e-3)


def test_where_none_may_be_selected_none_is_no_fault(pipe, pipe_of_none):
    completions = ["", "[9]", "[3]", "[3] > [1] > [2]"]
    read = [([], 0), ([], 1), ([3], 0), ([3, 1], 1)]
    expected = [logp(pipe_of_none, z) - 2.0 * num_faults for z, num_faults in read]
    assert reward(pipe_of_none, completions, format_penalty=2.0) == pytest.approx(expected, abs=1e-3)
    assert reward(pipe, [""], format_penalty=2.0) == pytest.approx([logp(pipe, []) - 2 * 2.0], abs=1e-3)


def test_batches_and_messages_do_not_matter(pipe):
    texts = ["[3] > [1]", "[2]", "[4] > [2]", "none", "[1] > [2]"]
    expected = reward(pipe, texts)
    assert reward(pipe, texts, batch_size=1) == pytest.approx(expected, abs=1e-3)
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert reward(pipe, messages) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("role", ROLES)
def test_prompts_show_what_the_role_is_shown(pipe, role):
    dataset = prompt_dataset(make_dataset(3, num_documents=6), pipe, role)
    shown = 4 if role == "selector" else 2
    for record, prompt in zip(make_dataset(3, num_documents=6), dataset["prompt"], strict=True):
        assert prompt == pipe.rag.prompts[role].write(record["question"], record["documents"][:shown])
    assert {len(documents) for documents in dataset["documents"]} == {shown}
    assert set(dataset.column_names) == {"question", "answers", "documents", "prompt"}


def test_a_selector_that_writes_nothing_has_no_prompts(tmp_path):
    make_trainer(tmp_path, selector_form="query_likelihood").save_model()
    pipe = RAGPipeline.from_pretrained(tmp_path, options=LoadOptions(device="cpu"))
    with pytest.raises(ValueError, match="scores documents .* train it with DROTrainer"):
        prompt_dataset(make_dataset(3), pipe)
    assert len(prompt_dataset(make_dataset(3), pipe, "generator")) == 3


@pytest.mark.parametrize("config, trainer", [(GRPOConfig, GRPOTrainer), (RLOOConfig, RLOOTrainer)])
def test_trls_own_trainers_train_a_selector_with_it(pipe, tmp_path, config, trainer):
    tokenizer = pipe.rag.tokenizers["selector"]
    args = config(
        str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        max_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    grpo = trainer(
        model=tiny_llama(tokenizer, seed=3),
        reward_funcs=AnswerLikelihoodReward(pipe.rag),
        args=args,
        train_dataset=prompt_dataset(DATASET, pipe),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
    )
    before = {n: p.detach().clone() for n, p in grpo.model.named_parameters() if p.requires_grad}
    grpo.train()
    rewards = [logs["rewards/answer_log_likelihood/mean"] for logs in grpo.state.log_history if "reward" in logs]
    assert len(rewards) == 2 and all(each < 0 for each in rewards)
    assert any(not torch.equal(before[n], p) for n, p in grpo.model.named_parameters() if n in before)
