"""Each argument of each operator wrong once: one clear line that names it, its value and what is expected."""

import pytest
import torch

from fwpkm import ops
from fwpkm.ops import IndexedLog, Level, Log

QUERY, KEYS = torch.randn(2, 3, 1, 4), torch.randn(2, 1, 2, 5, 2)
SUB_SCORES, SUB_SLOTS = torch.randn(2, 3, 1, 2, 2), torch.zeros(2, 3, 1, 2, 2, dtype=torch.int64)
VALUES, SLOTS, WEIGHTS = torch.randn(9, 3), torch.zeros(4, 2, dtype=torch.int64), torch.randn(4, 2)
SCAN_SLOTS, SCAN_WEIGHTS = torch.zeros(1, 2, 4, 2, dtype=torch.int64), torch.randn(1, 2, 4, 2)
TARGETS, GATES = torch.randn(1, 2, 4, 3), torch.rand(1, 2, 4)
LOG = Log(
    torch.zeros(1, 5, 2).long(),
    torch.randn(1, 5, 2),
    torch.randn(1, 5, 3),
    torch.zeros(1, 5).long(),
    lengths=torch.tensor([5]),
    lookahead=1,
)
LEVEL = Level(
    torch.tensor([1, 4]), torch.tensor([0, 2]), torch.randn(2), torch.tensor([3, 5, 8]), torch.randn(3, VALUES.shape[1])
)
INDEXED = IndexedLog(9, torch.randn(1, 5, 3), (LEVEL,))
HEADS = {"query": (2, 3, 1, 4), "key": (2, 3, 1, 4), "value": (2, 3, 2, 5), "decay": (2, 3, 2), "beta": (2, 3, 2)}
RULE = {name: torch.randn(*shape) for name, shape in HEADS.items()}

GOOD = {
    ops.product_key_topk: {"sub_scores": SUB_SCORES, "k": 2},
    ops.product_key_address: {"query": QUERY, "keys": KEYS, "k": 2, "score": "idw", "eps": 1e-3},
    ops.key_commit: {
        "query": QUERY,
        "keys": KEYS,
        "sub_scores": SUB_SCORES,
        "sub_slots": SUB_SLOTS,
        "mask": None,
        "rate": 1.0,
        "score": "idw",
    },
    ops.product_key_scan: {
        "query": torch.randn(1, 2, 3, 1, 4),
        "keys": torch.randn(1, 1, 2, 3, 2),
        "k": 2,
        "mask": torch.ones(1, 2, 3, dtype=torch.bool),
        "rate": 1.0,
    },
    ops.gated_delta_rule: RULE | {"initial_state": torch.randn(2, 2, 4, 5)},
    ops.memory_read: {"values": VALUES, "slots": SLOTS, "weights": WEIGHTS},
    ops.memory_write_: {
        "values": VALUES,
        "slots": SLOTS,
        "coefficients": WEIGHTS,
        "residuals": torch.randn(4, 3),
    },
    ops.memory_scan: {
        "values": VALUES,
        "slots": SCAN_SLOTS,
        "weights": SCAN_WEIGHTS,
        "coefficients": SCAN_WEIGHTS,
        "targets": TARGETS,
        "gates": GATES,
        "log": LOG,
    },
}

HALF = "or torch.bfloat16 or torch.float16"
BAD = [
    (ops.product_key_scan, {"query": torch.randn(1, 2, 1, 4)}, r"query.shape is \[1, 2, 1, 4\]; expected \[M, S, P, H"),
    (ops.product_key_scan, {"k": 4}, r"k is 4; expected 1 <= k <= n_subkeys \(3\)"),
    (ops.product_key_scan, {"eps": 0.0}, "eps is 0.0; expected a positive number"),
    (ops.product_key_scan, {"score": "cos"}, "score is 'cos'; expected 'idw' or 'dot'"),
    (ops.product_key_scan, {"mask": torch.ones(1, 2, 3)}, "mask.dtype is torch.float32; expected torch.bool"),
    (
        ops.product_key_scan,
        {"mask": torch.ones(1, 3, dtype=torch.bool)},
        r"mask.shape is \[1, 3\]; expected \[1, 2, 3\]",
    ),
    (ops.product_key_scan, {"cut": torch.ones(1, 3).bool()}, r"cut.shape is \[1, 3\]; expected \[1, 2\]"),
    (ops.product_key_scan, {"query": torch.full((1, 2, 3, 1, 4), float("nan"))}, "query or keys holds NaN"),
    (ops.product_key_topk, {"sub_scores": torch.randn(2, 3, 4)}, "sub_scores.shape is .*; expected .*heads, 2, n_sub"),
    (
        ops.product_key_topk,
        {"sub_scores": SUB_SCORES.half()},
        "sub_scores.dtype is torch.float16; expected torch.float",
    ),
    (ops.product_key_topk, {"k": 3}, r"k is 3; expected 1 <= k <= n_subkeys \(2\)"),
    (ops.product_key_topk, {"k": 0}, "k is 0; expected 1 <= k"),
    (ops.product_key_address, {"query": QUERY[0]}, r"query.shape is \[3, 1, 4\]; expected \[M, P, H, Dk\]"),
    (
        ops.product_key_address,
        {"query": torch.randn(2, 3, 1, 5)},
        r"query.shape\[-1\] is 5; expected an even key width",
    ),
    (ops.product_key_address, {"query": QUERY.long()}, f"query.dtype is torch.int64; expected torch.float32 {HALF}$"),
    (
        ops.product_key_address,
        {"keys": torch.randn(2, 1, 2, 5, 3)},
        r"keys.shape is .*; expected \[M or 1, 1, 2, n, 2\]",
    ),
    (
        ops.product_key_address,
        {"keys": torch.randn(3, 1, 2, 5, 2)},
        r"keys.shape\[0\] is 3; expected 1 or the 2 memories",
    ),
    (ops.product_key_address, {"keys": KEYS.double()}, f"query.dtype is torch.float32; expected torch.float64 {HALF}$"),
    (ops.product_key_address, {"keys": KEYS.half()}, "keys.dtype is torch.float16; expected torch.float32 or torch.fl"),
    (ops.product_key_scan, {"keys": torch.randn(1, 1, 2, 3, 2).bfloat16()}, "keys.dtype is torch.bfloat16; expected"),
    (ops.product_key_address, {"k": 6}, r"k is 6; expected 1 <= k <= n_subkeys \(5\)"),
    (ops.product_key_address, {"score": "cosine"}, "score is 'cosine'; expected 'idw' or 'dot'"),
    (ops.product_key_address, {"eps": 0.0}, "eps is 0.0; expected a positive number"),
    (ops.key_commit, {"sub_scores": SUB_SCORES[:1]}, r"sub_scores.shape is .*; expected \[2, 3, 1, 2, k\]"),
    (ops.key_commit, {"sub_slots": SUB_SLOTS[..., :1]}, r"sub_slots.shape is .*; expected \[2, 3, 1, 2, 2\]"),
    (ops.key_commit, {"sub_slots": SUB_SLOTS.int()}, "sub_slots.dtype is torch.int32; expected torch.int64"),
    (ops.key_commit, {"mask": torch.ones(2, 2).bool()}, r"mask.shape is \[2, 2\]; expected \[2, 3\]"),
    (ops.key_commit, {"mask": torch.ones(2, 3)}, "mask.dtype is torch.float32; expected torch.bool"),
    (ops.key_commit, {"sub_scores": SUB_SCORES.half()}, "sub_scores.dtype is torch.float16; expected torch.float32$"),
    (ops.key_commit, {"score": "l1"}, "score is 'l1'; expected 'idw' or 'dot'"),
    (ops.gated_delta_rule, {"query": RULE["query"][0]}, r"query.shape is \[3, 1, 4\]; expected \[B, T, Hk, Dk\]"),
    (ops.gated_delta_rule, {"query": RULE["query"].int()}, "query.dtype is torch.int32; expected torch.float32"),
    (ops.gated_delta_rule, {"key": RULE["key"][..., :3]}, r"key.shape is .*; expected \[2, 3, 1, 4\]"),
    (ops.gated_delta_rule, {"key": RULE["key"].half()}, "key.dtype is torch.float16; expected torch.float32"),
    (ops.gated_delta_rule, {"value": RULE["value"][:, :2]}, r"value.shape is .*; expected \[2, 3, H, Dv\]"),
    (
        ops.gated_delta_rule,
        {"query": torch.randn(2, 3, 4, 4), "key": torch.randn(2, 3, 4, 4)},
        r"value.shape\[2\] is 2; expected a multiple of 4 key heads",
    ),
    (ops.gated_delta_rule, {"decay": RULE["decay"][..., :1]}, r"decay.shape is \[2, 3, 1\]; expected \[2, 3, 2\]"),
    (ops.gated_delta_rule, {"decay": RULE["decay"].double()}, "decay.dtype is torch.float64; expected torch.float32"),
    (ops.gated_delta_rule, {"beta": RULE["beta"][:, :1]}, r"beta.shape is \[2, 1, 2\]; expected \[2, 3, 2\]"),
    (ops.gated_delta_rule, {"initial_state": torch.randn(2, 2, 5, 4)}, r"initial_state.shape is .*\[2, 2, 4, 5\]"),
    (ops.gated_delta_rule, {"initial_state": torch.randn(2, 2, 4, 5).half()}, "initial_state.dtype is torch.float16"),
    (ops.memory_read, {"values": VALUES[0]}, r"values.shape is \[3\]; expected \[N, Dv\]"),
    (ops.memory_read, {"values": VALUES.half()}, "values.dtype is torch.float16; expected torch.float32"),
    (ops.memory_read, {"slots": SLOTS.int()}, "slots.dtype is torch.int32; expected torch.int64"),
    (ops.memory_read, {"slots": SLOTS + 9}, r"slots is in \[9, 9\]; expected slots in \[0, 9\)"),
    (ops.memory_read, {"slots": SLOTS - 1}, r"slots is in \[-1, -1\]; expected slots in \[0, 9\)"),
    (ops.memory_read, {"weights": WEIGHTS[:2]}, r"weights.shape is \[2, 2\]; expected \[4, 2\]"),
    (ops.memory_read, {"weights": WEIGHTS.double()}, f"weights.dtype is torch.float64; expected torch.float32 {HALF}$"),
    (ops.memory_write_, {"values": torch.randn(3, 9).t()}, r"values.stride\(\) is .*; expected contiguous values"),
    (ops.memory_write_, {"values": VALUES.clone().requires_grad_()}, "values.requires_grad is True; expected False"),
    (ops.memory_write_, {"slots": SLOTS + 9}, r"slots is in \[9, 9\]; expected slots in \[0, 9\)"),
    (ops.memory_write_, {"coefficients": WEIGHTS[:, :1]}, r"coefficients.shape is \[4, 1\]; expected \[4, 2\]"),
    (ops.memory_write_, {"residuals": torch.randn(4, 2)}, r"residuals.shape is \[4, 2\]; expected \[4, 3\]"),
    (
        ops.memory_write_,
        {"residuals": torch.randn(4, 3).double()},
        f"residuals.dtype is torch.float64; expected torch.float32 {HALF}$",
    ),
    (ops.memory_write_, {"coefficients": WEIGHTS.half()}, "coefficients.dtype is torch.float16; expected torch.float"),
    (ops.memory_scan, {"slots": SLOTS}, r"slots.shape is \[4, 2\]; expected \[M, S, P, K\]"),
    (ops.memory_scan, {"slots": SCAN_SLOTS + 9}, r"slots is in \[9, 9\]; expected slots in \[0, 9\)"),
    (ops.memory_scan, {"weights": SCAN_WEIGHTS[:, :1]}, r"weights.shape is \[1, 1, 4, 2\]; expected \[1, 2, 4, 2\]"),
    (ops.memory_scan, {"coefficients": SCAN_WEIGHTS.double()}, "coefficients.dtype is torch.float64; expected"),
    (ops.memory_scan, {"weights": SCAN_WEIGHTS.half()}, "weights.dtype is torch.float16; expected torch.float32$"),
    (ops.memory_scan, {"gates": GATES.bfloat16()}, "gates.dtype is torch.bfloat16; expected torch.float32$"),
    (
        ops.memory_scan,
        {"targets": TARGETS.double()},
        f"targets.dtype is torch.float64; expected torch.float32 {HALF}$",
    ),
    (ops.memory_scan, {"targets": TARGETS[..., :2]}, r"targets.shape is .*; expected \[1, 2, 4, 3\]"),
    (ops.memory_scan, {"gates": GATES[..., :2]}, r"gates.shape is \[1, 2, 2\]; expected \[1, 2, 4\]"),
    (
        ops.memory_scan,
        {"log": LOG._replace(slots=LOG.slots[:, :4])},
        r"log.(chunks|residuals).shape is \[1, 5.*\]; expected \[1, 4",
    ),
    (ops.memory_scan, {"log": LOG._replace(lengths=torch.tensor(5))}, r"log.lengths.shape is \[\]; expected \[1\]"),
    (ops.memory_scan, {"log": LOG._replace(lookahead=-1)}, "log.lookahead is -1; expected a number of records"),
    (ops.memory_scan, {"sequences": SCAN_SLOTS}, r"sequences.shape is \[1, 2, 4, 2\]; expected \[1, 2, 4\]"),
    (ops.memory_scan, {"sequences": GATES}, "sequences.dtype is torch.float32; expected torch.int64"),
    (ops.memory_scan, {"cut": SCAN_SLOTS[0, 0]}, r"cut.shape is \[4, 2\]; expected \[1, 2\]"),
    (ops.memory_scan, {"targets": TARGETS * float("nan")}, "targets holds NaN; expected numbers"),
    (ops.memory_scan, {"gates": GATES.log() * float("nan")}, "gates holds NaN; expected numbers"),
    (ops.memory_scan, {"weights": SCAN_WEIGHTS * float("nan")}, "weights holds NaN; expected numbers"),
    (ops.product_key_address, {"query": QUERY * float("nan")}, "query or keys holds NaN; expected numbers"),
    (ops.product_key_address, {"keys": KEYS * float("nan")}, "query or keys holds NaN; expected numbers"),
    (ops.memory_read, {"weights": WEIGHTS * float("nan")}, "weights holds NaN; expected numbers"),
    (ops.memory_scan, {"log": LOG._replace(chunks=LOG.chunks.int())}, "log.chunks.dtype is torch.int32; expected"),
    (ops.memory_scan, {"log": LOG._replace(residuals=LOG.residuals[..., :1])}, r"log.residuals.shape is \[1, 5, 1\]"),
    *(
        (ops.memory_scan, {"log": INDEXED._replace(**wrong)}, message)
        for wrong, message in [
            ({"n_slots": 4}, "log.n_slots is 4; expected a divisor of the 9 rows of values"),
            ({"residuals": torch.randn(2, 5, 3)}, r"log.residuals.shape is \[2, 5, 3\]; expected \[1, R, 3\]"),
            (
                {"residuals": torch.randn(1, 5, 3).half()},
                "log.residuals.dtype is torch.float16; expected torch.float32",
            ),
            ({"levels": (LEVEL._replace(records=LEVEL.records[:1]),)}, r"log.levels\[0\].records.shape is \[1\]; ex"),
            ({"levels": (LEVEL, LEVEL._replace(sums=torch.randn(2, 3)))}, r"log.levels\[1\].sums.shape is \[2, 3\]"),
            ({"levels": (LEVEL._replace(keys=LEVEL.keys.int()),)}, r"log.levels\[0\].keys.dtype is torch.int32; exp"),
            (
                {"levels": (LEVEL._replace(weights=LEVEL.weights.double()),)},
                r"log.levels\[0\].weights.dtype is torch.f",
            ),
        ]
    ),
    (ops.memory_scan, {"log": LOG._replace(coefficients=LOG.coefficients.half())}, "log.coefficients.dtype is torch.f"),
]


@pytest.mark.parametrize("operator", GOOD, ids=lambda operator: operator.__name__)
def test_the_good_call_is_good(operator):
    operator(**GOOD[operator])


def test_a_good_index_is_good():
    ops.memory_scan(**GOOD[ops.memory_scan] | {"log": INDEXED})


@pytest.mark.parametrize(("operator", "wrong", "message"), BAD)
def test_refused_with_one_clear_line(operator, wrong, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        operator(**GOOD[operator] | wrong)
    assert "\n" not in str(caught.value)
