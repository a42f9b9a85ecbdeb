# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Push and download with the real client, against a Hub on this machine."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from .loopback import TOKEN, LoopbackHub


pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def client(hub, home, *arguments, token=None):
    """Runs `client.py` as a user with a home of their own, and returns its result."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "CI": "1", "PYTHONPATH": str(ROOT)}
    if token:
        environment["HF_TOKEN"] = token
    process = subprocess.run(
        [sys.executable, "-m", "tests.hub.client", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in process.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, process.stderr[-4000:]
    return json.loads(lines[-1].removeprefix("RESULT"))


@pytest.fixture(scope="module")
def hub():
    server = LoopbackHub()
    yield server
    server.close()


@pytest.fixture(scope="module")
def everything(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("push")
    return folder, client(hub, folder / "home", "push_everything", folder)


@pytest.fixture(scope="module")
def pushed(everything):
    return everything[1]["run"]


@pytest.fixture(scope="module")
def downloaded(hub, pushed, tmp_path_factory):
    return client(hub, tmp_path_factory.mktemp("download"), "download", pushed["revision"])


def test_a_repo_has_both_roles_and_all_that_goes_with_them_and_no_checkpoint(hub, pushed):
    _, files = hub.repos["me/tiny-dro"].files("main")
    expected = {"base/model.safetensors", "rag_config.json", "metrics.json", "README.md"}
    for role in ("selector", "generator"):
        expected |= {
            f"{role}/{name}" for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json")
        }
    assert expected <= set(files)
    hidden = {name for name in files if name.startswith((".", "_"))} - {".gitattributes"}
    assert not hidden and not [name for name in files if "checkpoint" in name]
    assert json.loads(files["metrics.json"])["em"] >= 0


def test_every_save_pushed_the_roles_as_they_were_then(hub, pushed):
    repo = hub.repos["me/tiny-dro"]
    weights = [
        {files[f"{role}/adapter_model.safetensors"] for role in ("selector", "generator")}
        for files in repo.commits.values()
        if "selector/adapter_model.safetensors" in files
    ]
    assert (
        len(weights) >= 4 and len(set.union(*weights)) >= 5
    )  # two steps, the end, again; the selector was left alone


def test_the_card_tells_base_dataset_results_and_how_to_load(hub, pushed):
    _, files = hub.repos["me/tiny-dro"].files(pushed["revision"])
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "peft" and {"trl", "dro", "rag"} <= set(card.data.tags)
    assert card.data.datasets == ["me/nq-top20"]
    metrics = json.loads(files["metrics.json"])
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results["Exact match"] == pytest.approx(100 * metrics["em"], abs=0.01)
    assert results["Recall@1 of the selection"] == pytest.approx(100 * metrics["recall@1"], abs=0.01)
    assert {result.dataset_name for result in card.data.eval_results} == {"me/nq-top20"}
    for text in (
        "2505.03075",
        'RAGPipeline.from_pretrained("me/tiny-dro")',
        'subfolder="selector"',
        "| `seed` | 42 |",
    ):
        assert text in card.text


@pytest.fixture(scope="module")
def warmed_up(everything):
    return everything[0] / "warm", everything[1]["warm-up"]


@pytest.fixture(scope="module")
def from_folder(everything):
    return everything[0] / "local", everything[1]["from a folder"]


def test_no_token_is_written_or_uploaded_by_any_command(hub, pushed, warmed_up, from_folder):
    uploaded = [item for repo in hub.repos.values() for files in repo.commits.values() for item in files.items()]
    written = [
        (str(path), path.read_bytes())
        for folder in (Path(pushed["folder"]), warmed_up[0] / "sft", from_folder[0] / "run")
        for path in folder.rglob("*")
        if path.is_file()
    ]
    assert any(name.endswith("training_args.bin") for name, _ in written) and len(uploaded) > 50
    assert not [name for name, data in uploaded + written if TOKEN.encode() in data]


def test_a_warm_up_pushes_both_roles_as_a_run_does(hub, warmed_up):
    _, files = hub.repos["me/tiny-sft"].files("main")
    roles = {f"{role}/adapter_model.safetensors" for role in ("selector", "generator")}
    assert roles | {"rag_config.json"} <= set(files)
    assert files["selector/adapter_model.safetensors"] != files["generator/adapter_model.safetensors"]
    assert not [name for name in files if name.endswith(".bin") or "checkpoint" in name]
    assert warmed_up[1]["num_selected"] == 2


def test_nothing_is_uploaded_but_what_a_user_of_the_system_needs(hub, pushed, from_folder):
    folder, result = from_folder
    assert result["stray"]  # it lay there
    for repo in ("me/local-dro", "me/tiny-dro"):
        _, files = hub.repos[repo].files("main")
        rest = {name for name in files if not re.match(r"(base|last-checkpoint|(selector|generator)(/base)?)/", name)}
        assert rest == {".gitattributes", "README.md", "metrics.json", "rag_config.json"}
        assert {name.split("/")[-1] for name in files if name.startswith(("selector/", "generator/"))} <= {
            "role.json",
            *("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"),
            *("chat_template.jinja", "special_tokens_map.json"),
        }
    _, files = hub.repos["me/local-dro"].files("main")
    assert not [name for name, data in files.items() if str(folder).encode() in data or b"sk-secret" in data]
    assert json.loads(files["selector/adapter_config.json"])["base_model_name_or_path"] is None
    assert "last-checkpoint/optimizer.pt" in files  # asked for by hub_strategy


def test_a_fresh_process_answers_as_before_the_push(pushed, downloaded):
    assert downloaded["main"] == pushed["again"] and pushed["first"] != pushed["again"]


def test_a_revision_is_pinned(pushed, downloaded):
    assert downloaded["pinned"] == pushed["first"]


def test_plain_peft_loads_each_role(downloaded):
    assert downloaded["plain selector"] < 1e-4 and downloaded["plain generator"] < 1e-4


def test_a_private_repo_opens_with_its_token_alone(hub, pushed, downloaded):
    assert hub.repos["me/secret-dro"].private and not hub.repos["me/tiny-dro"].private
    assert downloaded["private"] == pushed["again"]
    assert downloaded["no token"].startswith("there is no folder or Hub repo me/secret-dro, or it is private")


def test_what_is_not_there_is_named_in_one_line(downloaded):
    assert downloaded["missing"].startswith("there is no folder or Hub repo me/nothing")
    assert downloaded["no revision"].startswith("me/tiny-dro has no revision v9")
    assert not [name for name in ("missing", "no token", "no revision") if "\n" in downloaded[name]]


def test_a_connection_cut_half_way_is_tried_again(pushed, downloaded):
    assert downloaded["cut twice"] == pushed["again"]


def test_a_download_that_never_succeeds_loads_nothing_and_goes_on_later(pushed, downloaded):
    assert "could not be downloaded" in downloaded["cut always"] and "\n" not in downloaded["cut always"]
    assert downloaded["cut no more"] == pushed["again"]


def test_training_arguments_are_pickled_without_the_token():
    from trl_dro import DROConfig

    kwargs = {"token": "hf_secret", "dtype": "auto"}
    args = DROConfig("out", hub_token="hf_secret", report_to="none", model_init_kwargs=kwargs)
    assert args.hub_token == args.model_init_kwargs["token"] == "hf_secret"
    assert b"hf_secret" not in pickle.dumps(args)
    assert pickle.loads(pickle.dumps(args)).model_init_kwargs["dtype"] == "auto"
