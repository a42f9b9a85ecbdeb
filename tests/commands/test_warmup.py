# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import pytest
from trl import ModelConfig, SFTConfig, TrlParser

from trl_dro.commands.warmup import WarmUpArguments, warm_up

from ..trainer.test_dro_trainer import make_dataset


def parse(tmp_path, *arguments):
    make_dataset(4).save_to_disk(tmp_path / "data")
    parser = TrlParser((WarmUpArguments, SFTConfig, ModelConfig))
    flags = ["--dataset_name", str(tmp_path / "data"), "--num_selected", "2", "--dry_run", "--use_cpu", *arguments]
    return parser.parse_args_and_config([*flags, "--output_dir", str(tmp_path / "sft"), "--report_to", "none"])


def test_answers_are_limited_by_the_setting_that_dro_has(tmp_path, capsys):
    warm_up(*parse(tmp_path, "--max_answer_length", "64"))
    assert "Warm-up examples" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"row 0, column answers\[0\]: has \d+ tokens, more than max_answer_length=1"):
        warm_up(*parse(tmp_path, "--max_answer_length", "1"))


def test_a_length_that_would_be_overwritten_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--max_length 99 would cut .* set --max_document_length"):
        warm_up(*parse(tmp_path, "--max_length", "99"))
