"""Multi-query associative recall: pairs of a key and a value, then the keys again in another order."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from fwpkm.checks import require

KEY = 2  # tokens of a key; a value is one


class Associations(NamedTuple):
    """A sequence of ``2 * pairs * (KEY + 1)`` tokens."""

    tokens: NDArray[np.int64]  # [T]
    answers: NDArray[np.int64]  # [pairs] where, in the second half, the values stand


def associations(rng: Generator, pairs: int, vocabulary: int) -> Associations:
    """``pairs`` different random keys, each with a random value; then all again in random order.

    Keys are two tokens of the lower half of the vocabulary, values one of the upper half.

    Raises:
        ValueError: if the vocabulary has fewer keys.
    """
    low = vocabulary // 2
    require(1 <= pairs <= low**KEY, "pairs", pairs, "in [1, {}], the keys of {} tokens", low**KEY, vocabulary)
    keys = np.stack(np.divmod(rng.choice(low**KEY, pairs, replace=False), low), 1)
    values = rng.integers(low, vocabulary, (pairs, 1))
    stated = np.concatenate((keys, values), 1)
    tokens = np.concatenate((stated, stated[rng.permutation(pairs)])).flatten()
    return Associations(tokens, np.arange(pairs, 2 * pairs) * (KEY + 1) + KEY)
