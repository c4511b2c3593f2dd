"""The generated blocks of evidence.md, deviations.md and decisions.md in docs/, for `eval.table --docs`."""

import ast
import json

from common.files import write_atomic
from common.draw import number
from eval._shared import duration, markdown_table, replace_block


def claims(found, rows):
    """Claim of a paper, its value, our artifact, status."""
    lines = []
    for e in found:
        for name, preset in e.presets.items():
            mine = [r for r in rows if (r["script"], r["preset"]) == (e.name, name)]
            for key, value in preset.get("expect", {}).items():
                claim = f"{e.name}, {preset.get('paper', '-')}: {key} {value}"
                scored = [r for r in mine if key in r["scores"]]
                for r in scored:
                    change = ", ".join(f"{k}={v}" for k, v in r["changed"].items())
                    lines.append([claim, f"runs/{e.name}/{r['run']}", f"{key} {number(r['scores'][key])}"
                                  + (f", n {r['n']}" if r["n"] else "")
                                  + (f"; with {change}" if change else "")])
                if not scored:
                    lines.append([claim, f"`python {e.name}.py --preset {name}`", "not run"])
    return markdown_table(["claim of the paper", "our artifact, or the command that makes it", "status"],
                          lines)


def measured(rows):
    """Every score of every recorded run."""
    lines = [[f"{r['script']} {r['preset']}" + (f" ({r['run']})" if r["run"] != r["preset"] else ""),
              ", ".join(f"{k} {number(v)}" for k, v in list(r["scores"].items())[:12]) or "not evaluated",
              f"{r['steps'] or '-'} of {r['steps_wanted'] or '-'}",
              f"{r['hardware']}, {duration(r['time_s'])}",
              (r["code_sha256"] or "-")[:12]] for r in rows]
    return markdown_table(["run", "scores", "steps", "hardware, time", "code"], lines)


def test_claims(root):
    """What the tests prove: test names are claims, so they are listed as such."""
    lines = []
    for path in sorted((root / "tests").rglob("test_*.py")):
        names = [n.name for n in ast.walk(ast.parse(path.read_text()))
                 if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
        claims = "; ".join(n.removeprefix("test_").replace("_", " ") for n in names)
        lines.append([str(path.relative_to(root)), len(names), claims])
    return markdown_table(["file", "tests", "claims"], lines)


def ratios(root):
    """The last `make bench`, docs/bench.json or bench.json."""
    path = next((p for p in (root / "bench.json", root / "docs" / "bench.json") if p.is_file()), None)
    if path is None:
        return "Not run on this machine: `make bench`."
    data = json.loads(path.read_text())
    lines = [[r["case"], r["kind"], "-" if r["ratio"] is None else f"{r['ratio']:.3g}",
              "-" if r["goal"] is None else f"{r['goal']:g}", r["status"]] for r in data["ratios"]]
    head = f"On {data['env']['cpu']}, {data['env']['threads']} thread(s), torch {data['env']['torch']}.\n\n"
    return head + markdown_table(["case", "ratio of", "value", "goal", "status"], lines)


def differs(found):
    """What each script does unlike its paper, in the words of its own docstring."""
    return markdown_table(["script", "differs"], [[f"{e.name}.py", e.doc.get("Differs", "-")] for e in found])


def switches(found):
    """Flags whose help names a choice between paper and code: where a decision can be reversed."""
    lines = []
    for e in found:
        for field in e.fields:
            text = field.metadata.get("help", "")
            named = any(word in text for word in ("paper", "printed", "released", "official"))
            if named and not field.metadata.get("positional"):
                lines.append([f"{e.name}.py", f"--{field.name.replace('_', '-')}", field.default, text])
    return markdown_table(["script", "flag", "default", "what it switches"], lines)


def write_docs(root, found, rows):
    """Rewrite the marked blocks of docs/*.md; the text around them is written by people."""
    blocks = dict(evidence=dict(claims=claims(found, rows), measured=measured(rows), ratios=ratios(root),
                                tests=test_claims(root)),
                  deviations=dict(differs=differs(found)), decisions=dict(switches=switches(found)))
    for name, parts in blocks.items():
        path = root / "docs" / f"{name}.md"
        text = path.read_text() if path.is_file() else ""
        for block, body in parts.items():
            text = replace_block(text, block, body, path)
        write_atomic(path, text.encode())
