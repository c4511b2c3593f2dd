"""One self-contained HTML file about runs: `python -m eval.report RUN [RUN ...] --out report.html`.

Curves as inline SVG, sample pictures by step as data URIs, what differs between the configs, environment.
No script, no font and no request: it opens offline in any browser.  The same runs give the same bytes.
"""

import base64
import io
import json
import statistics
from pathlib import Path

from PIL import Image

from common.files import write_atomic
from common.draw import number
from common.run import UserError
from eval._html import BINS, chart, h, legend, page, table
from eval._shared import Parser, cli, duration, experiments, flat, last_scores, read_run

MOST_CHARTS, MOST_ROWS, MOST_PIXELS = 300, 200, 1600
FOLDED, WIDE = 6, 800                                           # curves under one name; pixels


def curves(run):
    """{(kind, x name): {key: {x: value}}} in the order of first appearance.

    x is the step; where a resume repeats a step the last value counts.  Eval lines at several guidance scales
    alpha give one curve over alpha, at the last step, and one over steps for each alpha.
    """
    found = {}
    scales = {r["alpha"] for r in run.rows if "alpha" in r and r.get("kind") == "eval"}
    last = max((r["step"] for r in run.rows if "step" in r and "alpha" in r), default=None)
    for row in run.rows:
        kind, x = str(row.get("kind")), "step" if "step" in row else "epoch"
        alpha = row.get("alpha") if kind == "eval" and len(scales) > 1 else None
        for key, value in flat(row).items():
            if alpha is not None and key == "alpha":
                continue
            name = key if alpha is None else f"{key} at alpha {alpha:g}"
            if x in row:                                        # other rows stand in tables, see unstepped()
                found.setdefault((kind, x), {}).setdefault(name, {})[row[x]] = value
            if alpha is not None and row.get("step") in (None, last):
                found.setdefault((kind, "alpha"), {}).setdefault(key, {})[alpha] = value
    return found


def unstepped(run):
    """{kind: [row]} of the lines without a step or epoch, such as the cases of a comparison; scalars only."""
    found = {}
    for row in run.rows:
        if "step" not in row and "epoch" not in row:
            cells = {k: v for k, v in row.items() if isinstance(v, str) and k != "kind"} | flat(row)
            found.setdefault(str(row.get("kind")), []).append(cells)
    return found


def show(value):
    """A value of a config or log as short text."""
    if isinstance(value, float):
        return number(value, 6)
    if isinstance(value, (dict, list, bool)) or value is None:
        return json.dumps(value)
    return str(value)


# --- sections --------------------------------------------------------------

def overview(runs, names, papers):
    rows = []
    for name, run in zip(names, runs):
        last, wanted = run.steps
        loss = [v for v in (flat(r).get("loss") for r in run.rows) if v is not None]
        expect = papers.get((run.script, run.preset), {})
        found, choice = last_scores(run)
        scores = [f"{k} {number(v)}" + (f" (paper {expect[k]})" if k in expect else "")
                  for k, v in found.items()]
        done = "-" if last is None else f"{last} of {wanted}" if wanted else str(last)
        rows.append([name, run.preset, done,
                     number(statistics.fmean(loss[-20:])) if loss else "-",
                     ", ".join(scores[:6] + choice) or "not evaluated",
                     run.hardware, duration(run.time_s)])
    return section("overview", "Overview", [
        table("Runs", ["Run", "Preset", "Steps", "Loss, mean of last 20", "Scores", "Hardware", "Time"], rows,
              "t-overview"),
        [h("p", text, class_="note") for text in notes(runs, names)]])


def notes(runs, names):
    """What a reader must know before trusting the curves."""
    for name, run in zip(names, runs):
        if run.torn:
            yield f"{name}: {run.torn} torn line(s) in log.jsonl, left by a crash, are skipped."
        lost = {k for r in run.rows for k, v in flat(r).items() if v is None}
        if lost:
            yield f"{name}: non-finite values in {', '.join(sorted(lost))}; they are gaps in the curves."
        if len(run.headers) > 1:
            yield f"{name}: started {len(run.headers)} times; where steps repeat, the later values are shown."
        if not run.rows:
            yield f"{name}: nothing logged yet."


def curve_section(runs, names):
    """A chart for each logged number, all runs in it; numbers with a single value go into a table."""
    found = [curves(r) for r in runs]
    kinds = sorted({k for f in found for k in f}, key=lambda k: ({"train": 0, "eval": 1}.get(k[0], 2), k))
    parts, singles, drawn, left = [], [], 0, []
    for kind in kinds:
        keys = list(dict.fromkeys(k for f in found for k in f.get(kind, {})))
        figures = {}                                            # "" and the names before the first slash
        for key in sorted(keys, key=lambda k: k != "loss"):     # the loss first, the rest as they were logged
            series = {i: (names[i], sorted(f[kind][key].items()))
                      for i, f in enumerate(found) if key in f.get(kind, {})}
            good = {i: [v for _, v in points if v is not None] for i, (_, points) in series.items()}
            if max(len(set(v)) for v in good.values()) < 2:     # logged once, or never changing: no curve
                if " at alpha " not in key:                     # those stand in the curves over alpha
                    singles.append([f"{kind[0]}: {key}", *(show(good[i][-1]) if good.get(i) else "-"
                                                           for i in range(len(runs)))])
            elif drawn < MOST_CHARTS:
                some = {i: s for i, s in series.items() if good[i]}
                figure = chart(key, some, f"t-chart{drawn}", kind[1])
                figures.setdefault(key.split("/")[0] if "/" in key else "", []).append(figure)
                drawn += 1
            else:
                left.append(f"{kind[0]}: {key}")
        if figures:
            parts.append(h("h3", kind[0] if kind[1] == "step" else f"{kind[0]} by {kind[1]}"))
            parts.append(folded(figures))
    if singles:
        parts.append(table("Values that never change", ["Value", *names], singles, "t-single"))
    if left:
        parts.append(h("p", f"Not drawn, {len(left)} more: {', '.join(left)}", class_="soft"))
    how = h("p", f"Above {BINS} points a line is the mean in each of {BINS} bins, the band its range.",
            class_="soft")
    return section("curves", "Curves", [[legend(names), how] if drawn else None,
                                        parts or h("p", "Nothing logged by step.")])


def folded(figures):
    """Charts in a grid; a family of many, such as one curve for each feature, opens on demand."""
    small = [f for family in figures.values() if len(family) <= FOLDED for f in family]
    large = {name: family for name, family in figures.items() if len(family) > FOLDED}
    small = large.pop("", []) + small                           # numbers without a family always show
    return [h("div", small, class_="charts") if small else None,
            [h("details", h("summary", f"{name}: {len(family)} curves"), h("div", family, class_="charts"))
             for name, family in large.items()]]


def row_section(runs, names):
    """Tables of the lines that have no step, one for each run and kind; None where there are none."""
    parts = []
    for i, (name, run) in enumerate(zip(names, runs)):
        for j, (kind, rows) in enumerate(unstepped(run).items()):
            keys = list(dict.fromkeys(k for row in rows for k in row))
            cells = [[n + 1, *(show(row[k]) if k in row else "" for k in keys)] for n, row in enumerate(rows)]
            more = f", the first {MOST_ROWS} of {len(cells)} lines" if len(cells) > MOST_ROWS else ""
            parts.append(table(f"{name}: {kind}{more}", ["Line", *keys], cells[:MOST_ROWS], f"t-rows{i}-{j}"))
    return section("tables", "Tables", parts) if parts else None


def picture(path, alt, caption):
    """<figure> with the file inside; very large ones are reduced, unreadable ones said to be so."""
    try:
        with Image.open(path) as image:
            image.load()
            data, size = path.read_bytes(), image.size
            if max(size) > MOST_PIXELS:
                image = image.convert("RGB")
                image.thumbnail((MOST_PIXELS, MOST_PIXELS), Image.LANCZOS)
                buffer = io.BytesIO()
                image.save(buffer, "PNG")
                data, size = buffer.getvalue(), image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return h("figure", caption, h("p", "This file is not a readable picture."))
    source = "data:image/png;base64," + base64.b64encode(data).decode()
    image = h("img", src=source, alt=alt, width=size[0], height=size[1], loading="lazy",
              class_="small" if size[0] < 350 else None)
    if size[0] <= WIDE:
        return h("figure", caption, image)
    scroll = h("div", image, class_="scroll", role="region", tabindex="0", aria_label=alt)
    return h("figure", caption, scroll, class_="wide")


def evenly(items, most):
    """At most `most` items, first and last among them."""
    if len(items) <= most:
        return items
    if most < 2:
        return items[-1:] * most
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def sample_section(runs, names, most):
    parts = []
    for name, run in zip(names, runs):
        every = run.samples()
        others = [(None, p) for p in sorted(run.path.rglob("*.png"))
                  if not {"samples", "ckpt"} & set(p.relative_to(run.path).parts)]
        figures = []
        for step, path in evenly(every, most) + others[:most]:
            inside = path.relative_to(run.path)
            what = f"step {step}" if step is not None and step >= 0 else path.stem
            alt = f"{'Samples' if step is not None else 'Figure'} of {name}, {what}"
            figures.append(picture(path, alt, h("figcaption", what, h("span", inside, class_="told"))))
        texts = sorted((run.path / "samples").glob("*.txt"))[-1:]
        quotes = [h("figure", h("figcaption", t.relative_to(run.path)),
                    h("pre", t.read_text(errors="replace")[:4000], tabindex="0")) for t in texts]
        if figures or quotes:
            gone = len(every) + len(others) - len(figures)
            parts.append([h("h3", name), h("div", figures, quotes, class_="pictures"),
                          h("p", f"{gone} more pictures lie in the run.", class_="soft") if gone else None])
    return section("samples", "Samples", parts or h("p", "No pictures in these runs."))


def config_section(runs, names):
    keys = list(dict.fromkeys(k for r in runs for k in r.config))
    cells = {k: [show(r.config[k]) if k in r.config else "(absent)" for r in runs] for k in keys}
    differ = [[k, *cells[k]] for k in keys if len(set(cells[k])) > 1]
    same = [[k, cells[k][0]] for k in keys if len(set(cells[k])) == 1]
    parts = []
    if len(runs) > 1:
        parts.append(table("Settings that differ between the runs", ["Setting", *names], differ, "t-diff",
                           lambda row: "differs") if differ else h("p", "The configs are equal."))
    what = "Settings equal in all runs" if len(runs) > 1 else "Settings"
    parts.append(h("details", h("summary", f"{what}: {len(same)}"),
                   table(what, ["Setting", "Value"], same, "t-same"),
                   open=len(runs) == 1))
    return section("config", "Config", parts)


def environment_section(runs, names):
    facts = []
    for run in runs:
        head = run.header
        facts.append({"command": " ".join(run.argv) or "-", "commit": head.get("commit"),
                      "code sha256": head.get("code_sha256"),
                      "ranks": head.get("world"), **run.env})
    keys = list(dict.fromkeys(k for f in facts for k in f))
    rows = [[k, *(show(f.get(k)) for f in facts)] for k in keys]
    return section("environment", "Environment", table(
        "What ran and on what", ["Fact", *names], rows, "t-env",
        lambda row: "differs" if len(set(row[1:])) > 1 else None))


def section(id, title, children):
    return h("section", h("h2", title, id=id), children, aria_labelledby=id)


def render(runs, title=None, most=12):
    """The whole document as text.  runs: list of Run, at least one; most: pictures shown for each."""
    names = short_names([r.path for r in runs])
    known = experiments(only={r.script for r in runs})
    papers = {(e.name, p): v.get("expect", {}) for e in known for p, v in e.presets.items()}
    title = title or ("Run " + names[0] if len(runs) == 1 else f"{len(runs)} runs: " + ", ".join(names))
    sections = [overview(runs, names, papers), curve_section(runs, names), row_section(runs, names),
                sample_section(runs, names, most), config_section(runs, names),
                environment_section(runs, names)]
    titles = ("Overview", "Curves", "Tables", "Samples", "Config", "Environment")
    links = [h("li", h("a", t, href="#" + t.lower())) for t, s in zip(titles, sections) if s is not None]
    header = [h("h1", title), h("p", "Made from the run directories alone; needs no network.", class_="soft")]
    return page(title, header, h("ul", links), sections, h("p", "python -m eval.report ", " ".join(names)))


def short_names(paths):
    """As few trailing parts of each path as tell the runs apart, at least script/preset."""
    parts = [Path(p).absolute().parts for p in paths]
    for n in range(2, max(map(len, parts)) + 1):
        names = ["/".join(p[-n:]) for p in parts]
        if len(set(names)) == len(names):
            break
    return names


def main(argv=None):
    parser = Parser("eval.report", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, such as runs/drift_toy/demo")
    parser.add_argument("--out", default="report.html", help="the file to write [report.html]")
    parser.add_argument("--title", help="headline; made from the names of the runs by default")
    parser.add_argument("--images", type=int, default=12,
                        help="sample pictures for each run, evenly spread [12]")
    args = parser.parse_args(argv)
    paths = list(dict.fromkeys(args.runs))
    out = Path(args.out)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"cannot write {out}: its folder does not exist, or it is one")
    text = render([read_run(p) for p in paths], args.title, args.images)
    write_atomic(out, text.encode())
    print(f"{out}: {len(paths)} run(s), {len(text) / 1e6:.1f} MB")


if __name__ == "__main__":
    cli("eval.report", main)
