"""The memory layer on the tokens of many requests gives what ``fwpkm.layers.FwPKM`` gives for each alone."""

from contextlib import nullcontext

import pytest
import torch
from fwpkm_vllm import step
from fwpkm_vllm.folded import Folded
from fwpkm_vllm.keys import TOGETHER, parts
from fwpkm_vllm.records import MOST, Field, Layout, log_layout, stretch, tokens_beside_log, tokens_per_page
from fwpkm_vllm.step import Batch, Step, serve
from hypothesis import given
from hypothesis import strategies as st

from fwpkm.models import FwPKMConfig
from tests.draws import seeds
from tests.serving.toy import LIMIT, NOBODY, Request, Server, alone, documents, memory_layer

pytestmark = pytest.mark.numerical

LENGTH = 40


@given(
    seed=seeds,
    query_conv=st.sampled_from([0, 1, 2, 5]),
    heads=st.sampled_from([1, 2]),
    lookahead=st.integers(0, 3),
    chunk_size=st.integers(1, 9),
    write_scale=st.sampled_from(["reference", "paper", "exact"]),
    nonlinearity=st.sampled_from(["softmax", "relu"]),
    pages=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    variant=st.sampled_from(["train_only", "fast", "early commits"]),
    data=st.data(),
)
def test_any_cut_into_steps_gives_what_the_layer_gives(
    seed, query_conv, heads, lookahead, chunk_size, write_scale, nonlinearity, pages, variant, data
):
    layer = memory_layer(
        seed,
        query_conv,
        heads,
        lookahead=lookahead,
        chunk_size=chunk_size,
        write_scale=write_scale,
        nonlinearity=nonlinearity,
        learning_rate=0.5,
        key_update="fast" if variant == "fast" else "train_only",
    )
    texts = documents(layer, seed, 3, LENGTH)
    server = Server(layer, texts, *pages, key_rows=data.draw(st.integers(3, 25)), blocks=900)
    origins = [data.draw(st.integers(0, LENGTH // 2)) if variant == "early commits" else 0 for _ in texts]
    requests = [server.add(i, LENGTH, origins[i]) for i in range(3)]
    check_any_cut(server, requests, data)


def check_any_cut(server: Server, requests: list[Request], data: st.DataObject) -> None:
    """Read ``requests`` in pieces, and compare with what the layer gives for each alone."""
    got: dict[int, list[torch.Tensor]] = {request.document: [] for request in requests}
    while server.requests:
        pieces = []
        for request in server.requests:
            if data.draw(st.booleans()) or request is server.requests[-1]:
                most = min(request.length - request.computed, server.longest_piece)
                count = 1 if data.draw(st.booleans()) else data.draw(st.integers(1, most))
                assert server.allocate(request, count)
                pieces.append((request, count))
        for (request, _), out in zip(pieces, server.step(pieces, padding=data.draw(st.integers(0, 3))), strict=True):
            got[request.document].append(out)
        for request in [r for r in server.requests if r.computed == r.length]:
            server.remove(request)
    for request in requests:
        expected = alone(server.layer, server.documents[request.document], request.origin, request)
        torch.testing.assert_close(torch.cat(got[request.document]), expected, rtol=1e-4, atol=1e-4)


@given(
    seed=seeds,
    query_conv=st.sampled_from([0, 3]),
    heads=st.sampled_from([1, 2]),
    lookahead=st.integers(0, 3),
    chunk_size=st.integers(1, 5),
    write_scale=st.sampled_from(["reference", "exact"]),
    pages=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 30)),
    log_dtype=st.sampled_from(["float32", "bfloat16"]),
    key_update=st.sampled_from(["train_only", "fast"]),
    data=st.data(),
)
def test_a_log_may_be_folded_at_any_time(
    seed, query_conv, heads, lookahead, chunk_size, write_scale, pages, log_dtype, key_update, data
):
    layer = memory_layer(
        seed,
        query_conv,
        heads,
        lookahead=lookahead,
        chunk_size=chunk_size,
        write_scale=write_scale,
        log_dtype=log_dtype,
        learning_rate=0.5,
        key_update=key_update,
    )
    length = 3 * stretch(LIMIT, chunk_size, *pages[:2]) + 5
    server = Server(layer, documents(layer, seed, 2, length), *pages, blocks=300)
    check_any_cut(server, [server.add(i, length) for i in range(2)], data)
    for kind, pool in server.pools.items():
        assert len(pool.free) == len(pool.holders) - 1, f"{kind} pages were kept"


@pytest.mark.parametrize("log_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("others", [0, 2])
def test_what_a_token_reads_from_depends_on_its_place_alone(others, log_dtype, monkeypatch):
    """Which rows, and how many records beside them: not on steps, nor on requests that fold theirs beside it."""
    layer = memory_layer(0, chunk_size=3, log_dtype=log_dtype)
    texts = documents(layer, 0, 1 + others, 50)
    versions, lengths = Folded.read, step.log_read
    seen: dict[str, torch.Tensor] = {}
    found: list[tuple[int, int, int]] = []

    def read_rows(self: Folded, slots, weights, requests, version):
        seen["version"] = version
        return versions(self, slots, weights, requests, version)

    def read_log(values, slots, weights, pages, table, requests, committed, *more):
        for token in (requests == 0).nonzero().flatten().tolist():
            found.append((int(seen["positions"][token]), int(seen["version"][token]), int(committed[token])))
        return lengths(values, slots, weights, pages, table, requests, committed, *more)

    def positions(now: Step) -> Step:
        seen["positions"] = now.batch.positions
        return now

    monkeypatch.setattr(Folded, "read", read_rows)
    monkeypatch.setattr(step, "log_read", read_log)
    for cuts in ([1] * 50, [7, 8, 9, 1, 6, 9, 9, 1], [4, 9, 9, 9, 9, 9, 1]):
        server = Server(layer, texts, 3, 1, 4, blocks=300)
        assert server.stretch == 9
        first, *rest = (server.add(i, 50) for i in range(1 + others))
        found.clear()
        for count in cuts:
            pieces = [(first, count), *((other, 1) for other in rest)]
            assert all(server.allocate(*piece) for piece in pieces)
            server.step(pieces, change=positions)
        starts = [position // 3 * 3 for position in range(50)]
        assert sorted(found) == [(i, start // 9, start % 9) for i, start in enumerate(starts)]


@pytest.mark.parametrize("fault", [None, "a chunk less", "a chunk twice", "not rounded"])
def test_wrong_rows_are_noticed(fault, monkeypatch):
    """With a log in half precision too, whose records are checked and gone on with."""
    layer = memory_layer(0, chunk_size=3, lookahead=1, log_dtype="bfloat16")
    make = Folded.make

    def wrong(self: Folded, request, version, slots, coefficients, residuals, *more):
        if fault == "a chunk less":
            coefficients = torch.where(torch.arange(9).unsqueeze(1) >= 6, 0, coefficients)
        elif fault == "a chunk twice":
            coefficients = torch.where(torch.arange(9).unsqueeze(1) >= 6, 2 * coefficients, coefficients)
        elif fault == "not rounded":
            residuals = residuals.float() * (1 + 2**-8)
        make(self, request, version, slots, coefficients, residuals, *more)

    monkeypatch.setattr(Folded, "make", wrong)
    server = Server(layer, documents(layer, 0, 1, 50), 3, 1, 4, blocks=300)
    request, got = server.add(0, 50), []
    while request.computed < 50:
        count = min(7, 50 - request.computed)
        assert server.allocate(request, count)
        got += server.step([(request, count)])
    with pytest.raises(AssertionError) if fault else nullcontext():
        expected = alone(layer, server.documents[0], request=request)
        torch.testing.assert_close(torch.cat(got), expected, rtol=1e-4, atol=1e-4)


def test_a_folded_log_holds_one_stretch_and_one_version():
    layer = memory_layer(0, chunk_size=4)
    server = Server(layer, documents(layer, 0, 1, 80), 4, 4, 10, blocks=90)
    request = server.add(0, 80)
    for count in (5, 5, 1, 1, 8, 8, *[1] * 40, 8, 4):
        assert server.allocate(request, count)
        server.step([(request, count)])
        held = {kind: sum(block != NOBODY for block in blocks) for kind, blocks in request.blocks.items()}
        assert held["log"] <= (8 + count + 3) // 4 + 1
        assert held["folded"] <= 3 * (1 + (request.computed >= 16))  # the one read, and the one just made
    assert server.stretch == 8
    assert request.computed == 80


def test_moving_keys_take_one_version_and_one_open_chunk():
    layer = memory_layer(0, chunk_size=8, key_update="fast")
    server = Server(layer, documents(layer, 0, 1, 80), 4, 4, key_rows=4, blocks=90)
    request = server.add(0, 80)
    for count in (5, 30, 1, 1, 8, *[1] * 27, 8):
        versions = (request.computed + count) // 8 - request.computed // 8
        assert server.allocate(request, count)
        server.step([(request, count)])
        held = {kind: sum(block != NOBODY for block in blocks) for kind, blocks in request.blocks.items()}
        assert held["keys"] <= 3 * (1 + versions)  # 10 sub-keys: the version that was read, and those just made
        assert held["queries"] <= (8 + count + 3) // 4 + 1
    assert request.computed == 80


def test_moving_keys_change_what_is_read():
    """Or the comparisons here would show nothing: keys that stay give something else."""
    layer = memory_layer(0, chunk_size=8, key_update="fast")
    (text,) = documents(layer, 0, 1, LENGTH)
    still = alone(memory_layer(0, chunk_size=8), text)
    assert (alone(layer, text) - still)[8:].abs().median() > 1e-2


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 30)), min_size=1, max_size=80), st.integers(1, 9))
def test_parts_are_the_step_s_tokens_in_a_possible_order(spans, chunk_size):
    pieces, first = [], 0
    for computed, count in spans:
        pieces.append((first, computed, computed + count))
        first += count
    seen: list[int] = []
    versions = [computed // chunk_size for _, computed, _ in pieces]
    for part in parts(pieces, chunk_size, torch.device("cpu")):
        assert len(part.requests) <= TOGETHER or not (part.own or part.completes)
        for request, chunk, tokens in zip(part.requests, part.chunks.tolist(), part.tokens.tolist(), strict=True):
            start, computed, _ = pieces[request]
            positions = [token - start + computed for token in tokens]
            assert versions[request] == chunk == positions[0] // chunk_size == positions[-1] // chunk_size
            assert part.own == (chunk > 0)
            assert part.completes == (positions[-1] % chunk_size == chunk_size - 1)
            versions[request] += part.completes
            seen += tokens
    assert sorted(seen) == list(range(first))


def test_a_half_precision_log_rounds_as_the_layer_does():
    layer = memory_layer(3, 4, lookahead=1, chunk_size=8, write_scale="exact", log_dtype="bfloat16")
    (text,) = documents(layer, 0, 1, 64)
    server = Server(layer, [text], 5, 3, blocks=80)
    request = server.add(0, 64)
    got = []
    while request.computed < 64:
        count = min(11, 64 - request.computed)
        assert server.allocate(request, count)
        got += server.step([(request, count)])
    expected = alone(layer, text, request=request)
    torch.testing.assert_close(torch.cat(got), expected, rtol=1e-4, atol=1e-4)
    exact = memory_layer(3, 4, lookahead=1, chunk_size=8, write_scale="exact")
    assert (alone(exact, text) - expected).abs().max() > 1e-3, "this document must be one where rounding shows"


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("key_update", ["fast", "slow"])
def test_a_request_without_numbers_stops_nobody_else(number, key_update):
    """Half precision overflows now and then: that request is lost, and the others get what they get without it."""
    layer = memory_layer(3, 4, chunk_size=8, write_scale="exact", key_update=key_update)
    good, bad = documents(layer, 0, 2, 40)
    bad = bad.clone()
    bad[3:30:4] = number
    server = Server(layer, [good, bad], 5, 3, blocks=200)
    requests, got = [server.add(i, 40) for i in range(2)], []
    while requests[0].computed < 40:
        count = min(11, 40 - requests[0].computed)
        assert all(server.allocate(request, count) for request in requests)
        first, second = server.step([(request, count) for request in requests])
        assert not torch.equal(first, second)
        got.append(first)
    torch.testing.assert_close(torch.cat(got), alone(layer, good), rtol=1e-4, atol=1e-4)


def test_half_precision_layers_keep_float32_memories():
    layer = memory_layer(1, 3, chunk_size=8, write_scale="exact").to(torch.bfloat16)
    text = documents(memory_layer(1, 3, chunk_size=8), 0, 1, 32)[0].to(torch.bfloat16)
    server = Server(layer, [text], 4, 4, blocks=40)
    request = server.add(0, 32)
    got = []
    for count in (7, 1, 24):
        assert server.allocate(request, count)
        got += server.step([(request, count)])
    assert torch.cat(got).dtype == torch.bfloat16
    difference = (torch.cat(got) - alone(layer, text)).abs()
    assert difference.median() < 0.02
    assert (difference < 0.1).float().mean() > 0.9  # a token in a hundred may take another slot on a near tie


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))
def test_layouts_are_aligned_views(a, b, c):
    layout = Layout(Field("a", torch.bfloat16, a), Field("b", torch.float32, b), Field("c", torch.int32, c))
    assert 0 <= layout.nbytes - (2 * a + 4 * b + 4 * c) < 4
    pages = torch.zeros(3, 4, layout.nbytes + 8, dtype=torch.uint8)[:, :, : layout.nbytes]
    views = layout.views(pages)
    for i, (name, view) in enumerate(views.items()):
        assert view.shape == (3, 4, {"a": a, "b": b, "c": c}[name])
        view.fill_(i + 1)
    for i, view in enumerate(views.values()):
        assert (view == i + 1).all()  # no two overlap
        assert view.untyped_storage().data_ptr() == pages.untyped_storage().data_ptr()


@given(st.integers(1, 1 << 20), st.integers(1, 1 << 14), st.sampled_from([16, 32, 48, 128]))
def test_records_fill_pages(page_bytes, record_bytes, block):
    tokens = tokens_per_page(page_bytes, record_bytes, block)
    assert max(tokens, block) % min(tokens, block) == 0
    if tokens * record_bytes > page_bytes:  # not even the fewest fit
        assert tokens % 2 == 1
    elif tokens < MOST * block:  # or sharing would be coarse
        assert 2 * tokens * record_bytes > page_bytes
        assert tokens < block or (tokens + block) * record_bytes > page_bytes


@given(st.integers(1, 1 << 20), st.integers(1, 1 << 14), st.integers(1, 512), st.sampled_from([16, 32, 48, 128]))
def test_prefixes_are_shared_wherever_pages_of_the_log_end(page_bytes, record_bytes, width, block):
    config = FwPKMConfig(fwpkm_value_dim=width)
    log = tokens_per_page(page_bytes, log_layout(config).nbytes, block)
    tokens = tokens_beside_log(page_bytes, record_bytes, block, config)
    assert log % tokens == 0
    assert tokens * record_bytes <= page_bytes or tokens % 2
    assert tokens_beside_log(page_bytes, log_layout(config).nbytes, block, config) == log


@given(st.integers(1, 10_000), st.lists(st.integers(1, 60), min_size=1, max_size=4))
def test_stretches_are_whole_chunks_and_blocks(limit, sizes):
    tokens = stretch(limit, *sizes)
    assert tokens >= limit
    assert not any(tokens % size for size in sizes)
    assert not any(all(n % size == 0 for size in sizes) for n in range(limit, min(tokens, limit + 500)))


def test_a_request_at_the_papers_size_takes_less_than_8_megabytes_a_layer():
    """Of 4,096 tokens, beside 12 heads of 64 numbers in half precision; dense fast weights are 513 MiB."""
    config = FwPKMConfig(fwpkm_log_dtype="bfloat16")
    page = 32 * 2 * 12 * 64 * 2
    assert log_layout(config).nbytes == 8 * 8 + 2 * 512
    tokens = tokens_per_page(page, log_layout(config).nbytes, 32)
    assert 4096 / tokens * page == 4096 * 1536 < 8e6


def test_a_batch_says_where_tokens_stand():
    batch = Batch.of(torch.tensor([0, 3, 3, 5]), torch.tensor([10, 0, 2]), 7, 3)
    assert batch.requests.tolist() == [0, 0, 0, 2, 2, -1, -1]
    assert batch.positions.tolist() == [7, 8, 9, 0, 1, 0, 0]
    assert batch.computed.tolist() == [7, 0, 0]


@pytest.mark.parametrize(("longest", "chunk", "rounds"), [(1, 8, 1), (2, 8, 2), (9, 8, 2), (10, 8, 3), (3, 1, 3)])
def test_rounds_are_enough_and_one_in_decode(longest, chunk, rounds):
    start = torch.tensor([0, longest])
    assert Batch.of(start, start[1:], longest, longest).rounds(chunk) == rounds
    for computed in range(2 * chunk):
        batch = Batch.of(start, start[1:] + computed, longest, longest)
        number = batch.chunks(chunk, batch.positions, batch.owners)[0]
        assert number[-1] - number[0] < rounds


def test_a_step_is_one_graph_that_waits_for_nothing():
    """No part of it looks at what is on the device: neither one decoded token each, nor pieces over many chunks."""
    still = memory_layer(1, 3, chunk_size=8, write_scale="exact")
    texts = documents(still, 0, 2, 32)
    whole = torch.compile(serve, fullgraph=True, backend="eager")

    def compiled(now: Step) -> Step:
        hidden = torch.randn(len(now.batch.requests), 10, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(whole(layer, hidden, now), serve(layer, hidden, now))
        return now

    fast = memory_layer(1, 3, chunk_size=8, write_scale="exact", key_update="fast")
    for layer, counts, rows in (
        (still, (1, 1), None),
        (still, (20, 9), None),
        (still, (5, 8), 7),
        (fast, (20, 9), None),
        (fast, (1, 1), None),
    ):
        server = Server(layer, texts, 4, 4, rows, blocks=40)
        pieces = [(server.add(i, 32), count) for i, count in enumerate(counts)]
        assert all(server.allocate(*piece) for piece in pieces)
        server.step(pieces, padding=1, change=compiled)
