# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""What needs no data and no model of the user's: an invented world, and the tiny model that ships with the package."""
