# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""`python -m tests.faults`: every bad input, and one table of how it ended."""

import argparse
import collections
import os
import sys
import tempfile
import time


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from .cases import all_cases  # noqa: E402
from .outcome import KINDS, outcome  # noqa: E402
from .world import World  # noqa: E402


def main() -> None:
    """Runs the cases and prints those that did not end in a clear line, and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="Only cases whose area and name contain this.")
    parser.add_argument("--show", action="store_true", help="Print every message.")
    args = parser.parse_args()
    counts: dict[str, collections.Counter[str]] = {}
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults") as folder:
        world = World(folder)
        for case in all_cases():
            if args.only not in f"{case.area}: {case.name}":
                continue
            began = time.monotonic()
            kind, message = outcome(case, world)
            counts.setdefault(case.area, collections.Counter())[kind] += 1
            if kind != "one line" or args.show:
                took = time.monotonic() - began
                print(f"{kind:9} | {case.area}: {case.name} [{took:.1f} s]\n          {message[:400]!r}", flush=True)
    total = sum(counts.values(), collections.Counter())
    print(f"\n{'area':32} {'cases':>6} " + " ".join(f"{kind:>10}" for kind in KINDS))
    for area, count in [*counts.items(), ("all", total)]:
        print(f"{area:32} {sum(count.values()):>6} " + " ".join(f"{count[kind]:>10}" for kind in KINDS))
    print(f"in {time.monotonic() - started:.0f} s")
    sys.exit(total["traceback"] + total["unforeseen"] + total["accepted"] > 0)


if __name__ == "__main__":
    main()
