import importlib.util
from pathlib import Path

import pytest

from trl_dro.demo.tiny import GENERATOR_TEMPLATE, SELECTOR_TEMPLATE


@pytest.fixture(scope="module")
def script():
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install trl_dro[plots]")
    path = Path(__file__).resolve().parents[2] / "examples" / "demo.py"
    spec = importlib.util.spec_from_file_location("demo", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse(script, *arguments):
    return script.parse_arguments([*map(str, arguments), "--use_cpu"])


def test_flags_win_over_the_recipe_and_need_not_name_it(script):
    world, args, model = parse(script, "--seed", 5, "--num_permutations", 2)
    assert (args.seed, args.num_permutations, args.num_selected, world.world_seed) == (5, 2, 3, 7)
    assert model.use_peft


def test_recipe_has_the_prompts_that_the_tiny_model_was_trained_with(script):
    _, args, _ = parse(script)
    assert (args.selector_template, args.generator_template) == (SELECTOR_TEMPLATE, GENERATOR_TEMPLATE)


def test_warm_start_dro_table_and_figure(script, tmp_path, capsys):
    script.main(
        *parse(
            script,
            *("--output_dir", tmp_path, "--num_train", 8, "--num_eval", 4, "--warmup_questions", 8),
            *("--warmup_batch_size", 4, "--max_steps", 1, "--logging_steps", 1, "--max_candidates", 6),
            *("--per_device_train_batch_size", 2, "--num_permutations", 2),
        )
    )
    output = capsys.readouterr().out
    assert all(name in output for name in ("retriever (BM25)", "warm start", "DRO", "Recall@3, %"))
    # Logs of the warm start, too, are lines and no dicts.
    assert "Warm start of the selector, 8 examples." in output and output.count("trained for") == 3
    assert "{'" not in output
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    for folder in ("selector", "generator", "warm_start/selector", "warm_start/generator"):
        assert (tmp_path / folder / "adapter_model.safetensors").is_file()
