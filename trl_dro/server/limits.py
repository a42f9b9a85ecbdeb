# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""What requests may ask for."""

import math
from dataclasses import dataclass, field, fields


@dataclass
class ServerLimits:
    """
    What one request, and all of them together, may ask for.

    Args:
        max_body_bytes (`int`, *optional*, defaults to `1000000`):
            Longest request body; a longer one is answered with 413.
        body_timeout (`float`, *optional*, defaults to `10.0`):
            Seconds in which the header of a request must arrive, then its body, else 408; and in which its reply must
            be taken, else the connection is cut.
        max_connections (`int`, *optional*, defaults to `256`):
            Open connections. One more ends the oldest on which no request is being answered; if there is none it is
            answered with 503.
        max_waiting (`int`, *optional*, defaults to `64`):
            Requests at work or waiting; more are answered with 503.
        max_batch (`int`, *optional*, defaults to `8`):
            Requests that go through the models together. More answer more users per second and take more memory.
        timeout (`float`, *optional*, defaults to `60.0`):
            Seconds from a request to its answer; else 504.

    Raises:
        `ValueError`: a limit is not a finite number above 0.
    """

    max_body_bytes: int = field(default=1_000_000, metadata={"help": "Longest request body, in bytes."})
    body_timeout: float = field(
        default=10.0,
        metadata={"help": "Seconds in which a header must arrive, a body must arrive, and a reply must be taken."},
    )
    max_connections: int = field(default=256, metadata={"help": "Open connections."})
    max_waiting: int = field(default=64, metadata={"help": "Requests at work or waiting; more are turned away."})
    max_batch: int = field(default=8, metadata={"help": "Requests that go through the models together."})
    timeout: float = field(default=60.0, metadata={"help": "Seconds from a request to its answer."})

    def __post_init__(self):
        for limit in fields(ServerLimits):
            value = getattr(self, limit.name)
            if not 0 < value < math.inf:
                raise ValueError(f"--{limit.name} {value}: it must be above 0 and finite")
