# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Questions made of documents, where nobody has asked any yet."""
