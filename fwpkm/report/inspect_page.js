"use strict";
// One span a token; the panel says what the memory gave at the one that is pointed at.
const data = JSON.parse(document.getElementById("data").textContent);
const count = data.texts.length;
const text = document.getElementById("text"), panel = document.getElementById("panel");
const strip = document.getElementById("strip"), choice = document.getElementById("layer");
let layer = data.layers[0], shown = -1, pinned = false, marked = [];

const number = value => value.toLocaleString("en");
const percent = value => `${value.toFixed(Math.abs(value) < 9.95 && value % 1 ? 1 : 0)}%`.replace("-", "−");
const named = token => token.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "…";
const clamped = position => Math.max(0, Math.min(count - 1, position));

function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const spans = data.texts.map((content, position) => {
  const span = document.createElement("span");
  span.textContent = content;
  span.position = position;
  return span;
});
text.append(...spans);

function choose(index) {
  layer = data.layers[index];
  choice.value = index;
  spans.forEach((span, position) => span.style.setProperty("--gate", layer.gates[position] / 100));
  if (shown >= 0) show(shown); else draw();
}

// The text around a stored token, which is marked.
function excerpt(target) {
  const part = (from, to) => data.texts.slice(Math.max(0, from), to).join("").replace(/\n/g, "⏎");
  const marked = make("mark", {}, named(data.texts[target]));
  return make("code", {}, part(target - 28, target), marked, part(target + 1, target + 13));
}

function bar(share, kind = "") {
  const style = `--share: ${Math.min(1, Math.abs(share) / 100)}`;
  return make("span", { class: `bar ${share < 0 ? "away" : ""} ${kind}`, "aria-hidden": "true" }, make("span", { style }));
}

function part(share, kind, ...content) {
  return make("li", {}, make("strong", {}, percent(share)), bar(share, kind), make("div", {}, ...content));
}

function link(position, ...content) {
  const button = make("button", { type: "button" }, ...content);
  button.addEventListener("click", () => scrollTo(position));
  return button;
}

function sourcesOf(position) {
  const flat = layer.sources[position], found = [];
  for (let i = 0; i < flat.length; i += 2) found.push({ target: flat[i] + data.lookahead, share: flat[i + 1] / 10 });
  return found;
}

// What the model took for the next token, and what it is.
function expected(position) {
  const code = token => make("code", {}, named(token));
  const guess = data.words[data.guesses[position]], next = data.texts[position + 1];
  const said = ["Next the model expects ", code(guess), ` (${percent(data.confidence[position])})`];
  if (next === undefined) return [...said, "."];
  if (next === guess) return [...said, ", rightly."];
  return [...said, "; ", code(next), ` follows, to which it gave ${percent(data.probability[position])}.`];
}

function show(position) {
  shown = position;
  const sources = sourcesOf(position), base = layer.base[position] / 10;
  const others = 100 - base - sources.reduce((sum, source) => sum + source.share, 0);
  const gate = layer.gates[position];
  const parts = sources.map(({ target, share }) => part(share, "", link(target, excerpt(target)),
    make("span", { class: "faint" }, `${number(position - target)} tokens before`)));
  parts.push(part(base, "base", "what the memory held before the text"));
  if (Math.abs(others) >= 0.05) parts.push(part(others, "base", "all other tokens together"));
  const slots = layer.slots[position], weights = layer.weights[position];
  panel.replaceChildren(
    make("h3", {}, link(position, make("code", {}, named(data.texts[position]))),
      make("span", { class: "faint" }, ` token ${number(position + 1)} of ${number(count)}${pinned ? ", kept" : ""}`)),
    make("p", {}, ...expected(position)),
    make("h4", {}, `Gate ${(gate / 100).toFixed(2)}`), bar(gate),
    ...(gate < 5 ? [make("p", { class: "faint" }, "All but closed: the model hardly uses what was read here.")] : []),
    make("h4", {}, "What it read is made of (marked: the token that was stored)"), make("ul", {}, ...parts),
    make("h4", {}, "Slots it read, by weight"),
    make("p", { class: "faint slots" }, slots.map((slot, i) => `${slot} (${percent(weights[i])})`).join("  ")));
  for (const span of marked) span.classList.remove("here", "source");
  marked = [spans[position], ...sources.map(({ target }) => spans[target])];
  marked.forEach((span, i) => span.classList.add(i ? "source" : "here"));
  draw();
}

function scrollTo(position) {
  text.scrollTop = spans[position].offsetTop - text.clientHeight / 2;
}

function keep(position) {
  pinned = position !== null;
  const place = pinned ? `#${position}${layer === data.layers[0] ? "" : `:${data.layers.indexOf(layer)}`}` : "#";
  history.replaceState(null, "", place);
  if (pinned) show(position); else if (shown >= 0) show(shown);
}

// The whole text in one line: the widest gate in each column, the token shown and its sources.
function draw() {
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [strip.clientWidth, strip.clientHeight].map(size => Math.round(size * ratio));
  if (!width) return;
  strip.width = width;
  strip.height = height;
  const columns = new Float32Array(width);
  layer.gates.forEach((gate, position) => {
    const column = Math.floor(position / count * width);
    columns[column] = Math.max(columns[column], gate / 100);
  });
  const pen = strip.getContext("2d"), colour = name => getComputedStyle(document.documentElement).getPropertyValue(name);
  pen.fillStyle = colour("--memory");
  columns.forEach((gate, column) => pen.fillRect(column, height * (1 - gate), Math.max(1, width / count), height * gate));
  const tick = (position, name) => {
    pen.fillStyle = colour(name);
    pen.fillRect(Math.floor((position + .5) / count * width) - ratio, 0, 2 * ratio, height);
  };
  if (shown < 0) return;
  for (const { target } of sourcesOf(shown)) tick(target, "--control");
  tick(shown, "--ink");
}

// A token that recalls something the model needed: open gate, one strong source, a confident guess.
function example() {
  let best = 0, most = -1;
  for (let position = 0; position < count; position++) {
    const strongest = Math.min(100, layer.sources[position][1] / 10 || 0);
    const worth = layer.gates[position] * strongest * data.confidence[position];
    if (worth >= most) [best, most] = [position, worth];
  }
  return best;
}

text.addEventListener("mouseover", event => {
  if (!pinned && event.target.position !== undefined) show(event.target.position);
});
text.addEventListener("click", event => {
  if (event.target.position === undefined) return;
  keep(pinned && event.target.position === shown ? null : event.target.position);
});
strip.addEventListener("click", event => scrollTo(clamped(Math.floor(event.offsetX / strip.clientWidth * count))));
choice.addEventListener("change", () => choose(Number(choice.value)));
document.addEventListener("keydown", event => {
  if (event.target === choice || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") keep(null);
  else if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
    keep(clamped(shown + (event.key === "ArrowLeft" ? -1 : 1)));
    scrollTo(shown);
  } else return;
  event.preventDefault();
});
window.addEventListener("resize", draw);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

const asked = location.hash.match(/^#(\d+)(?::(\d+))?$/);
choose(asked && data.layers[asked[2]] ? Number(asked[2]) : 0);
if (asked) keep(clamped(Number(asked[1]))); else show(example());
scrollTo(shown);
