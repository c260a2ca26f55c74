"""The kernels of rows, against the same sums in float64: any width and fan-out, indices outside the table, no rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from fwpkm.ops.kernels import joined_pieces, segment_sum
from fwpkm.ops.kernels.row_products import row_products
from fwpkm.ops.kernels.segment_sum import segment_sum as add_segments
from fwpkm.ops.kernels.weighted_sum import weighted_sum
from tests.draws import Draw, seeds

FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
WIDTHS = st.sampled_from([0, 1, 3, 8, 12, 33, 80])
WIDE = 1100  # more than the columns of one program


def draw_index(draw, rows, tokens, fanout):
    """With some entries on both sides of the table."""
    return draw.integers(rows + 2, tokens, fanout) - 1


def gathered(table, index):
    """Rows in float64, zero for an index outside the table: ``[P, K, D]``."""
    there = (index >= 0) & (index < table.shape[0])
    return table.double()[index.clamp(0, table.shape[0] - 1)] * there.unsqueeze(-1)


def rounding(dtype):
    return {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]


@given(seed=seeds, rows=st.integers(1, 5), tokens=st.integers(0, 3), fanout=st.integers(1, 11), width=WIDTHS,
       stored=FLOATS, returned=FLOATS)  # fmt: skip
def test_weighted_sum(seed, rows, tokens, fanout, width, stored, returned):
    draw = Draw(seed, torch.float32)
    table, weights = draw.normal(rows, width).to(stored), draw.normal(tokens, fanout)
    index, out = draw_index(draw, rows, tokens, fanout), torch.empty(tokens, width, dtype=returned)
    weighted_sum(out, table, index, weights)
    want = (weights.double().unsqueeze(-1) * gathered(table, index)).sum(1)
    assert_close(out.double(), want, rtol=rounding(returned), atol=1e-5)


@given(seed=seeds, rows=st.integers(1, 5), tokens=st.integers(0, 3), fanout=st.integers(1, 11), width=WIDTHS,
       stored=FLOATS, named=st.booleans())  # fmt: skip
def test_row_products(seed, rows, tokens, fanout, width, stored, named):
    draw = Draw(seed, torch.float32)
    table, vectors = draw.normal(rows, width).to(stored), draw.normal(4, width)
    index, out = draw_index(draw, rows, tokens, fanout), torch.empty(tokens, fanout)
    sources = draw.integers(4, tokens) if named else None
    row_products(out, table, index, vectors, sources)
    own = vectors[:tokens] if sources is None else vectors[sources]
    assert_close(out.double(), (gathered(table, index) * own.double().unsqueeze(1)).sum(-1), rtol=1e-5, atol=1e-5)


@given(seed=seeds, rows=st.integers(1, 6), entries=st.integers(0, 40), width=WIDTHS, stored=FLOATS,
       piece=st.sampled_from([1, 2, 8, 32]), data=st.data())  # fmt: skip
def test_segment_sum(seed, rows, entries, width, stored, piece, data):
    """Short pieces, so that segments lie in one, in two and in many; what is not touched keeps its bits."""
    draw = Draw(seed, torch.float32)
    table, vectors, coefficients = draw.normal(rows, width), draw.normal(4, width).to(stored), draw.normal(entries)
    targets, sources = draw_index(draw, rows, entries, 1).flatten(), draw.integers(4, entries)
    if data.draw(st.booleans()):  # one hot row
        targets = torch.where(draw.integers(4, entries) > 0, targets[:1], targets)
    targets = targets.sort().values.to(data.draw(st.sampled_from([torch.int32, torch.int64])))
    there = (targets >= 0) & (targets < rows)
    want = table.double().index_add(
        0, targets[there].long(), (coefficients.unsqueeze(1).double() * vectors.double()[sources])[there]
    )
    before = table.clone()
    with pytest.MonkeyPatch.context() as patch:
        for module in (segment_sum, joined_pieces):
            patch.setattr(module, "PIECE", piece)
        add_segments(table, targets, sources, coefficients, vectors)
    assert_close(table.double(), want, rtol=1e-5, atol=1e-5)
    rest = torch.ones(rows, dtype=torch.bool)
    rest[targets[there].long()] = False
    assert torch.equal(table[rest], before[rest])


def test_hot_row_in_pieces_of_the_real_length():
    draw = Draw(0, torch.float32)
    entries = 2 * joined_pieces.PIECE + 5
    table, vectors, coefficients = draw.normal(2, 3), draw.normal(entries, 3), draw.normal(entries)
    want = table.double()
    want[1] += coefficients.double() @ vectors.double()
    add_segments(table, torch.ones(entries, dtype=torch.int32), torch.arange(entries), coefficients, vectors)
    assert_close(table.double(), want, rtol=1e-4, atol=1e-4)


def test_only_what_is_named_is_read():
    """A fan-out that is no multiple of what is loaded at once: the next token's rows, full of NaN, do not matter."""
    table = torch.tensor([[1.0, 2.0], [torch.nan, torch.nan]])
    index, out = torch.tensor([[0, 0, 0], [1, 1, 1]]), torch.empty(2, 2)
    weighted_sum(out, table, index, torch.ones(2, 3))
    assert out[0].tolist() == [3.0, 6.0]
    add_segments(out[:1], torch.tensor([0, 1]), torch.tensor([0, 1]), torch.ones(2), table)
    assert out[0].tolist() == [4.0, 8.0]


def test_rows_wider_than_a_program():
    draw = Draw(1, torch.float32)
    table, index, weights = draw.normal(5, WIDE), draw.integers(5, 2, 9), draw.normal(2, 9)
    out = torch.empty(2, WIDE)
    weighted_sum(out, table, index, weights)
    assert_close(out.double(), (weights.double().unsqueeze(-1) * gathered(table, index)).sum(1), rtol=1e-5, atol=1e-5)
    products = torch.empty(2, 9)
    row_products(products, table, index, out)
    want = (gathered(table, index) * out.double().unsqueeze(1)).sum(-1)
    assert_close(products.double(), want, rtol=1e-4, atol=1e-3)
    want = table.double().index_add(0, torch.tensor([2, 2, 4]), out.double()[[0, 1, 0]])
    add_segments(table, torch.tensor([2, 2, 4]), torch.tensor([0, 1, 0]), torch.ones(3), out)
    assert_close(table.double(), want, rtol=1e-5, atol=1e-5)
