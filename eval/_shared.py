"""What the eval commands share: one-line errors, reading runs from disk, and the list of experiments."""

import argparse
import ast
import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import re
import sys
from pathlib import Path

from common.run import USER_ERRNO, UserError
from common.runlog import FREE

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("drift_toy", "drift_latent", "drift_pixel", "dit_t2i", "hope_lm", "beta_vae_arc", "streetvision")
IMAGES = (".png", ".jpg", ".jpeg", ".jpe", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line, as those of the scripts are."""

    def __init__(self, name, doc):
        super().__init__(prog=f"python -m {name}", description=doc, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise UserError(message)


def cli(name, main):
    """Run main() and turn the outcome into an exit status: 0, 2 with a line on stderr, 130, or 1 (a bug)."""
    try:
        main()
    except UserError as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:                                     # the reader of our output has seen enough
        sys.stdout = None
    except OSError as error:
        if error.errno not in USER_ERRNO:
            raise
        print(f"{name}: error: {error.strerror}: {error.filename}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory as it lies on disk; every field survives a crash of the run that wrote it."""
    path: Path
    config: dict
    headers: list           # one per start or resume, oldest first
    rows: list              # every other line of log.jsonl
    torn: int               # lines of log.jsonl that are not JSON objects

    @property
    def script(self):
        """The script that ran: named after the source kept in the run, else after argv."""
        own = [p.stem for p in sorted(self.path.glob("*.py"))]
        known = [s for s in own if s in SCRIPTS] or own or [Path(self.argv[0]).stem if self.argv else ""]
        return known[0] or "unknown"

    @property
    def preset(self):
        return str(self.config.get("preset") or "default")

    @property
    def header(self):
        return (self.headers or [{}])[-1]

    @property
    def argv(self):
        words = self.header.get("argv")
        return [str(w) for w in words] if isinstance(words, list) else []

    @property
    def env(self):
        return next((h["env"] for h in reversed(self.headers) if isinstance(h.get("env"), dict)), {})

    @property
    def hardware(self):
        """One short phrase: GPUs if there were any, else the CPU."""
        gpus, world = self.env.get("gpu"), finite(self.header.get("world")) or 1
        on_gpu = str(self.config.get("device", "auto")).startswith(("auto", "cuda"))
        if gpus and isinstance(gpus, list) and on_gpu:
            return f"{world} x {gpus[0]}"
        cpu = re.sub(r"\((R|TM)\)|CPU|Processor|@.*", "", str(self.env.get("cpu") or "CPU"))
        threads = self.env.get("threads") or "?"
        return (f"{' '.join(cpu.split())}, {threads} thread{'s' * (threads != 1)}"
                + (f" x {world}" if world > 1 else ""))

    @property
    def time_s(self):
        return max([r["time_s"] for r in self.rows if "time_s" in r], default=0.0)

    @property
    def steps(self):
        """(last step logged, steps wanted); None where unknown."""
        last = max([r["step"] for r in self.rows if "step" in r], default=None)
        return last, finite(self.config.get("steps"))

    def samples(self):
        """[(step, picture)] in samples/, oldest first; step -1 for pictures not named after a step."""
        return sorted((step_of(p), p) for p in (self.path / "samples").rglob("*.png"))


SKIP = {"kind", "time_s", "step", "epoch", "record"}            # axes and provenance, not results


def flat(row, prefix=""):
    """{"a/b": number} of the numbers in a row, dicts inside it opened; None, a non-finite value, stays."""
    out = {}
    for key, value in row.items():
        if prefix + key in SKIP:
            continue
        if isinstance(value, dict):
            out.update(flat(value, f"{prefix}{key}/"))
        elif value is None or type(value) in (int, float):
            out[prefix + key] = finite(value)
    return out


def last_scores(run):
    """The scores of a run's eval lines at its last evaluated step -> ({name: number}, notes).

    Of several guidance scales alpha the one with the lowest fid or fd is taken, as papers do; notes say so.
    A comparison without eval lines is represented by its first case.  Lines without a step are those of the
    command `evaluate`: where there are any, what training scored on the way does not count.
    """
    lines = [r for r in run.rows if str(r.get("kind")).startswith("eval")]
    lines = [r for r in lines if "step" not in r] or lines
    step = max([r["step"] for r in lines if "step" in r], default=None)
    lines, notes = [r for r in lines if r.get("step") in (None, step)], []
    scales = [r for r in lines if "alpha" in r]
    if len({r["alpha"] for r in scales}) > 1:
        key = next((k for k in ("fid", "fd") if any(finite(r.get(k)) is not None for r in scales)), None)
        scored = [r for r in scales if finite(r.get(key)) is not None]
        chosen = min(scored, key=lambda r: r[key]) if scored else scales[-1]
        lines = [r for r in lines if r not in scales] + [chosen]
        notes = [f"{'best' if scored else 'last'} of {len({r['alpha'] for r in scales})} alphas"]
    cases = [r for r in run.rows if r.get("kind") == "case"]
    if cases and not lines:
        words = [v for k, v in cases[0].items() if isinstance(v, str) and k != "kind"]
        lines, notes = cases[:1], [f"first of {len(cases)} cases: {', '.join(words)}"]
    scores = {}
    for row in lines:
        scores.update({k: v for k, v in flat(row).items() if v is not None})
    return scores, notes


def duration(seconds):
    """0.4 s, 12 min, 3.2 h."""
    unit, name = next(((u, n) for u, n in ((3600, "h"), (60, "min")) if seconds >= 1.5 * u), (1, "s"))
    return f"{seconds / unit:.3g} {name}"


def step_of(path):
    """The step a file is named after, as 00030000.png or step300.npz; -1 for others, such as alpha1.5.npz."""
    found = re.fullmatch(r"(?:step|samples|grid)?[ _-]?(\d{1,12})", Path(path).stem)
    return int(found[1]) if found else -1


AXES = ("step", "epoch", "alpha", "time_s")                     # worth nothing unless they are numbers


def finite(value):
    """The value, or None when it is no finite number of a float's size."""
    return value if type(value) in (int, float) and abs(value) < 1e300 else None


def read_log(path):
    """(rows, torn): the JSON objects of a log, and how many lines are none.  A crash tears the line it was
    writing; a resume continues below it, so such a line may stand anywhere."""
    rows, torn = [], 0
    for line in Path(path).read_bytes().splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append({k: v for k, v in row.items() if k not in AXES or finite(v) is not None})
                continue
        torn += bool(line.strip())
    return rows, torn


def read_run(path):
    """The Run at a directory; UserError where there is none."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"no run at {path}; a run is a directory with log.jsonl, such as runs/drift_toy/demo")
    if not (path / "log.jsonl").is_file():
        inside = sorted(str(p.parent) for p in path.glob("*/log.jsonl"))
        raise UserError(f"{path} holds no log.jsonl" + (f"; did you mean {inside[0]}?" if inside else ""))
    rows, torn = read_log(path / "log.jsonl")
    headers = [r for r in rows if r.get("kind") == "header"]
    config = next((h["config"] for h in reversed(headers) if isinstance(h.get("config"), dict)), None)
    if config is None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            config = json.loads((path / "config.json").read_text())["config"]
    return Run(path, config if isinstance(config, dict) else {}, headers,
               [r for r in rows if r.get("kind") != "header"], torn)


def find_runs(folder):
    """All runs SCRIPT/NAME in a folder such as runs/, by path; runs inside a run are part of it."""
    return [read_run(p.parent) for p in sorted(Path(folder).glob("*/*/log.jsonl"))]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One script at the root: its docstring fields and its presets, read without running it."""
    name: str
    doc: dict               # "Paper", "Differs", ...: the indented field lines of the docstring, joined
    title: str
    presets: dict
    Config: type | None

    @property
    def fields(self):
        return dataclasses.fields(self.Config) if self.Config else ()


def docstring_fields(text):
    """{"Paper": "...", ...} from lines 'Word   text', continued by indented lines."""
    fields, current = {}, None
    for line in text.splitlines():
        start = re.match(r"([A-Z][a-z]+)\s{2,}(\S.*)", line)
        if start:
            current = start[1]
            fields[current] = [start[2].strip()]
        elif current and line.startswith("  ") and line.strip():
            fields[current].append(line.strip())
        else:
            current = None
    return {key: " ".join(parts) for key, parts in fields.items()}


def experiments(root=ROOT, only=SCRIPTS):
    """[Experiment] of the scripts at the root, in reading order.  Importing a script runs nothing."""
    found = []
    for name in (s for s in SCRIPTS if s in only):
        path = Path(root) / f"{name}.py"
        if path.is_file():
            doc = ast.get_docstring(ast.parse(path.read_text()), clean=False) or ""
            title = (doc.strip().splitlines() or [name])[0].rstrip(".")
            module = load(path)
            found.append(Experiment(name, docstring_fields(doc), title, getattr(module, "PRESETS", {}),
                                    getattr(module, "Config", None)))
    return found


def load(path):
    """The module of one file, whatever else of that name is imported."""
    name = "experiment_" + hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


OPEN = {"seed", "data"}                                         # may differ: still the same experiment


def changed(config, experiment, preset, free=OPEN):
    """What a run's config sets against its preset, {field: value}: a shortened run must not pass for it.

    free: fields left out, beside out, device, wandb and json; with free=() fields that may change when a run
    continues count too.
    """
    want = {f.name: f.default for f in experiment.fields}
    want = json.loads(json.dumps(want | dict(experiment.presets.get(preset, {}).get("set", {}))))
    skip = FREE | {"preset"} | set(free)
    skip |= {f.name for f in experiment.fields if free and f.metadata.get("free")}
    return {k: v for k, v in config.items() if k in want and k not in skip and v != want[k]}


def as_flags(values):
    """{field: value} as words of a command line."""
    words = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            words += [f"--{flag}", ",".join(map(str, value))]
        else:
            words += [f"--{flag}", "none" if value is None else str(value)]
    return words


def replace_block(text, name, body, where):
    """text with the lines between <!-- name --> and <!-- /name --> replaced by body."""
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(first) != 1 or text.count(last) != 1 or text.index(first) > text.index(last):
        raise UserError(f"{where} needs one line {first} and below it one line {last}")
    head, tail = text[:text.index(first) + len(first)], text[text.index(last):]
    return f"{head}\n{body.strip()}\n{tail}"


def markdown_table(head, rows):
    """A Markdown table; cells are text, with | and line breaks made harmless."""
    cell = lambda c: " ".join(str("" if c is None else c).replace("|", "\\|").split())
    lines = ["| " + " | ".join(map(cell, r)) + " |" for r in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def text_table(head, rows):
    """The same for a terminal: columns padded, numbers to the right."""
    table = [[str("" if c is None else c) for c in r] for r in (head, *rows)]
    widths = [max(len(r[j]) for r in table) for j in range(len(head))]
    right = [all(re.fullmatch(r"[-+]?[\d.,]+(e[-+]?\d+)?[x%]?|-|", r[j]) for r in table[1:])
             for j in range(len(head))]
    pad = lambda row: [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right)]
    return "\n".join("  ".join(pad(row)).rstrip() for row in table)
