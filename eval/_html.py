"""HTML and SVG for eval/report.py: what this file did not make is escaped, and nothing needs a network."""

import html
import math

from common.axes import limits, number, ticks

DASHES = ("", "7 4", "2 3", "9 3 2 3")                          # the second cue beside colour
N_COLORS = 6                                                    # --c0 .. --c5 in the style sheet


class Markup(str):
    """Text that is already HTML."""


def h(tag, /, *children, **attributes):
    """<tag attributes>children</tag>.  A str child is escaped, Markup is not; lists are spliced.

    Attribute names: trailing _ dropped (class_), other _ become -; True gives a bare attribute, None none.
    """
    parts = []
    for key, value in attributes.items():
        if value is not None and value is not False:
            key = key.rstrip("_").replace("_", "-")
            parts.append(f" {key}" if value is True else f' {key}="{html.escape(str(value), quote=True)}"')
    head = f"<{tag}{''.join(parts)}>"
    return Markup(head if tag in ("img", "meta", "link") else f"{head}{join(children)}</{tag}>")


def join(children):
    out = []
    for child in children:
        if isinstance(child, (list, tuple)):
            out.append(join(child))
        elif child is not None:
            out.append(child if isinstance(child, Markup) else html.escape(str(child), quote=True))
    return Markup("".join(out))


def table(caption, head, rows, id, row_class=lambda row: None):
    """A table with caption and scoped headers; too wide, it scrolls inside its own focusable region.

    The first cell of each row is its header.
    """
    body = [h("tr", h("th", row[0], scope="row"), [h("td", c) for c in row[1:]], class_=row_class(row))
            for row in rows]
    return h("div", h("table", h("caption", caption, id=id),
                      h("thead", h("tr", [h("th", c, scope="col") for c in head])), h("tbody", body)),
             class_="scroll", role="region", tabindex="0", aria_labelledby=id)


def page(title, header, nav, sections, footer):
    """A whole document.  The policy in its head forbids scripts and requests: opening it stays offline."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    head = h("head", h("meta", charset="utf-8"),
             h("meta", name="viewport", content="width=device-width, initial-scale=1"),
             h("meta", http_equiv="Content-Security-Policy", content=policy),
             h("meta", name="color-scheme", content="light dark"), h("link", rel="icon", href="data:,"),
             h("title", title), h("style", Markup(STYLE)))
    body = h("body", h("a", "Skip to content", class_="skip", href="#content"), h("header", header),
             h("nav", nav, aria_label="Sections"), h("main", sections, id="content", tabindex="-1"),
             h("footer", footer))
    return "<!doctype html>\n" + h("html", head, body, lang="en") + "\n"


# --- charts --------------------------------------------------------------

W, H, RIGHT, TOP, BOTTOM = 380, 250, 20, 12, 36       # near one to one on a phone: text stays readable
BINS = 200


def summary(points):
    """[(x, y)] -> [(x, mean, low, high)] in at most BINS bins; y None or not finite is left out."""
    good = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    if len(good) <= BINS:
        return [(x, y, y, y) for x, y in good]
    size, out = len(good) / BINS, []
    for i in range(BINS):
        part = good[int(i * size):int((i + 1) * size)]
        ys = [y for _, y in part]
        out.append((sum(x for x, _ in part) / len(part), sum(ys) / len(ys), min(ys), max(ys)))
    return out


def chart(name, series, id, xlabel="step"):
    """<figure> with a line chart, id unique in the page.  series: {run index: (run name, [(x, y)])}.

    The run index picks colour and dashes.  Values that are positive and span two decades get a log axis.
    """
    rows = {i: summary(points) for i, (_, points) in series.items()}
    ys = [v for r in rows.values() for bin in r for v in bin[1:]]
    log = bool(ys) and min(ys) > 0 and max(ys) / min(ys) > 100
    xlim, ylim = limits([[bin[0] for r in rows.values() for bin in r]], pad=0.0), limits([ys], log)
    labels = ticks(*ylim, 5, log)
    digits = next((d for d in range(4, 17) if len({number(v, d) for v in labels}) == len(labels)), 17)
    left = 14 + 7.2 * max([len(number(v, digits)) for v in labels] or [1])
    scale = math.log10 if log else float
    bottom, top = scale(ylim[0]), scale(ylim[1])

    def at(x, y):
        return (f"{left + (x - xlim[0]) / (xlim[1] - xlim[0]) * (W - left - RIGHT):.1f}",
                f"{H - BOTTOM - (scale(y) - bottom) / (top - bottom) * (H - BOTTOM - TOP):.1f}")

    marks = [h("text", xlabel, x=(left + W - RIGHT) / 2, y=H - 4, text_anchor="middle")]
    for v in ticks(*xlim, 4):
        marks.append(h("text", number(v), x=at(v, ylim[0])[0], y=H - BOTTOM + 17, text_anchor="middle"))
    for v in labels:
        y = at(xlim[0], v)[1]
        marks.append(h("line", x1=left, x2=W - RIGHT, y1=y, y2=y, class_="grid"))
        marks.append(h("text", number(v, digits), x=left - 6, y=y, dy="0.35em", text_anchor="end"))
    for i, bins in rows.items():
        style = f"--c: var(--c{i % N_COLORS})"
        if any(low < high for _, _, low, high in bins):
            band = [at(b[0], b[2]) for b in bins] + [at(b[0], b[3]) for b in reversed(bins)]
            marks.append(h("polygon", points=" ".join(map(",".join, band)), class_="band", style=style))
        path = [at(x, mean) for x, mean, _, _ in bins]
        marks.append(h("polyline", points=" ".join(map(",".join, path)), class_="line", style=style,
                       stroke_dasharray=DASHES[i // N_COLORS % len(DASHES)] or None))
        marks += [h("circle", cx=x, cy=y, r=3, style=style) for x, y in path if len(path) <= 20]
    values = []
    for i, bins in rows.items():
        ends = bins[0][1], bins[-1][1], min(b[2] for b in bins), max(b[3] for b in bins)
        values.append([series[i][0], len(series[i][1]), *map(number, ends)])
    told = "; ".join(f"{run}: from {first} to {last}" for run, _, first, last, _, _ in values)
    svg = h("svg", h("title", f"{name} by {xlabel}"), h("desc", told), marks, viewBox=f"0 0 {W} {H}",
            role="img")
    head = ["Run", "Points", "First", "Last", "Lowest", "Highest"]
    return h("figure", h("figcaption", h("strong", name), " (log scale)" if log else None), svg,
             h("details", h("summary", "Values"), table(f"{name}, points binned as drawn", head, values, id)),
             class_="chart")


def legend(names):
    """Which colour and dash pattern stands for which run."""
    items = []
    for i, name in enumerate(names):
        line = h("line", x1=0, x2=34, y1=6, y2=6, class_="line", style=f"--c: var(--c{i % N_COLORS})",
                 stroke_dasharray=DASHES[i // N_COLORS % len(DASHES)] or None)
        items.append(h("li", h("svg", line, viewBox="0 0 34 12", width=34, height=12, aria_hidden="true"),
                       " ", name))
    return h("ul", items, class_="legend", aria_label="Legend of the curves")


STYLE = """
:root { --ink: #1f2328; --soft: #57606a; --paper: #fff; --panel: #f6f8fa; --rule: #d0d7de; --link: #0550ae;
  --mark: #fff4d6; --c0: #0072b2; --c1: #c04f00; --c2: #00805d; --c3: #b04f86; --c4: #6f42c1; --c5: #8a6100; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #a5b0bb; --paper: #0d1117;
  --panel: #161b22; --rule: #3d444d; --link: #79b8ff; --mark: #3a2e0b; --c0: #58aef0; --c1: #ff8a4c;
  --c2: #2fc498; --c3: #ee9ac9; --c4: #bda4ff; --c5: #f0b429; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 82rem; padding: 0 1rem 3rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 1.2rem 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1.05rem; margin: 1.2rem 0 .4rem; overflow-wrap: anywhere; }
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.skip { position: absolute; left: -100rem; padding: .5rem 1rem; background: var(--paper); }
.skip:focus { left: 1rem; top: .5rem; z-index: 1; }
nav ul, .legend { list-style: none; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0;
  margin: .6rem 0; }
nav a { display: inline-block; padding: .35rem 0; }
.soft, .told, footer, caption { color: var(--soft); }
.told { display: block; font-size: .8rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .9rem; width: max-content; }
caption { text-align: left; padding: .2rem 0 .4rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem .4rem;
  border-bottom: 1px solid var(--rule); max-width: 20rem; overflow-wrap: break-word; }
thead th { background: var(--panel); white-space: nowrap; }
tbody th { font-weight: 600; }
td { font-variant-numeric: tabular-nums; }
tr.differs { background: var(--mark); }
.charts, .pictures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); }
figure { margin: 0; padding: .7rem; background: var(--panel); border: 1px solid var(--rule);
  border-radius: 6px; }
figcaption { margin-bottom: .4rem; overflow-wrap: anywhere; }
.wide { grid-column: 1 / -1; min-width: 0; }
.wide img { min-width: 42rem; }
figure svg { display: block; width: 100%; height: auto; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; }
figure img.small { width: 100%; image-rendering: pixelated; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
.grid { stroke: var(--rule); stroke-width: 1; }
.line { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; }
.band { fill: var(--c); opacity: .22; }
circle { fill: var(--c); }
pre { overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; background: var(--panel);
  padding: .7rem; }
details summary { cursor: pointer; padding: .3rem 0; }
.note { border-left: 4px solid var(--c1); padding: .3rem .8rem; background: var(--panel); }
@media print { nav, .skip { display: none; } figure { break-inside: avoid; } }
"""
