# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
How far the E-step's estimates are from the truth, for independent and for distinct permutations.

Random selectors over 2 of 8 documents, of which one holds the answer, whose 56 permutations can be enumerated. For
each of three sharpnesses, and m of 2, 4 and 8: the mean squared error of the selector's gradient (by its 8 logits,
estimator `rws_centered`) and of the posterior over permutations. Permutations are drawn, weighed and scored by the
package's own code; only the model is a stand-in, whose logits are the same after every prompt.

```bash
python benchmarks/estimators.py
```

The last columns draw as many distinct permutations as m independent ones have on average: what the generator scores is
then the same. Changes are of the means over selectors, with their standard errors by the paired differences of these.
"""

import argparse
import itertools
import math
import time
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import AutoTokenizer

from trl_dro.demo.tiny import TINY_MODEL
from trl_dro.model.codec import PermutationCodec
from trl_dro.model.distinct import sample_distinct_permutations
from trl_dro.model.importance import importance_weights, selector_coefficients
from trl_dro.model.likelihood import CompletionLogits
from trl_dro.model.permutation import permutation_logps
from trl_dro.model.sampling import PermutationSamples, sample_permutations
from trl_dro.model.shared_prefix import Columns, ReadPrompts


NUM_DOCUMENTS, NUM_SELECTED = 8, 2
SHARPNESS = {"flat": 0.5, "sharp": 2.5, "very sharp": 4.5}  # standard deviation of the logits
LIKELIHOODS = 0.02, 0.9  # of the answer, without and with the document that holds it


class ConstantModel:
    """A selector whose logits are the same after every prompt: ids are chosen by Plackett and Luce's model."""

    device = torch.device("cpu")

    def __init__(self, codec: PermutationCodec, vocabulary: int, document_logits: Tensor):
        self.codec = codec
        [position] = {len(tokens) - 1 for tokens in codec.id_tokens.values()}  # ids are one choice each
        ids = torch.tensor([codec.id_tokens[i][position] for i in range(1, NUM_DOCUMENTS + 1)])
        self.logits = torch.zeros(vocabulary).index_copy(0, ids, document_logits)  # [V]

    def read(self, times: int) -> ReadPrompts:
        begun = [self.codec.forced_start(NUM_DOCUMENTS)] * times
        nothing = torch.zeros(times, 0, dtype=torch.long)
        return ReadPrompts([[]] * times, begun, None, Columns(nothing, nothing), self.logits.expand(times, -1))

    def extend(self, read, tokens, positions, parents=None):
        return self.logits.expand(sum(bool(new) for row in tokens for new in row), -1), read

    def complete(self, written: list[list[int]]) -> CompletionLogits:
        lengths = [len(tokens) for tokens in written]
        tokens = torch.tensor(list(itertools.chain.from_iterable(written)))
        return CompletionLogits(self.logits.expand(len(tokens), -1), tokens, lengths)


class Truth(SimpleNamespace):
    """One selector enumerated: `logps` and `posterior` of the 56 permutations, their `scores` (gradients of log p)."""


def enumerate_selector(codec: PermutationCodec, vocabulary: int, sharpness: float, seed: int) -> Truth:
    generator = torch.Generator().manual_seed(seed)
    document_logits = (sharpness * torch.randn(NUM_DOCUMENTS, generator=generator)).requires_grad_()
    holder = int(torch.randint(NUM_DOCUMENTS, (1,), generator=generator)) + 1
    model = ConstantModel(codec, vocabulary, document_logits)
    everything = list(itertools.permutations(range(1, NUM_DOCUMENTS + 1), NUM_SELECTED))
    logps = permutation_logps(model.complete, codec, everything, [NUM_DOCUMENTS] * len(everything))
    scores = torch.stack([torch.autograd.grad(logp, document_logits, retain_graph=True)[0] for logp in logps])
    answer_logps = torch.tensor([LIKELIHOODS[holder in z] for z in everything]).log()
    model.logits, logps = model.logits.detach(), logps.detach()
    posterior = (logps + answer_logps).softmax(dim=-1)
    return Truth(
        model=model,
        index={z: i for i, z in enumerate(everything)},
        entropy=-(logps.exp() * logps).sum().item(),
        scores=scores,  # [56, 8]
        answer_logps=answer_logps,
        posterior=posterior,
        gradient=posterior @ scores,
    )


def errors(truth: Truth, samples: PermutationSamples) -> Tensor:
    """Squared errors of gradient and posterior by each of B samples, `(B, 2)`."""
    places = torch.tensor([[truth.index[tuple(z)] for z in row] for row in samples.permutations.tolist()])
    answer_logps = truth.answer_logps[places]
    coefficients = selector_coefficients(answer_logps, samples.correction, estimator="rws_centered")
    gradient = (coefficients.unsqueeze(-1) * truth.scores[places]).sum(dim=1)
    weights = importance_weights(answer_logps, samples.correction)
    posterior = torch.zeros(len(places), len(truth.index)).scatter_add(1, places, weights)
    return torch.stack(
        [
            (gradient - truth.gradient).square().sum(dim=-1),
            (posterior - truth.posterior).square().sum(dim=-1),
        ],
        dim=-1,
    )


def measure(codec: PermutationCodec, truth: Truth, m: int, draws: int) -> dict[str, Tensor]:
    """Mean squared errors, `(2,)`, by how permutations are drawn; and the distinct ones among independent ones."""
    model, seeds = truth.model, range(draws)

    def draw(sample, size: int, seeds) -> PermutationSamples:
        return sample(model, codec, model.read(len(seeds)), [NUM_DOCUMENTS] * len(seeds), size, seeds=seeds)

    independent = draw(sample_permutations, m, seeds)
    unique = torch.tensor([len({tuple(z) for z in row}) for row in independent.permutations.tolist()])
    mean = unique.double().mean().item()
    fewer = draws - round(draws * (mean % 1))  # of so many draws one permutation less, for the same mean
    sizes = {math.floor(mean): seeds[:fewer], math.floor(mean) + 1: seeds[fewer:]}
    matched = [errors(truth, draw(sample_distinct_permutations, size, own)) for size, own in sizes.items() if own]
    return {
        "independent": errors(truth, independent).mean(dim=0),
        "distinct": errors(truth, draw(sample_distinct_permutations, m, seeds)).mean(dim=0),
        "as many distinct": torch.cat(matched).mean(dim=0),
        "unique": unique.double().mean(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--selectors", type=int, default=10, help="Random selectors of each sharpness.")
    parser.add_argument("--draws", type=int, default=100, help="Samples drawn from each.")
    args = parser.parse_args()
    start = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    codec = PermutationCodec(tokenizer, NUM_DOCUMENTS, NUM_SELECTED)
    print("Mean squared error of the selector's gradient / of the posterior over permutations\n")
    print("| selector | entropy, nats | m | independent | unique | m distinct | change | unique distinct | change |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, sharpness in SHARPNESS.items():
        truths = [enumerate_selector(codec, len(tokenizer), sharpness, seed) for seed in range(args.selectors)]
        entropy = sum(truth.entropy for truth in truths) / len(truths)
        for m in (2, 4, 8):
            measured = [measure(codec, truth, m, args.draws) for truth in truths]
            mean = {key: torch.stack([each[key] for each in measured]).mean(dim=0) for key in measured[0]}

            def shown(key: str, mean: dict[str, Tensor] = mean) -> str:
                return " / ".join(f"{value:.3f}" for value in mean[key].tolist())

            def change(key: str, measured=measured, mean: dict[str, Tensor] = mean) -> str:
                ratio = mean[key] / mean["independent"]
                # Of a ratio of means, by the delta method.
                left = torch.stack(
                    [(each[key] - ratio * each["independent"]) / mean["independent"] for each in measured]
                )
                error = left.std(dim=0) / len(measured) ** 0.5
                pairs = zip((ratio - 1).tolist(), error.tolist(), strict=True)
                return " / ".join(f"{100 * value:+.0f} ± {100 * deviation:.0f}%" for value, deviation in pairs)

            print(
                f"| {name} | {entropy:.1f} | {m} | {shown('independent')} | {mean['unique']:.1f} "
                f"| {shown('distinct')} | {change('distinct')} "
                f"| {shown('as many distinct')} | {change('as many distinct')} |"
            )
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
