"""Multi-query associative recall (Arora et al., 2023): how many of the pairs that it was told a model gives back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fwpkm.checks import require
from fwpkm.data.associations import associations
from fwpkm.evaluation.recall import SIDE_BY_SIDE, lower_bound
from fwpkm.evaluation.stream import OnTokens, ignored, stream
from fwpkm.models import FwPKMForCausalLM


def associative_recall(
    model: FwPKMForCausalLM,
    pairs: int,
    sequences: int = 16,
    seed: int = 0,
    vocabulary: int | None = None,
    call: int = 1 << 15,
    on_tokens: OnTokens = ignored,
) -> dict[str, Any]:
    """Tell a model ``pairs`` of a random key and value, then give it the keys in another order, each with its value.

    A value counts as given if it is the likeliest token after its key.

    Args:
        model: to ask.
        pairs: in a sequence.
        sequences: of that many pairs, each with others.
        seed: draws them.
        vocabulary: tokens to draw from; the model's unless given.
        call: tokens of all sequences that are read at a time.
        on_tokens: told after each call how many tokens were read.

    Returns:
        ``pairs``, ``sequences``, ``length`` in tokens, ``questions``, ``right`` (a share), ``right_lower95``, and
        ``chance``, the share that guessing among all values gets.
    """
    require(sequences >= 1, "sequences", sequences, "a positive integer")
    vocabulary = vocabulary or model.config.vocab_size
    rng = np.random.default_rng((seed, pairs))
    made = [associations(rng, pairs, vocabulary) for _ in range(sequences)]
    answers, length = made[0].answers, made[0].tokens.size
    group, right = max(1, SIDE_BY_SIDE // length), 0
    for i in range(0, sequences, group):
        tokens = torch.from_numpy(np.stack([x.tokens for x in made[i : i + group]]))
        given = torch.empty_like(tokens)
        for read, result in stream(model, tokens, max(1, call // len(tokens)), on_tokens):
            given[:, read] = result.logits.argmax(-1)
        right += int((given[:, answers - 1] == tokens[:, answers]).sum())
    questions = sequences * pairs
    return {
        "pairs": pairs,
        "sequences": sequences,
        "length": length,
        "questions": questions,
        "right": right / questions,
        "right_lower95": lower_bound(right, questions),
        "chance": 1 / (vocabulary - vocabulary // 2),
    }
