# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""`trl-dro report`: a run on one page."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class ReportArguments:
    """
    What `trl-dro report` puts on a page.

    Args:
        run (`str`):
            Output folder of a trainer, at the end of training or in the midst of it.
        output_dir (`str`, *optional*):
            Folder of `report.html` and of the figures; `report` in the run's folder by default.
        evaluation (`list[str]`, *optional*):
            Folders of `trl-dro evaluate`, whose causes of errors are shown too, and answers of the last one.
    """

    run: str = field(metadata={"help": "Output folder of a training run."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of the page and its figures; RUN/report by default."}
    )
    evaluation: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders of `trl-dro evaluate` whose errors to show; answers are of the last one."},
    )


def report(args: ReportArguments) -> Path:
    """
    Writes `report.html`, which holds everything it shows, and each figure as PNG; see [`~report.write_report`].

    Args:
        args ([`ReportArguments`]):
            Run and output folder.

    Returns:
        `Path`: the page.
    """
    from ..report import write_report  # only here, as its packages are an extra

    return write_report(args.run, args.output_dir, args.evaluation)
