"""What a request gets depends on nobody else: a state machine over everything that can happen to requests and pages."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from typing import ClassVar

import pytest
import torch
from fwpkm_vllm import step as step_module
from fwpkm_vllm.folded import Folded
from fwpkm_vllm.keys import MovingKeys
from fwpkm_vllm.paged import Pages, Versions
from fwpkm_vllm.step import Batch, Step
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from tests.serving.toy import NOBODY, Server, alone, documents, memory_layer

LENGTH = 36
ACTIONS = ("add", "join", "burst", "step", "preempt", "abort", "finish")
# Setups: chunk size, lookahead, width of the convolution, records a page of the log and of recent tokens; rows a page
# that logs are folded to; sub-keys a page, where they move.
SETUPS = [(4, 1, 3, 5, 3), (5, 2, 0, 2, 4), (3, 0, 4, 4, 4), (7, 1, 2, 3, 2)]
FOLDING = [(4, 1, 3, 2, 2, 9), (3, 1, 0, 3, 4, 25), (5, 2, 2, 5, 2, 14)]
MOVING = [(4, 1, 3, 5, 3, None, 4), (5, 2, 0, 2, 4, None, 3), (3, 0, 2, 3, 1, 25, 10)]


def prepare(setup: tuple[int, ...]) -> tuple:
    chunk_size, lookahead, query_conv, *_ = setup
    fields = {"chunk_size": chunk_size, "lookahead": lookahead, "write_scale": "exact", "learning_rate": 0.7}
    layer = memory_layer(0, query_conv, key_update="fast" if setup in MOVING else "train_only", **fields)
    # Documents 1, 2 and 3 part from 0 inside a chunk or page, at the end of one, and after the first token.
    texts = documents(layer, 0, 5, LENGTH, common=(0, 13, 20, 1, 0))
    origins = (0,) if setup in MOVING else (0, 9)
    return layer, texts, [[alone(layer, text, origin) for origin in origins] for text in texts]


PREPARED = {setup: prepare(setup) for setup in SETUPS + FOLDING + MOVING}


class Serving(RuleBasedStateMachine):
    """Requests come, are read in pieces beside others, lose their pages, go; each is compared with itself alone."""

    setups: ClassVar = SETUPS
    pairs: ClassVar[Counter[tuple[str, str]]] = Counter()  # which action followed which
    compared = 0
    versions = 0  # of folded rows or of keys that were made
    reused = 0  # blocks that had belonged to somebody else before

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        setup = data.draw(st.sampled_from(self.setups))
        layer, texts, self.expected = PREPARED[setup]
        self.server = Server(layer, texts, *setup[3:], blocks=36)
        self.before: str | None = None
        self.used: set[tuple[str, int]] = set()

    def did(self, action: str) -> None:
        if self.before is not None:
            Serving.pairs[self.before, action] += 1
        self.before = action

    @rule(document=st.integers(0, 4), length=st.integers(1, LENGTH), early=st.booleans())
    def add(self, document: int, length: int, early: bool) -> None:
        self.server.add(document, length, 9 if early and not self.server.versions else 0)
        self.did("add")

    @precondition(lambda self: self.server.requests)
    @rule(document=st.integers(0, 4), data=st.data())
    def join(self, document: int, data: st.DataObject) -> None:
        """A request that starts from pages of others' prefixes."""
        other = data.draw(st.sampled_from(self.server.requests))
        self.server.add(document, LENGTH, other.origin, shares=True)
        self.did("join")

    @rule(
        arrivals=st.lists(st.tuples(st.integers(0, 3), st.sampled_from([3, 9, 20, LENGTH])), min_size=2, max_size=3),
        early=st.booleans(),
        data=st.data(),
        padding=st.integers(0, 2),
    )
    def burst(self, arrivals: list[tuple[int, int]], early: bool, data: st.DataObject, padding: int) -> None:
        """Several that share a prefix arrive in one step, behind those that are there; some are twice the same. One may
        be preempted in that step, once it has its pages.
        """
        pieces = self.pieces(data)
        for document, count in arrivals:
            origin = 9 if early and not self.server.versions else 0
            request = self.server.add(document, LENGTH, origin, shares=True)
            count = min(count, self.server.longest_piece, request.length - request.computed)
            if self.server.allocate(request, count):
                pieces.append((request, count))
        lost = data.draw(st.sampled_from([None, *(request for request, _ in pieces)]))
        if lost is not None:
            self.lose(lost)
        self.read([piece for piece in pieces if piece[0] is not lost], padding)
        self.did("burst")

    @precondition(lambda self: self.server.requests)
    @rule(data=st.data(), padding=st.integers(0, 2))
    def step(self, data: st.DataObject, padding: int) -> None:
        pieces = self.pieces(data)
        if pieces:
            self.read(pieces, padding)
            self.did("step")

    def pieces(self, data: st.DataObject) -> list:
        """What is read next of the requests that are there, as far as there are pages."""
        pieces = []
        for request in self.server.requests:
            left = request.length - request.computed
            count = min(left, self.server.longest_piece, data.draw(st.sampled_from([0, 1, 1, 2, 3, 5, 9, LENGTH])))
            if count and self.server.allocate(request, count):
                pieces.append((request, count))
        return pieces

    def read(self, pieces: list, padding: int) -> None:
        if not pieces:
            return
        for kind in self.server.pools:
            now = {(kind, b) for request, _ in pieces for b in request.blocks[kind] if b != NOBODY}
            Serving.reused += len(now & self.used)
            self.used |= now
        spans = [(r.document, r.origin, r.computed, r.computed + count) for r, count in pieces]
        for (document, origin, first, end), out in zip(spans, self.run(pieces, padding), strict=True):
            expected = self.expected[document][origin > 0][first:end]
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
            Serving.compared += 1
            for stretch, _ in self.server.versions.values():
                Serving.versions += end // stretch - first // stretch

    def run(self, pieces: list, padding: int) -> list[torch.Tensor]:
        return self.server.step(pieces, padding)

    @precondition(lambda self: any(r.computed for r in self.server.requests))
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        self.lose(data.draw(st.sampled_from([r for r in self.server.requests if r.computed])))
        self.did("preempt")

    def lose(self, request) -> None:
        self.server.preempt(request)

    @precondition(lambda self: self.server.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.server.remove(data.draw(st.sampled_from(self.server.requests)))
        self.did("abort")

    @precondition(lambda self: any(r.computed == r.length for r in self.server.requests))
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.server.remove(data.draw(st.sampled_from([r for r in self.server.requests if r.computed == r.length])))
        self.did("finish")


def run(machine: type[Serving], **more: object) -> None:
    run_state_machine_as_test(machine, settings=settings(stateful_step_count=50, **more))


class Folding(Serving):
    """The same with logs that are folded."""

    setups = FOLDING


class Moving(Serving):
    """The same with keys that move, once with logs that are folded too."""

    setups = MOVING


@pytest.mark.parametrize("machine", [Serving, Folding, Moving])
def test_what_a_request_gets_depends_on_nobody_else(machine):
    Serving.pairs.clear()
    Serving.compared = Serving.reused = Serving.versions = 0
    examples = 4 * settings().max_examples
    run(machine, max_examples=examples)
    assert Serving.compared > 5 * examples
    assert Serving.reused > examples
    assert (Serving.versions > examples // 4) == (machine is not Serving)
    if examples >= 160:
        assert set(Serving.pairs) == set(itertools.product(ACTIONS, ACTIONS)), "a pair of actions never happened"
    if examples >= 1200:
        assert Serving.compared >= 10_000


def expect_failure(machine: type[Serving]) -> None:
    """Within what the profile ``ci`` draws: other numbers, or what operators refuse (NaN, or a block of no request)."""
    with pytest.raises((AssertionError, ValueError, IndexError), match=r"not close|holds NaN|expected|out of bounds"):
        run(machine, max_examples=40, database=None, derandomize=True, print_blob=False, phases=[Phase.generate])


# Planted faults: in the server (what vLLM does), and in the layer. Each must be noticed.


class Faulty(Serving):
    def run(self, pieces: list, padding: int) -> list[torch.Tensor]:
        return self.server.step(pieces, padding, self.change)

    def change(self, step: Step) -> Step:
        raise NotImplementedError

    def teardown(self) -> None:
        pass


def with_tables(step: Step, change, *names: str) -> Step:
    pages = {name: getattr(step, name) for name in names}
    changed = {k: dataclasses.replace(x, table=change(x.table.clone())) for k, x in pages.items() if x is not None}
    return dataclasses.replace(step, **changed)


def next_row(table: torch.Tensor) -> torch.Tensor:
    return table.roll(1, 0) if table.shape[0] > 1 else table


class WrongBlock(Faulty):
    """The first blocks of two requests are confused."""

    def change(self, step: Step) -> Step:
        return with_tables(step, next_row, "log", "recent")


class WrongRows(Faulty):
    """The folded rows of two requests are confused, where they are read."""

    setups = FOLDING

    def change(self, step: Step) -> Step:
        assert step.folded is not None
        if step.folded.due:
            return step
        versions = dataclasses.replace(step.folded.versions, table=next_row(step.folded.versions.table))
        return dataclasses.replace(step, folded=dataclasses.replace(step.folded, versions=versions))


class MissingReset(Serving):
    """A preempted request gets new pages, but goes on where it was."""

    def lose(self, request) -> None:
        computed = request.computed
        self.server.preempt(request)
        if self.server.allocate(request, computed):
            request.computed = computed


class StalePage(Serving):
    """A preempted request keeps using the pages that were taken from it."""

    def lose(self, request) -> None:
        computed, blocks = request.computed, {kind: list(x) for kind, x in request.blocks.items()}
        self.server.preempt(request)
        request.computed = computed
        for kind, held in blocks.items():
            request.blocks[kind] = held
            for block in held:
                if block != NOBODY and block in self.server.pools[kind].free:
                    self.server.pools[kind].free.remove(block)
                self.server.pools[kind].holders[block] += 1


class LateRows(Faulty):
    """Rows are made one step too late: the version that was to be read is not there."""

    setups = FOLDING

    def change(self, step: Step) -> Step:
        assert step.folded is not None
        return dataclasses.replace(step, folded=dataclasses.replace(step.folded, due=[]))


class WrongKeys(Faulty):
    """The keys of two requests are confused."""

    setups = MOVING

    def change(self, step: Step) -> Step:
        assert step.keys is not None
        versions = dataclasses.replace(step.keys.versions, table=next_row(step.keys.versions.table))
        return dataclasses.replace(step, keys=dataclasses.replace(step.keys, versions=versions))


class LateKeys(Faulty):
    """Commits make no keys: the version that was to be read is not there."""

    setups = MOVING

    def change(self, step: Step) -> Step:
        assert step.keys is not None
        parts = [part._replace(completes=False) for part in step.keys.parts]
        return dataclasses.replace(step, keys=dataclasses.replace(step.keys, parts=parts))


class OfferedAtOnce(Serving):
    """Pages are offered to requests of the very step that writes them."""

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        super().start(data)
        self.server.offered = lambda other: other.scheduled  # type: ignore[method-assign]


class RowsOfferedAtOnce(OfferedAtOnce):
    """The same of folded rows, and logs that end."""

    setups = FOLDING


class KeysOfferedAtOnce(OfferedAtOnce):
    """The same of keys and queries."""

    setups = MOVING


class StaleKeys(StalePage):
    """A preempted request keeps using the pages that were taken from it, those of its keys and queries too."""

    setups = MOVING


@pytest.mark.parametrize(
    "machine",
    [
        WrongBlock,
        WrongRows,
        LateRows,
        WrongKeys,
        LateKeys,
        MissingReset,
        StalePage,
        StaleKeys,
        OfferedAtOnce,
        RowsOfferedAtOnce,
        KeysOfferedAtOnce,
    ],
)
def test_faults_of_the_server_are_noticed(machine):
    expect_failure(machine)


def _reads_the_open_chunk(self: Batch, chunk_size, positions, requests):
    number, start = CHUNKS(self, chunk_size, positions, requests)
    return number, torch.where(start > 0, start + 1, start)


def _reads_before_the_start(self: Pages, name, requests, positions):
    """A request's recent records before its first token are those that stand there."""
    return READ(self, name, requests, positions.abs())


def _writes_what_is_not_its_own(self: Pages, name, new, which=None):
    WRITE(self, name, new, None)


def _begins_with_the_first_record(self: Folded, computed):
    return torch.zeros_like(computed)


def _forgets_what_was_folded_before(self: Folded, request, version, *records):
    if version > 1:
        before = slice((version - 2) * self.versions.pages, (version - 1) * self.versions.pages)
        self.versions.rows[self.versions.table[request, before].long()] = 0
    MAKE(self, request, version, *records)


def _gets_the_version_before(self: Versions, requests, versions, count):
    return GET(self, requests, (versions - 1).clamp_min(1), count)


def _commits_this_step_s_queries_alone(self: MovingKeys, part, query, config):
    chunk = CHUNK(self, part, query, config).clone()
    chunk[:, : -part.tokens.shape[1]] = query[part.tokens[:, :1]]
    return chunk


CHUNKS, READ, WRITE = Batch.chunks, Pages.read, Pages.write
MAKE, GET, CHUNK = Folded.make, Versions.get, MovingKeys._chunk


@pytest.mark.parametrize(
    ("owner", "name", "fault"),
    [
        (Batch, "chunks", _reads_the_open_chunk),
        (Pages, "write", _writes_what_is_not_its_own),
        (Folded, "version", _begins_with_the_first_record),
        (Folded, "make", _forgets_what_was_folded_before),
        (Versions, "get", _gets_the_version_before),
        (MovingKeys, "_chunk", _commits_this_step_s_queries_alone),
        (step_module, "relative_write_scale", lambda config, length: torch.ones_like(length)),
    ],
    ids=[
        "open chunk",
        "other rounds' records",
        "folded records",
        "older rows",
        "older keys",
        "open queries",
        "short chunk",
    ],
)
def test_faults_of_the_layer_are_noticed(monkeypatch, owner, name, fault):
    monkeypatch.setattr(owner, name, fault)
    if name == "relative_write_scale":  # what only write_scale="reference" has
        layer = memory_layer(0, chunk_size=4, write_scale="reference", learning_rate=0.2)
        (text,) = documents(layer, 0, 1, LENGTH)
        server = Server(layer, [text], 5, 3, blocks=30)
        request = server.add(0, LENGTH, origin=10)
        assert server.allocate(request, LENGTH)
        (out,) = server.step([(request, LENGTH)])
        with pytest.raises(AssertionError):
            torch.testing.assert_close(out, alone(layer, text, 10), rtol=1e-4, atol=1e-4)
        return
    expect_failure({Folded: Folding, Versions: Moving, MovingKeys: Moving}.get(owner, Serving))
