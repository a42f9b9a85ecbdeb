# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Settings that several commands have."""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal


if TYPE_CHECKING:
    from ..system.run_folder import LoadOptions


# What retrieves without a corpus, see [`~retrieval.services.open_service`].
SERVICE_HELP = (
    "Service that finds the candidates, instead of a corpus: elasticsearch+URL/INDEX, opensearch+URL/INDEX, "
    "qdrant+URL/COLLECTION, qdrant+file:FOLDER/COLLECTION, or MODULE:FUNCTION that returns a LangChain or LlamaIndex "
    "retriever."
)
DENSE_MODEL_HELP = "sentence-transformers model that encodes questions for a service that searches vectors."

# What every `--corpus` reads, see [`~data.corpus.open_corpus`].
CORPUS_HELP = (
    "Passages: jsonl, tsv, csv (each may be gz), json, parquet, Hub id (`id` or `id:config`); or a document, or a "
    "folder of them, to cut into passages."
)
DATASET_HELP = "Dataset with candidates: a Hub id, a `save_to_disk` folder, or a jsonl or parquet file."


@dataclass
class LaunchArguments:
    """
    In how many processes `trl-dro` starts a command.

    Args:
        accelerate_config (`str`, *optional*):
            Config file of `accelerate launch`.
        num_processes (`int`, *optional*):
            Processes, one for each GPU; as many as there are GPUs by default.
    """

    accelerate_config: str | None = field(
        default=None,
        metadata={"help": "Config file of `accelerate launch`, e.g. recipes/accelerate/two_gpus.yaml."},
    )
    num_processes: int | None = field(
        default=None,
        metadata={
            "help": "Processes, one for each GPU; as many as there are GPUs by default. `accelerate launch` has a "
            "setting of its own, and pays no heed to this one."
        },
    )

    def __post_init__(self):
        check_range(self, ["num_processes"], 1)
        if self.accelerate_config is not None and not os.path.isfile(self.accelerate_config):
            raise ValueError(f"--accelerate_config {self.accelerate_config}: there is no such file; check the path")

    def stays(self) -> bool:
        """Whether the command runs in the process that was called, be there several GPUs."""
        return False


@dataclass(kw_only=True)
class CuttingArguments:
    """
    How documents are cut into passages, see [`~data.chunking.DocumentFolder`].

    Args:
        words_per_passage (`int`, *optional*, defaults to `100`):
            Most words of a passage.
        overlap_words (`int`, *optional*, defaults to `0`):
            Most words of the sentences at the end of a passage with which the next one begins again.
    """

    words_per_passage: int = field(default=100, metadata={"help": "Most words of a passage cut from documents."})
    overlap_words: int = field(
        default=0, metadata={"help": "Most words, in whole sentences, that a passage repeats of the one before."}
    )

    def cut(self) -> tuple[int, int]:
        """Both. Raises `ValueError` if one is out of its range."""
        check_range(self, ["words_per_passage"], 1)
        check_range(self, ["overlap_words"], 0, self.words_per_passage - 1)
        return self.words_per_passage, self.overlap_words


@dataclass(kw_only=True)
class LoadArguments:
    """
    Which system to load, and how.

    Args:
        model (`str`, *optional*):
            Run folder or Hub repo with both roles, or the generator alone.
        selector (`str`, *optional*):
            Selector, if not that of `model`: a run, adapter or model.
        revision (`str`, *optional*):
            Branch, tag or commit of a Hub repo given as `model`.
        base_model (`str`, *optional*):
            Base of the adapters, instead of the one they name.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Precision; `"auto"` takes that in which the base is stored.
        device (`str`, *optional*):
            Device; the accelerator if there is one.
        attn_implementation (`str`, *optional*):
            Attention of transformers.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Load the base in 4 bits (NF4, double quantization).
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that ships with a model.
    """

    model: str | None = field(
        default=None, metadata={"help": "Run folder or Hub repo with both roles, or the generator alone."}
    )
    selector: str | None = field(
        default=None, metadata={"help": "Selector, if not the model's: a run, adapter or model."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model's Hub repo."})
    base_model: str | None = field(default=None, metadata={"help": "Base of the adapters, if not the one they name."})
    dtype: str = field(default="auto", metadata={"help": "Precision; auto takes that in which the base is stored."})
    device: str | None = field(default=None, metadata={"help": "Device; the accelerator if there is one."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention of transformers."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Load the base in 4 bits (NF4)."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether to run code that ships with a model."})

    def load_options(self) -> "LoadOptions":
        """Precision, device and quantization."""
        import torch
        from transformers import BitsAndBytesConfig

        from ..system.run_folder import LoadOptions

        four_bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        return LoadOptions(
            dtype=self.dtype,
            device=self.device,
            quantization_config=four_bits if self.load_in_4bit else None,
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass(kw_only=True)
class AnswerArguments(LoadArguments):
    """
    How a system answers, where that is not as its `rag_config.json` says; see also [`LoadArguments`].

    Args:
        answer_permutations (`int`, *optional*):
            Permutations whose answers are added up, see [`~mixture.answer_questions`].
        min_gain (`float`, *optional*):
            Nats by which documents must make an answer likelier, or it is marked as abstained from.
    """

    answer_permutations: int | None = field(
        default=None,
        metadata={"help": "Answer from so many permutations, and take the answer with the most probability over all."},
    )
    min_gain: float | None = field(
        default=None,
        metadata={"help": "Nats by which documents must make an answer likelier, or it is marked as abstained from."},
    )

    def changes(self, *names: str) -> dict[str, Any]:
        """Fields of [`~rag_config.RAGConfig`] that are set here: these, and those of `names`."""
        names = ("answer_permutations", "min_gain", *names)
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(kw_only=True)
class QuestionArguments(AnswerArguments, LaunchArguments, CuttingArguments):
    """
    Questions that a system is asked, see also [`LoadArguments`], [`LaunchArguments`] and [`CuttingArguments`].

    Args:
        questions (`str`, *optional*):
            Questions, jsonl, whose candidates BM25 retrieves from `corpus`.
        corpus (`str`, *optional*):
            Passages, as for [`~data.corpus.open_corpus`].
        retriever (`str`, *optional*):
            Service that retrieves them instead of BM25, see [`~retrieval.services.open_service`].
        dense_model (`str`, *optional*):
            Model that encodes questions for it, if it searches vectors.
        dataset_name (`str`, *optional*):
            Dataset with candidates, instead: a Hub id, a `save_to_disk` folder, or a jsonl or parquet file.
        dataset_split (`str`, *optional*):
            Its split.
        max_questions (`int`, *optional*):
            Ask the first ones only.
        max_candidates (`int`, *optional*):
            Candidates per question, n, instead of the trained system's.
        tokens_per_batch (`int`, *optional*, defaults to `16384`):
            Prompt tokens computed at a time; halved where memory runs out.
        on_error (`str`, *optional*, defaults to `"stop"`):
            What becomes of rows that cannot be asked, as they are broken or too long: `"stop"` for an error before any
            weights are loaded, `"skip"` to list them in `skipped.jsonl` and do the others.
    """

    questions: str | None = field(
        default=None, metadata={"help": "Questions, jsonl, whose candidates BM25 retrieves from the corpus."}
    )
    corpus: str | None = field(default=None, metadata={"help": CORPUS_HELP})
    retriever: str | None = field(default=None, metadata={"help": SERVICE_HELP})
    dense_model: str | None = field(default=None, metadata={"help": DENSE_MODEL_HELP})
    dataset_name: str | None = field(default=None, metadata={"help": DATASET_HELP})
    dataset_split: str | None = field(default=None, metadata={"help": "Its split."})
    max_questions: int | None = field(default=None, metadata={"help": "Ask the first ones only."})
    max_candidates: int | None = field(default=None, metadata={"help": "Candidates per question, n."})
    tokens_per_batch: int = field(default=16384, metadata={"help": "Prompt tokens computed at a time."})
    on_error: Literal["stop", "skip"] = field(
        default="stop",
        metadata={"help": "Rows that cannot be asked: stop before loading, or skip and list them in skipped.jsonl."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.cut()
        check_range(self, ["max_questions", "max_candidates", "answer_permutations", "tokens_per_batch"], 1)
        if self.num_processes is not None and self.num_processes > 1 and ":" in (self.device or ""):
            raise ValueError(f"--device {self.device} is one device, for which processes would queue: leave it out")

    def stays(self) -> bool:
        """A device that is named is that of one process, unless more are asked for."""
        return self.device is not None and self.num_processes is None and self.accelerate_config is None


def check_range(args: Any, names: Iterable[str], lowest: float, highest: float = math.inf) -> None:
    """Raises `ValueError` if one of these settings is given and out of its range, whose ends are allowed."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not (lowest <= value <= highest and math.isfinite(value)):
            most = "" if highest == math.inf else f" and at most {highest:g}"
            raise ValueError(f"--{name} {value}: it must be at least {lowest:g}{most}")
