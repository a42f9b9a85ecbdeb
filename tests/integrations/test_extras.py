# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import importlib
import sys

import pytest


@pytest.mark.parametrize(
    "module, package, extra",
    [
        ("langchain", "langchain_core.documents", "langchain"),
        ("llama_index", "llama_index.core.schema", "llama-index"),
        ("rerankers", "rerankers.results", "rerankers"),
    ],
)
def test_a_missing_package_names_its_extra(monkeypatch, module, package, extra):
    monkeypatch.setitem(sys.modules, package, None)  # as if it was not installed
    monkeypatch.delitem(sys.modules, f"trl_dro.integrations.{module}", raising=False)
    with pytest.raises(ImportError, match=rf"trl_dro\[{extra}\]"):
        importlib.import_module(f"trl_dro.integrations.{module}")
