# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import pytest

from trl_dro import DROConfig


EXCLUSIVE = [
    ({"train_selector": False, "train_generator": False}, "nothing to train"),
    ({"remove_unused_columns": True}, "remove_unused_columns=True would drop the questions"),
    ({"answer_target": "all", "answer_likelihood": "mean"}, "answer_target='all'.*set answer_likelihood='sum'"),
    ({"selector_estimator": "vimco", "num_permutations": 1}, "set num_permutations to 2 or more"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1: .*leave it 0.0"),
    ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0: .*leave it None"),
    ({"train_sampling_strategy": "group_by_length"}, "leave it 'random'"),
    ({"include_num_input_tokens_seen": "all"}, "leave it 'no'"),
    ({"selector_estimator": "vimco", "steps_per_estimation": -1}, "several updates it has no minimum"),
    ({"selector_estimator": "vimco", "maximization_epochs": 2}, "choose rws_centered or rws"),
    ({"selector_estimator": "vimco", "temperature": 0.5}, "selector_estimator='vimco' needs permutations drawn"),
    ({"selector_estimator": "vimco", "top_p": 0.9}, "selector_estimator='vimco' needs permutations drawn"),
    ({"selector_estimator": "vimco", "selector_likelihood": "full_vocabulary"}, "vimco' needs permutations drawn"),
    ({"selector_estimator": "rws_centered", "selector_likelihood": "full_vocabulary"}, "choose rws"),
    ({"sampling": "distinct", "selector_estimator": "vimco"}, "needs independent permutations"),
    (
        {
            "selector_form": "query_likelihood",
            "selector_likelihood": "full_vocabulary",
            "selector_estimator": "rws",
        },
        "set selector_likelihood='constrained'",
    ),
    (
        {"retriever_prior": 1.0, "selector_likelihood": "full_vocabulary", "selector_estimator": "rws"},
        "set retriever_prior=0",
    ),
]


@pytest.mark.parametrize("settings, message", EXCLUSIVE, ids=[str(settings) for settings, _ in EXCLUSIVE])
def test_settings_that_exclude_each_other_are_one_line_that_tells_the_way_out(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        DROConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **settings)
    assert "\n" not in str(error.value)
