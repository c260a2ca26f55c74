"""``inspect``: what is said of a text is what the model did; and the page that shows it, in a browser."""

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess

import pytest
import torch
from typer.testing import CliRunner

from fwpkm.cli import app
from fwpkm.data.byte_tokenizer import END
from fwpkm.evaluation import inspection as inspections
from fwpkm.evaluation.inspection import InspectedLayer, Inspection, SlotUsage, inspect, slot_usage
from fwpkm.report.inspect_page import inspect_page
from tests.test_report import Tree, cells
from tests.test_session import make

TEXT = "größe 日本: " + "".join(chr(97 + i * i % 26) for i in range(90)) + " 🎉"
HOSTILE = "</script><script>document.title='hacked'</script><!--<script>\u2028\0 é&amp;"


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fwpkm_key_update": "fast", "fwpkm_heads": 2},
        {"fwpkm_lookahead": 2, "fwpkm_scope": "shared", "fwpkm_query_conv": 0},
    ],
)
def test_is_what_the_model_does(options, monkeypatch):
    model = make(**options)
    monkeypatch.setattr(inspections, "_PIECE", 41)
    told = []
    have = inspect(model, TEXT, top=200, on_tokens=told.append)
    tokens = torch.tensor(list(TEXT.encode()))
    with torch.no_grad():
        want = model(tokens.unsqueeze(0), output_memories=True)
    length = tokens.numel()
    assert told == [41] * (length // 41) + [length % 41]
    chances = want.logits[0].softmax(-1)
    torch.testing.assert_close(have.confidence, chances.amax(-1))
    torch.testing.assert_close(have.probability, chances[torch.arange(length - 1), tokens[1:]])
    # an end of a text has no text
    assert have.guesses == ["" if x == END else bytes([x]).decode(errors="replace") for x in chances.argmax(-1)]
    assert "".join(have.texts) == TEXT
    assert (have.lookahead, have.chunk_size) == (options.get("fwpkm_lookahead", 1), 16)
    assert [layer.block for layer in have.layers] == [0, 2]
    for layer, gates, slots in zip(have.layers, want.gates, want.slots, strict=True):
        torch.testing.assert_close(layer.gates, gates[0])
        assert torch.equal(layer.slots, slots[0])
        torch.testing.assert_close(layer.weights.sum(-1), torch.ones(length))
        assert layer.error < 1e-5
        torch.testing.assert_close(layer.base + layer.shares.sum(-1), torch.ones(length), rtol=1e-4, atol=1e-4)
        chunk = torch.arange(length) // 16
        there = layer.sources >= 0
        assert there.any()
        assert (layer.sources // 16 < chunk.unsqueeze(1))[there].all()
        target = layer.sources + have.lookahead
        assert (target // 16 == layer.sources // 16)[there].all()  # tokens at the end of a chunk store nothing
        assert not layer.shares[~there].any()
        assert layer.usage == slot_usage(slots[0], chunk, 64)
    assert not model.model.layers[0]._forward_hooks


def test_sources_as_text(model):
    have = inspect(model, TEXT.encode(), top=3)
    position = len(TEXT.encode()) - 1
    layer = have.layers[1]
    sources = have.recalled(position, layer=1, around=5)
    assert [(s.position, s.share) for s in sources] == [
        (p, x) for p, x in zip(layer.sources[position].tolist(), layer.shares[position].tolist(), strict=True) if p >= 0
    ]
    assert sources
    for source in sources:
        assert source.target == source.position + 1
        part = TEXT.encode()[max(0, source.target - 5) : source.target + 6]
        assert source.text in TEXT
        assert part.decode(errors="ignore") in source.text  # which is whole where that begins inside a character
    assert have.recalled(3) == []  # nothing is committed yet


def test_tokens_are_cut(model):
    assert "".join(inspect(model, TEXT, tokens=11).texts) == TEXT.encode()[:11].decode(errors="replace")
    assert len(inspect(model, "x", tokens=11).texts) == 1


def test_usage():
    generator = torch.Generator().manual_seed(0)
    slots = (torch.rand(60, 3, generator=generator) ** 2 * 40).long()
    chunks = torch.arange(60) // 8
    usage = slot_usage(slots, chunks, 50)
    flat = slots.flatten().tolist()
    shares = [flat.count(s) / len(flat) for s in set(flat)]
    assert usage.coverage == len(shares) / 50
    assert usage.divergence == pytest.approx(sum(p * math.log(p * 50) for p in shares))
    reads = [(int(c), s) for c, row in zip(chunks, slots.tolist(), strict=True) for s in row]
    assert usage.collisions == pytest.approx(sum(reads.count(read) > 1 for read in reads) / len(reads))
    even = slot_usage(torch.arange(50).view(25, 2), torch.arange(25), 50)
    assert even == (1.0, 0.0, pytest.approx(0))
    one = slot_usage(torch.zeros(25, 2, dtype=torch.int64), torch.arange(25), 50)
    assert one == (1 / 50, 1.0, pytest.approx(math.log(50)))


def test_bad_input(model):
    for options, message in (
        ({"text": ""}, "text is empty"),
        ({"tokens": 0}, "tokens is 0; expected a positive integer"),
        ({"top": 0}, "top is 0; expected a positive integer"),
        ({"model": make(fwpkm_layers=[])}, "fwpkm_layers is"),
    ):
        with pytest.raises(ValueError, match=message):
            inspect(**{"model": model, "text": TEXT} | options)
    with pytest.raises(ValueError, match="position is 900; expected one of"):
        inspect(model, TEXT).recalled(900)


def made_up(length, layers=2, hostile=False):
    """An inspection of no model."""
    generator = torch.Generator().manual_seed(length)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    def layer(block):
        sources = (uniform(length, 5) * torch.arange(length).unsqueeze(1)).long() - 1
        shares = torch.where(sources >= 0, uniform(length, 5) - 0.3, 0)
        base = 1 - shares.sum(1)
        slots = (uniform(length, 12) * 4096).long()
        usage = SlotUsage(0.5, 0.25, 2.0)
        gates = uniform(length) ** 4
        return InspectedLayer(block, 4096, gates, slots, uniform(length, 12), base, sources, shares, usage, 1e-6)

    texts = [chr(97 + int(x)) for x in uniform(length) * 26]
    if hostile:
        texts[5] = HOSTILE
    guesses = texts[7:] + texts[:7]
    return Inspection(
        texts, 1, 64, guesses, uniform(length), uniform(length - 1), tuple(layer(3 * i) for i in range(layers))
    )


def test_page_holds_the_inspection():
    made = made_up(40, hostile=True)
    made.layers[1].shares[20, 0] = torch.nan  # of a memory whose numbers have no bounds
    made.layers[1].base[20] = torch.inf
    page = inspect_page(made, {"text": HOSTILE, "tokens": 40})
    root = Tree(page).root
    data, script = root.all("script")
    held = json.loads(data.text)
    assert held["texts"][:5] == made.texts[:5]
    assert held["texts"][5] == HOSTILE.replace("\0", "␀")
    assert [held["words"][i] for i in held["guesses"]] == [g.replace("\0", "␀") for g in made.guesses]
    assert held["confidence"] == pytest.approx((made.confidence * 100).tolist(), abs=0.51)
    assert held["probability"] == pytest.approx((made.probability * 100).tolist(), abs=0.51)
    for layer, shown in zip(made.layers, held["layers"], strict=True):
        assert shown["gates"] == pytest.approx((layer.gates * 100).tolist(), abs=0.51)
        for position in range(40):
            if math.isfinite(layer.base[position]):
                assert shown["base"][position] == pytest.approx(1000 * layer.base[position].item(), abs=0.51)
            pairs = zip(layer.sources[position].tolist(), layer.shares[position].tolist(), strict=True)
            strong = [x for s, share in pairs if round(abs(share) * 1000 if share == share else 0) >= 5
                      for x in (s, pytest.approx(share * 1000, abs=0.51))]  # fmt: skip
            assert shown["sources"][position] == strong
            largest = layer.weights[position].argsort(descending=True)[:8]
            assert shown["slots"][position] == layer.slots[position, largest].tolist()
    assert held["layers"][1]["base"][20] == 0
    policy = next(m.attributes["content"] for m in root.all("meta") if m.attributes.get("http-equiv"))
    digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "http" not in page.replace("http-equiv", "")
    rows = cells(root.one("table"))
    assert [row[:5] for row in rows] == [[f"block {i}", "4,096", "50.0%", "25.0%", "2"] for i in (0, 3)]
    assert HOSTILE.replace("\0", "␀") in root.one("dl").text


def browse(folder, page, place="", script=""):
    """A page's elements after a browser has run its script, and one of ours."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("needs Chromium")
    if script:
        page = re.sub(r"; script-src [^\"]*", "; script-src 'unsafe-inline'", page)
        page = page.replace("</body>", f"<script>{script}</script></body>")
    (folder / "page.html").write_text(page, encoding="utf-8")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--dump-dom", f"{(folder / 'page.html').as_uri()}{place}"]
    out = subprocess.run(command, capture_output=True, check=True, timeout=120).stdout.decode()
    out = re.sub(r'<script type="application/json".*?</script>', "", out, flags=re.DOTALL)
    page = Tree.__new__(Tree)
    page.VOID = (*Tree.VOID, "br")
    page.__init__(out)
    return page.root


def by_id(root, name):
    return next(node for node in root.all() if node.attributes.get("id") == name)


def test_page_in_a_browser(tmp_path):
    """A token asked for by the address, in the second memory, and what hovering and keys change."""
    made = made_up(200, hostile=True)
    page = inspect_page(made, {"text": HOSTILE})
    root = browse(tmp_path, page, "#150:1")
    assert root.one("title").text == "FwPKM: what a memory recalls"
    spans = list(by_id(root, "text").all("span"))
    assert [span.text for span in spans] == [text.replace("\0", "␀") for text in made.texts]
    layer = made.layers[1]
    assert [float(span.attributes["style"].split(":")[1].strip(" ;")) for span in spans] == pytest.approx(
        layer.gates.tolist(), abs=0.0051
    )
    check_panel(root, made, layer, 150)
    assert ", kept" in by_id(root, "panel").text

    over = "document.getElementById('text').children[{}].dispatchEvent(new MouseEvent('{}', {{bubbles: true}}));"
    key = "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}));"
    choose = "choice.value = 1; choice.dispatchEvent(new Event('change'));"
    steps = over.format(90, "mouseover") + over.format(120, "click") + over.format(7, "mouseover") + key
    root = browse(tmp_path, page, script=steps)
    check_panel(root, made, made.layers[0], 121)
    root = browse(tmp_path, page, script=choose + over.format(90, "mouseover"))
    check_panel(root, made, made.layers[1], 90)
    assert ", kept" not in by_id(root, "panel").text


def check_panel(root, made, layer, position):
    """The panel and the marks in the text say what the inspection does."""
    panel = by_id(root, "panel")
    assert f"token {position + 1:,} of {len(made.texts):,}" in panel.text
    assert f"Gate {layer.gates[position]:.2f}" in panel.text
    guess, text = made.guesses[position], made.texts[position + 1]
    verdict = ", rightly" if guess == text else f"; {text} follows"
    assert f"expects {guess} ({100 * made.confidence[position]:.0f}%){verdict}" in panel.text
    shares = [float(item.one("strong").text.rstrip("%").replace("−", "-")) for item in panel.one("ul").all("li")]
    pairs = zip(layer.sources[position].tolist(), layer.shares[position].tolist(), strict=True)
    strong = [(source, 100 * share) for source, share in pairs if abs(share) >= 0.005 and source >= 0]
    assert shares[: len(strong) + 1] == pytest.approx(
        [s for _, s in strong] + [100 * layer.base[position].item()], abs=0.51
    )
    assert sum(shares) == pytest.approx(100, abs=2)
    marked = [mark.text for mark in panel.all("mark")]
    assert marked == [made.texts[source + 1] for source, _ in strong]
    spans = list(by_id(root, "text").all("span"))
    classes = [(span.attributes.get("class") or "").split() for span in spans]
    assert [i for i, names in enumerate(classes) if "here" in names] == [position]
    assert {i for i, names in enumerate(classes) if "source" in names} == {source + 1 for source, _ in strong}


def test_a_long_text_in_a_browser(tmp_path):
    """32K tokens: a page of some megabytes, that opens."""
    made = made_up(1 << 15, layers=1)
    page = inspect_page(made, {})
    assert len(page.encode()) < 8e6
    root = browse(tmp_path, page, "#32000")
    assert len(list(by_id(root, "text").all("span"))) == 1 << 15
    check_panel(root, made, made.layers[0], 32000)


def test_command(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text(TEXT)
    (tmp_path / "empty").write_text("")

    def run(*args, code=0):
        result = CliRunner().invoke(app, ["inspect", *map(str, args)], catch_exceptions=False)
        assert result.exit_code == code, result.output
        return " ".join(result.output.split())

    out = tmp_path / "deep" / "page.html"
    said = run(tmp_path / "model", tmp_path / "text", "--out", out, "--tokens", 50)
    assert f"50 tokens read. Page: {out} ({out.stat().st_size:,} bytes)".replace(" ", "") in said.replace(" ", "")
    have = json.loads(next(Tree(out.read_text()).root.all("script")).text)
    want = inspect(model, TEXT, tokens=50)
    assert have["texts"] == want.texts
    assert have["layers"][1]["gates"] == pytest.approx((want.layers[1].gates * 100).tolist(), abs=0.51)
    assert "empty is empty; expected a text" in run(tmp_path / "model", tmp_path / "empty", code=2)
    assert "tokens is 0" in run(tmp_path / "model", tmp_path / "text", "--tokens", 0, code=2)
