# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""What requests may ask for."""

from dataclasses import dataclass, field


@dataclass
class ServerLimits:
    """
    What one request, and all of them together, may ask for.

    Args:
        max_body_bytes (`int`, *optional*, defaults to `1000000`):
            Longest request body; a longer one is answered with 413.
        body_timeout (`float`, *optional*, defaults to `10.0`):
            Seconds in which a body must arrive; else 408.
        max_waiting (`int`, *optional*, defaults to `64`):
            Requests at work or waiting; more are answered with 503. One is at work at a time.
        timeout (`float`, *optional*, defaults to `60.0`):
            Seconds from a request to its answer; else 504.
    """

    max_body_bytes: int = field(default=1_000_000, metadata={"help": "Longest request body, in bytes."})
    body_timeout: float = field(default=10.0, metadata={"help": "Seconds in which a body must arrive."})
    max_waiting: int = field(default=64, metadata={"help": "Requests at work or waiting; more are turned away."})
    timeout: float = field(default=60.0, metadata={"help": "Seconds from a request to its answer."})

    def __post_init__(self):
        for name in ("max_body_bytes", "body_timeout", "max_waiting", "timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} {getattr(self, name)}: it must be above 0")
