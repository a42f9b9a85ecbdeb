# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import socket
import sys

import pytest
from trl import TrlParser

from trl_dro.commands.serve import ServeArguments, serve, served_name
from trl_dro.server.limits import ServerLimits


def test_limits_and_model_are_checked():
    with pytest.raises(ValueError, match="--timeout 0: it must be above 0"):
        ServerLimits(timeout=0)
    with pytest.raises(ValueError, match="nothing to serve"):
        ServeArguments()


def test_arguments_come_from_the_command_line_and_stay_on_this_machine():
    [args] = TrlParser((ServeArguments,)).parse_args_and_config(["--model", "run", "--timeout", "5"])
    assert (args.model, args.host, args.timeout, args.max_waiting) == ("run", "127.0.0.1", 5.0, 64)


def test_a_missing_package_names_its_extra_before_a_model_is_looked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "trl_dro.server.app", raising=False)
    with pytest.raises(ImportError, match=r"trl_dro\[serve\]"):
        serve(ServeArguments(model="there/is no such model"))


def test_a_model_that_is_not_there_is_named():
    pytest.importorskip("fastapi", reason="needs the extra serve")
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    with pytest.raises(ValueError, match="there is no folder /nowhere"):
        serve(ServeArguments(model="/nowhere", port=0))


@pytest.mark.parametrize("key", ["", " ", "a b", "a\n"])
def test_a_key_that_no_request_can_send_is_refused_before_a_model_is_looked_for(monkeypatch, key):
    pytest.importorskip("fastapi", reason="needs the extra serve")
    monkeypatch.setenv("TRL_DRO_API_KEY", key)
    with pytest.raises(ValueError, match="TRL_DRO_API_KEY is empty or holds white space"):
        serve(ServeArguments(model="/nowhere"))


def test_a_taken_port_is_named_before_a_model_is_looked_for():
    pytest.importorskip("fastapi", reason="needs the extra serve")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ValueError, match="in use"):
        serve(ServeArguments(model="/nowhere", port=taken.getsockname()[1]))


def test_clients_call_a_system_by_its_hub_id_or_its_folder(tmp_path, monkeypatch):
    (tmp_path / "llama3-dro").mkdir()
    monkeypatch.chdir(tmp_path / "llama3-dro")
    assert served_name(str(tmp_path / "llama3-dro")) == served_name(".") == "llama3-dro"
    assert served_name("me/llama3-dro") == "me/llama3-dro"
