# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""`trl-dro write-back`: answers enter a corpus as passages if they pass three gates, and leave it again."""

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..data.corpus import open_corpus
from ..data.lines import read_json_object, read_jsonl, require_file, require_key
from ..data.resumable import SETTINGS_FILE, write_json
from ..data.schema import DatasetError
from ..data.storage import DEFAULT_CACHE_DIR, make_folder
from ..retrieval import BM25Retriever
from ..synthetic.write_back import (
    GATES,
    EntailmentSupport,
    GeneratorSupport,
    Support,
    add_passages,
    remove_passages,
    sift_pairs,
)
from ..system.pipeline import RAGPipeline
from .arguments import LoadArguments, check_range
from .questions import SUMMARY_FILE, write_lines


WRITTEN_FILE, REFUSED_FILE = "written.jsonl", "refused.jsonl"


@dataclass(kw_only=True)
class WriteBackArguments(LoadArguments):
    """
    Answers, the corpus that they enter, and who judges them; see also [`LoadArguments`].

    Args:
        predictions (`str`, *optional*):
            Answers, the `predictions.jsonl` of `trl-dro predict`.
        corpus (`str`):
            Passages, a jsonl file, to which those that pass are added.
        output_dir (`str`, *optional*, defaults to `"write_back"`):
            Folder of `written.jsonl`, `refused.jsonl` and `summary.json`.
        min_gain (`float`, *optional*, defaults to `2.0`):
            Nats by which a cited passage must make the answer likelier to the generator of `model`.
        nli_model (`str`, *optional*):
            Cross-encoder of sentence-transformers for natural language inference that judges instead of `model`.
        min_entailment (`float`, *optional*, defaults to `0.5`):
            Its least probability of entailment.
        remove (`bool`, *optional*, defaults to `False`):
            Remove all that was written back from the corpus, and do nothing else.
        cache_dir (`str`, *optional*, defaults to `$HF_HOME/trl_dro`):
            Where corpora and indexes are kept.
    """

    predictions: str | None = field(default=None, metadata={"help": "Answers: predictions.jsonl of trl-dro predict."})
    corpus: str = field(metadata={"help": "Passages, a jsonl file, to which those that pass are added."})
    output_dir: str = field(
        default="write_back", metadata={"help": "Folder of written.jsonl, refused.jsonl and summary.json."}
    )
    min_gain: float = field(
        default=2.0, metadata={"help": "Nats by which a cited passage must make the answer likelier to the model."}
    )
    nli_model: str | None = field(
        default=None, metadata={"help": "Cross-encoder for natural language inference that judges instead."}
    )
    min_entailment: float = field(default=0.5, metadata={"help": "Its least probability of entailment."})
    remove: bool = field(default=False, metadata={"help": "Remove all that was written back, and do nothing else."})
    cache_dir: str = field(
        default=str(DEFAULT_CACHE_DIR), metadata={"help": "Where corpora and indexes are kept, by their content."}
    )

    def __post_init__(self):
        if not self.corpus.endswith(".jsonl"):
            raise ValueError(f"--corpus {self.corpus}: only a .jsonl file can be added to: name one")
        if self.remove:
            if self.predictions is not None:
                raise ValueError("--remove adds nothing: leave out the predictions")
            return
        if self.predictions is None:
            raise ValueError("nothing to write back: name the predictions.jsonl of trl-dro predict")
        if (self.model is None) == (self.nli_model is None):
            raise ValueError("pass either --model, the run that answered, or --nli_model, to judge the answers")
        check_range(self, ["min_entailment"], 0, 1)


def write_back(args: WriteBackArguments) -> dict[str, Any]:
    """
    Adds answered questions to a corpus as passages if they pass every gate, or removes all that were added.

    Args:
        args ([`WriteBackArguments`]):
            Answers, corpus and judge.

    Returns:
        `dict[str, Any]`: `num_written`, `refused` by gate, as in `summary.json`; or `num_removed`.

    Raises:
        `DatasetError`: the answers or the corpus cannot be read.
        `ValueError`: the judge cannot be loaded.
    """
    path = Path(args.corpus)
    require_file(path)
    if args.remove:
        removed = remove_passages(path)
        print(f"{removed:,} passages that were written back are removed from {path}.")
        return {"num_removed": removed}
    rows = _read_answers(str(args.predictions))
    corpus = open_corpus(path, args.cache_dir)
    folder = make_folder(args.output_dir)
    support: Support
    if args.nli_model is not None:
        support = EntailmentSupport(args.nli_model, args.min_entailment, args.device)
    else:
        pipe = RAGPipeline.from_pretrained(
            str(args.model),
            args.selector,
            revision=args.revision,
            base_model=args.base_model,
            options=args.load_options(),
        )
        support = GeneratorSupport(pipe.rag, args.min_gain)
    retriever = BM25Retriever()
    retriever.index(corpus, Path(args.cache_dir) / "indexes")
    date = datetime.now(UTC).isoformat(timespec="seconds")
    provenance = {"date": date, "system": _system(Path(str(args.predictions)), args.model)}
    written, refused = sift_pairs(rows, corpus, retriever, support, provenance)
    counts = Counter(each["gate"] for each in refused)
    summary = {"num_written": len(written), "refused": {gate: counts[gate] for gate in GATES}, **provenance}
    write_lines(folder / REFUSED_FILE, refused)
    write_lines(folder / WRITTEN_FILE, written)
    write_json(folder / SUMMARY_FILE, summary)
    if written:
        add_passages(path, written)
    print(f"{len(rows):,} answers:")
    for gate in GATES:
        print(f"  refused for {gate:20}{counts[gate]:6,}")
    print(f"  {'written':32}{len(written):6,}")
    print(f"What was refused, with reasons, is in {folder / REFUSED_FILE}. --remove takes all back out of {path}.")
    return summary


def _read_answers(path: str) -> list[dict[str, Any]]:
    rows = []
    for where, row in read_jsonl(path):
        for key in ("question", "answer", "citations"):
            require_key(row, key, where)
        if not isinstance(row["answer"], str) or not isinstance(row["question"], str | list):
            raise DatasetError(f"{where}: question and answer must be texts: pass a file that trl-dro predict wrote")
        if not isinstance(row["citations"], list) or not all(
            isinstance(each, dict) and isinstance(each.get("id"), str | None) for each in row["citations"]
        ):
            raise DatasetError(f"{where}, key citations: must be a list of objects with an id: run predict again")
        rows.append(row)
    return rows


def _system(predictions: Path, model: str | None) -> Any:
    """What answered, by the settings beside the predictions, else what judges."""
    settings = predictions.with_name(SETTINGS_FILE)
    if not settings.is_file():
        return {"model": model}
    found = read_json_object(settings)
    return {name: found[name] for name in ("model", "selector", "weights") if found.get(name)}
