"""The style sheet of the page."""

from __future__ import annotations

from string import Template

from matplotlib.colors import to_rgb

from fwpkm.report.theme import DARK, LIGHT, Theme


def style_sheet() -> str:
    """CSS for light and dark ground, narrow and wide screens, and paper."""
    return Template(_RULES).substitute(light=_colours(LIGHT), dark=_colours(DARK))


def _colours(theme: Theme) -> str:
    names = ("ground", "card", "ink", "faint", "rule", "memory", "control", "right", "wrong")
    written = " ".join(str(round(255 * part)) for part in to_rgb(theme.memory))
    return " ".join(f"--{name}: {getattr(theme, name)};" for name in names) + f" --written: {written};"


_RULES = """
:root { color-scheme: light dark; $light }
@media (prefers-color-scheme: dark) { :root { $dark } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--ground); color: var(--ink); line-height: 1.55;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header, main, footer { max-width: 66rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 3rem; }
footer { padding-bottom: 3rem; color: var(--faint); font-size: .875rem; }
h1 { margin: 0; font-size: clamp(1.7rem, 4.5vw, 2.5rem); line-height: 1.15; letter-spacing: -.015em; }
h2 { margin: 3rem 0 .9rem; font-size: 1.3rem; letter-spacing: -.005em; }
h3 { margin: 0; font-size: 1rem; }
p { margin: .6rem 0; text-wrap: pretty; }
header p, section > p, figcaption, caption { max-width: 48rem; }
header p { font-size: 1.08rem; }
.memory { color: var(--memory); } .control { color: var(--control); }
.faint, figcaption, caption, dt { color: var(--faint); }
code, pre, .digits {
  font-family: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { font-size: .92em; overflow-wrap: anywhere; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: .75rem; padding: 1rem 1.25rem; }

.tiles { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); margin-top: 2rem; }
.tiles h2 { margin: 0; font-size: 1rem; }
.tiles dl { margin: .5rem 0 0; display: grid; grid-template-columns: 1fr auto; align-items: baseline; gap: 0 .75rem; }
.tiles dd { margin: 0; text-align: right; font-size: 1.15rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.tiles dd.memory { font-size: 2.1rem; line-height: 1.25; letter-spacing: -.02em; }
.bar { grid-column: 1 / -1; height: .35rem; margin: .15rem 0 .6rem; border-radius: 1rem;
  background: var(--rule); overflow: hidden; }
.bar span { display: block; height: 100%; width: calc(100% * var(--share)); background: currentColor; }

figure { margin: 0; }
figure .scroll { margin: 0 -.5rem; }
figure img { display: block; width: 100%; min-width: 40rem; height: auto; }
figcaption { margin-top: .5rem; font-size: .92rem; text-wrap: pretty; }
.scroll { overflow-x: auto; }

table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { position: sticky; left: 0; max-width: min(48rem, 100vw - 4.5rem); padding-bottom: .7rem; text-align: left;
  text-wrap: pretty; }
th, td { padding: .4rem .7rem; text-align: right; vertical-align: bottom; }
td { white-space: nowrap; }
tbody th, tr:first-child th:first-child { padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
th { font-weight: 600; }
th[scope=row] { white-space: nowrap; }
th.words, td.words { text-align: left; }
thead th { color: var(--faint); font-size: .82rem; line-height: 1.3; }
thead th[scope=colgroup] { text-align: center; color: var(--ink);
  background: linear-gradient(var(--rule), var(--rule)) bottom / calc(100% - 1.4rem) 1px no-repeat; }
thead th[scope=colgroup]:last-child { background-position: bottom right; background-size: calc(100% - .7rem) 1px; }
thead th[scope=colgroup].memory { color: var(--memory); } thead th[scope=colgroup].control { color: var(--control); }
tbody tr { border-top: 1px solid var(--rule); }
section > .card + .card { margin-top: 1rem; }

.asked { display: grid; gap: 1rem; grid-template-columns: minmax(0, 1fr); }
.asked h3 { overflow-wrap: anywhere; }
.asked dl { display: flex; flex-wrap: wrap; gap: .25rem 2.25rem; margin: .7rem 0; }
.asked dd { margin: 0; font-size: 1.05rem; overflow-wrap: anywhere; }
.asked dt { font-size: .82rem; }
.asked p { font-size: .92rem; }
.right { color: var(--right); } .wrong { color: var(--wrong); }
.right, .wrong { font-weight: 600; font-size: .9rem; white-space: nowrap; }
pre { margin: .7rem 0 0; padding: .75rem .9rem; border-radius: .5rem; border: 1px solid var(--rule); font-size: .85rem;
  line-height: 1.75; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; }
pre span { background: rgb(var(--written) / calc(.55 * var(--gate, 0))); padding: .14em 0; }
mark { background: none; color: inherit; font-weight: 700; border-bottom: 2px solid var(--memory);
  padding-bottom: .12em; }
.legend { display: flex; align-items: center; gap: .6rem; margin: .6rem 0 .9rem;
  color: var(--faint); font-size: .92rem; }
.legend .ramp { flex: 0 1 12rem; height: .9rem; border-radius: .2rem; border: 1px solid var(--rule);
  background: linear-gradient(to right, rgb(var(--written) / 0), rgb(var(--written) / .55)); }

.facts { margin: 0; columns: 20rem; column-gap: 2.5rem; font-size: .92rem; }
.facts div { display: flex; justify-content: space-between; gap: 1rem; padding: .3rem 0;
  border-bottom: 1px solid var(--rule); break-inside: avoid; }
.facts dt { flex: none; }
.facts dd { margin: 0; text-align: right; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
section h3 + .facts { margin-top: .4rem; }
.facts + h3 { margin-top: 1.6rem; }

@media (max-width: 40rem) { .card { padding: .85rem .9rem; } header { padding-top: 2rem; } }
@media print {
  body { background: none; }
  figure, article, tr { break-inside: avoid; }
  .scroll { overflow: visible; }
  figure img { min-width: 0; }
}
"""
