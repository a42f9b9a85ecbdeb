# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Settings of DRO that exclude each other."""

from typing import Any


# Settings of transformers that nothing here heeds: name, value that asks for nothing, reason.
_IGNORED = (
    ("label_smoothing_factor", 0.0, "DRO weighs likelihoods, and smoothed labels give none"),
    ("neftune_noise_alpha", None, "likelihoods under noise would be noise in the importance weights"),
    ("train_sampling_strategy", "random", "questions come in random order, block by block"),
    ("include_num_input_tokens_seen", "no", "tokens are logged as tokens_per_second"),
)


def check_combinations(args: Any) -> None:
    """
    Raises `ValueError` if settings cannot be used together; the message names them and the way out.

    Args:
        args ([`~dro_config.DROConfig`]):
            Settings, each of which can be used by itself.
    """
    if not (args.train_selector or args.train_generator):
        raise ValueError("train_selector and train_generator are both False: there is nothing to train")
    if args.remove_unused_columns:
        raise ValueError("remove_unused_columns=True would drop the questions and documents: leave it False")
    for name, neutral, reason in _IGNORED:
        if getattr(args, name) not in (neutral, None):
            raise ValueError(f"{name}={getattr(args, name)!r}: {reason}; leave it {neutral!r}")
    if args.answer_target == "all" and args.answer_likelihood == "mean":
        raise ValueError(
            "answer_target='all' sums likelihoods, and the mean over tokens is none: set answer_likelihood='sum'"
        )
    if args.selector_estimator == "vimco":
        if args.steps_per_estimation != 1 or args.maximization_epochs != 1:
            raise ValueError(
                "selector_estimator='vimco' is a gradient at the selector that drew the permutations; followed "
                "over several updates it has no minimum: set steps_per_estimation=1 and maximization_epochs=1, or "
                "choose rws_centered or rws"
            )
        if args.num_permutations < 2:
            raise ValueError(
                "selector_estimator='vimco' compares permutations with each other: set num_permutations to 2 or more"
            )
        if args.sampling == "distinct":
            raise ValueError(
                "selector_estimator='vimco' needs independent permutations: set sampling='independent', or choose "
                "rws or rws_centered"
            )
        if args.temperature != 1 or args.top_p != 1 or args.selector_likelihood != "constrained":
            raise ValueError(
                "selector_estimator='vimco' needs permutations drawn from the selector itself: set temperature=1, "
                "top_p=1 and selector_likelihood='constrained', or choose rws or rws_centered"
            )
    if args.selector_form == "query_likelihood" and args.selector_likelihood == "full_vocabulary":
        raise ValueError(
            "selector_likelihood='full_vocabulary' is that of written ids, and selector_form='query_likelihood' "
            "writes none: set selector_likelihood='constrained'"
        )
    if args.selector_fit_questions and (args.selector_form != "query_likelihood" or args.query_likelihood_scale == 0):
        raise ValueError(
            f"selector_fit_questions={args.selector_fit_questions} fits the weights of selector_form="
            "'query_likelihood', from a query_likelihood_scale above 0: set both, or leave it out"
        )
    if args.retriever_prior and args.selector_likelihood == "full_vocabulary":
        raise ValueError(
            "selector_likelihood='full_vocabulary' trains a selector to write alone, where no retriever_prior is "
            "added: set retriever_prior=0, or selector_likelihood='constrained'"
        )
    if args.selector_estimator == "rws_centered" and args.selector_likelihood == "full_vocabulary":
        raise ValueError(
            "selector_estimator='rws_centered' subtracts the very gradient by which "
            "selector_likelihood='full_vocabulary' teaches the format: choose rws"
        )
