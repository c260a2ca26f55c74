"""How a memory addresses, reads and writes."""

from __future__ import annotations

from dataclasses import dataclass

from fwpkm.checks import require, require_choice, require_integer, require_number
from fwpkm.ops.product_key_address import SCORES

WRITE_SCALES = ("reference", "paper", "exact")
NONLINEARITIES = ("softmax", "relu", "silu")
KEY_UPDATES = ("fast", "train_only", "slow")
SCOPES = ("sequence", "shared")
LOG_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class MemoryConfig:
    """How a memory addresses, reads and writes (the numbers refer to section 2 of docs/design.md).

    Args:
        topk: ``k``, slots a head (2).
        chunk_size: ``C``, tokens that read one version of the memory; it commits at their end.
        lookahead: ``L``, token ``t`` stores the target of token ``t + L`` (5).
        learning_rate: of both commits (6, 7).
        write_scale: ``"reference"``, ``H k C / (C - L)``, is what the released code trains with, and overshoots where
            ``learning_rate * gate * scale * sum(w^2) / N_s > 2``; ``"paper"`` is 1, equations 13 to 15; ``"exact"`` is
            ``1 / sum(w^2)``, with which a lone write at gate and rate 1 makes the next read return its target (6).
        score: ``"idw"``, inverse distance weighting, or ``"dot"`` (1).
        score_eps: of the inverse distance weighting.
        temperature: the scores are divided by it before the nonlinearity (3).
        nonlinearity: ``"softmax"`` over all ``H * k`` scores of a token, or ``"relu"`` or ``"silu"`` of each (3).
        addressing_weight: lambda, weight of the addressing loss in the key commit (7).
        key_update: ``"fast"``: keys commit after every chunk, as in the paper; ``"train_only"``: only in calls with
            ``training=True``; ``"slow"``: never, keys are parameters of the model.
        scope: ``"sequence"``: every sequence has its own memory; ``"shared"``: the batch writes to one.
        detach_every: cut the gradient through keys (but not ``"slow"`` ones) and values before every so many chunks;
            None for never.
        log_dtype: ``"bfloat16"`` rounds residuals when they arise, in calls with ``training=False``, and keeps the
            records of half the size; ways to compute them may differ where rounding is near a tie (DESIGN section 3).
    """

    topk: int = 8
    chunk_size: int = 512
    lookahead: int = 1
    learning_rate: float = 1.0
    write_scale: str = "reference"
    score: str = "idw"
    score_eps: float = 1e-3
    temperature: float = 1.0
    nonlinearity: str = "softmax"
    addressing_weight: float = 1.0
    key_update: str = "fast"
    scope: str = "sequence"
    detach_every: int | None = None
    log_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, low in (("topk", 1), ("chunk_size", 1), ("lookahead", 0)):
            require_integer(name, getattr(self, name), low)
        for name in ("learning_rate", "addressing_weight"):
            require_number(name, getattr(self, name), 0)
        for name in ("score_eps", "temperature"):
            require_number(name, getattr(self, name), 0, open=True)
        choices = {
            "write_scale": WRITE_SCALES,
            "score": SCORES,
            "nonlinearity": NONLINEARITIES,
            "key_update": KEY_UPDATES,
            "scope": SCOPES,
            "log_dtype": LOG_DTYPES,
        }
        for name, allowed in choices.items():
            require_choice(name, getattr(self, name), allowed)
        every = self.detach_every
        whole = isinstance(every, int) and not isinstance(every, bool) and every >= 1
        require(every is None or whole, "detach_every", repr(every), "None or an integer >= 1")
