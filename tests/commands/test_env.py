# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import platform
import tomllib
from pathlib import Path

import torch

from trl_dro import __version__
from trl_dro.commands.env import EXTRAS, devices, extra_packages, installed, print_environment


def test_every_extra_is_told_of():
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    assert EXTRAS.keys() == project["optional-dependencies"].keys() - {"all"}


def test_versions_devices_and_extras_are_printed(capsys):
    print_environment()
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert lines["python"] == platform.python_version() and lines["trl_dro"] == __version__
    assert lines["torch"] == torch.__version__ and lines["devices"] == devices()
    assert {f"[{extra}]" for extra in EXTRAS} <= lines.keys()


def test_an_extra_is_installed_when_all_its_packages_are():
    assert set(extra_packages("documents")) == {"beautifulsoup4", "pypdf", "python-docx"}
    assert installed("torch") == torch.__version__ and installed("no-such-package-at-all") is None
