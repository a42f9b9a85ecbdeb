# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""How the model is trained: expectation maximisation for two roles, and the run around it."""
