"""Token sequences out of a language model itself, where there are no texts to show it.

What it does      Opens every row with a random token, takes the likeliest for three to five more, and then draws each token from
                  what the model says comes next.
When to use       A causal language model of tokens, and no texts of its kind: ranges for int8, lessons.
When not          Some hundred real texts can be had. Masked language models and encoders: they have no next token.
Cost to run       A forward pass of the whole model for every token of a row: rows * tokens passes of full length.
What it changes   Nothing: a copy is used.
Example           inputs = fw.synthesize(model, example={"input_ids": torch.zeros(2, 128, dtype=torch.long)}, rows=256)
Known problems    First tokens are drawn from the whole vocabulary: also those that no text begins with, and those that training
                  never saw. A row does not end where the model would end it. No cache of keys is used.
Source            Liu et al. 2023, arXiv:2305.17888 (LLM-QAT), section 2.1: the first three to five tokens by the likeliest, the
                  rest drawn at temperature 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flyweight.errors import Interrupted, ModelError
from flyweight.graph.heard import heard
from flyweight.numerics.divergence import main_output

__all__ = ["generated", "looked_up", "other_inputs", "vocabulary"]

LIKELIEST = (3, 4, 5)  # tokens behind the first, row by row in turn
UNMOVED = 1e-4  # of the largest logit: what rounding may move earlier places by
Answer = Callable[[Tensor], Any]  # tokens [rows, places] -> what the model returns


def looked_up(model: nn.Module, answer: Answer, tokens: Tensor) -> int | None:
    """How many tokens the embedding knows that the model looks `tokens` up in; None if none of its embeddings is asked."""
    tables = {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    with heard(tables) as given, torch.no_grad():
        answer(tokens)
    for name, calls in given.items():
        if any(asked.shape == tokens.shape and torch.equal(asked.to(tokens), tokens) for asked in calls):
            return int(tables[name].num_embeddings)
    return None


def vocabulary(model: nn.Module, answer: Answer, tokens: Tensor) -> int:
    """How many tokens there are to draw from: the width of the answer, if it is one row of logits for every place's next.

    `tokens` are [rows, places], not all alike. Raises ModelError with the reason where the model is no causal language model.
    """
    with torch.no_grad():
        logits = main_output(answer(tokens))[0]
    known = looked_up(model, answer, tokens)
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape or (known is not None and logits.shape[2] != known):
        of = "" if known is None else f", and its embedding knows {known}"
        raise _no_language_model(f"it answers {tuple(logits.shape)} to tokens {tuple(tokens.shape)}{of}")
    if tokens.shape[1] < 2:
        raise _no_language_model("rows of one token have no next one")
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % logits.shape[2]
    with torch.no_grad():
        moved = main_output(answer(other))[0]
    unit = float(logits.abs().max())
    if float((moved - logits)[:, :-1].abs().max()) > UNMOVED * unit:
        raise _no_language_model("what it says of earlier places depends on later ones (a masked language model?)")
    return int(logits.shape[2])


def _no_language_model(why: str) -> ModelError:
    return ModelError(
        "the model takes tokens and is no causal language model: no inputs can be made from it",
        why=why,
        fix="give real inputs: some hundred texts without labels are enough",
    )


def generated(
    answer: Answer,
    size: int,
    places: int,
    *,
    rows: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    late: Callable[[], bool] = lambda: False,
    advance: Callable[[int], None] = lambda taken: None,
) -> Tensor:
    """Tokens int64 [rows, places] on the CPU that a causal model with `size` of them writes; `answer` gives its logits.

    Behind the first token, drawn evenly, LIKELIEST come by the largest logit and all others by softmax, temperature 1. The model
    always sees whole rows: what stands behind a place is no matter to it. Batch n depends on seed and n alone. Raises
    ModelError for logits that are NaN, Interrupted when `late`.
    """
    parts = []
    for number in range(-(-rows // batch_size)):
        draw = torch.Generator().manual_seed(seed * 1_000_003 + number)
        tokens = torch.zeros(batch_size, places, dtype=torch.long)
        tokens[:, 0] = torch.randint(size, (batch_size,), generator=draw)
        greedy = torch.tensor([LIKELIEST[row % len(LIKELIEST)] for row in range(batch_size)])
        for place in range(1, places):
            if late():
                raise Interrupted("stopped between two tokens", fix="start again: nothing was kept")
            with torch.no_grad():
                logits = main_output(answer(tokens.to(device)))[0][:, place - 1].double().cpu()
            tokens[:, place] = _next(logits, place <= greedy, draw)
            advance(1)
        parts.append(tokens)
    return torch.cat(parts)[:rows]


def _next(logits: Tensor, greedy: Tensor, draw: torch.Generator) -> Tensor:
    """One token a row: the likeliest where `greedy`, else drawn."""
    if bool((logits.isnan() | (logits == torch.inf)).any()):
        raise ModelError("the model answers NaN or infinity to its own tokens", fix="check its weights")
    drawn = torch.multinomial(logits.softmax(1), 1, generator=draw)[:, 0]
    return torch.where(greedy, logits.argmax(1), drawn)


def other_inputs(values: Sequence[Tensor], names: Sequence[str], tokens: int) -> list[Tensor]:
    """One sample of every other input: masks are 1, the rest as the first sample of the example has it."""
    return [
        torch.ones_like(x[:1]) if "mask" in name.lower() else x[:1]
        for number, (x, name) in enumerate(zip(values, names, strict=True))
        if number != tokens
    ]
