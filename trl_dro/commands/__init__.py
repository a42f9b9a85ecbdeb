# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""The command line: a file per command, named as it is typed."""
