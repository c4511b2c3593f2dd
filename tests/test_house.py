"""The house as a whole: what every script and file keeps to, whoever wrote it."""

import ast
import functools
import os
import pathlib
import re
import subprocess
import sys
import tarfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted(
    [
        *ROOT.glob("drift_*.py"),
        *(
            p
            for name in ("dit_t2i", "hope_lm", "beta_vae_arc", "streetvision")
            if (p := ROOT / f"{name}.py").is_file()
        ),
    ]
)
FILES = [
    *SCRIPTS,
    *sorted(p for folder in ("common", "eval", "tests") for p in (ROOT / folder).rglob("*.py")),
]
RELATIVE = lambda p: str(p.relative_to(ROOT))  # noqa: E731


@functools.cache
def parsed(path):
    return ast.parse(path.read_text())


def functions(tree):
    return [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


# --- sizes -----------------------------------------------------------------------

WIDTH = 110


def test_no_line_is_wider_than_a_page():
    wide = {
        RELATIVE(p): n
        for p in FILES
        if (n := sum(len(line) > WIDTH for line in p.read_text().splitlines()))
    }
    assert not wide, f"lines over {WIDTH} columns: {wide}"


def test_functions_fit_on_two_screens():
    long = {
        f"{RELATIVE(p)} {f.name}": f.end_lineno - f.lineno + 1 for p in FILES for f in functions(parsed(p))
    }
    assert not {name: n for name, n in long.items() if n > 130}


# --- nothing that nobody uses -----------------------------------------------------


def words(path):
    """Every name and attribute a file reads, and every word of its strings (for getattr and f-strings)."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.add(node.attr)
        elif isinstance(node, ast.alias):
            found.add(node.name.split(".")[-1])
    return found


def test_no_function_of_common_and_eval_is_dead():
    used = {w for p in FILES if "tests" not in p.parts for w in words(p)}
    for path in FILES:  # names that reach a function as text: getattr(self, "read_" + kind)
        if "tests" not in path.parts:
            used |= {
                n.value
                for n in ast.walk(parsed(path))
                if isinstance(n, ast.Constant) and isinstance(n.value, str)
            }
    dead = {
        f"{RELATIVE(path)} {node.name}"
        for path in FILES
        if path.relative_to(ROOT).parts[0] in ("common", "eval")
        for node in parsed(path).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in used
    }
    assert not dead - FOR_IMPORTERS, f"nobody calls {sorted(dead - FOR_IMPORTERS)}"


# Called by tests and by whoever imports the house, but by no script.
FOR_IMPORTERS = {
    "common/metrics.py cmmd",
    "common/metrics.py frechet_infinity",
    "common/street/bundle.py extract",
    "common/street/conformal.py crc_threshold",
    "common/street/adapters.py apply_adapters",
    "common/data.py ClassOrder",
    "common/draw.py hist",
}


def readers_of_config(path):
    """Attributes read where a script's config may go: the script and the parts of common/ it imports."""
    seen, todo, found = set(), [path], set()
    while todo:
        file = todo.pop()
        if file in seen or not file.is_file():
            continue
        seen.add(file)
        tree = parsed(file)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 99:
                found.update(node.value.split())  # getattr(cfg, name) for name in "width depth".split()
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("common"):
                at = ROOT / node.module.replace(".", "/")
                todo += [at.with_suffix(".py"), *(at / f"{a.name}.py" for a in node.names)]
    return found


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_every_flag_is_read_by_some_code(path):
    config = next(n for n in parsed(path).body if isinstance(n, ast.ClassDef) and n.name == "Config")
    fields = [n.target.id for n in config.body if isinstance(n, ast.AnnAssign)]
    read = readers_of_config(path)
    # a family read by its prefix: getattr(cfg, f"{phase}_{name}")
    families = {w for w in read if w.endswith("_")}
    unread = [f for f in fields if f not in read and not any(f.startswith(w) for w in families)]
    assert not unread, f"{path.name}: no code reads {unread}"


# --- one place for one thing ---------------------------------------------------------

ASKS = {"common/run.py", "common/runlog.py", "common/data.py",      # chooses, records, pins memory
        "common/drift/plans.py", "common/t2i/studio.py"}             # how large a card is, which kernels


def test_the_device_is_chosen_in_one_place():
    asks = {
        RELATIVE(p)
        for p in FILES
        if p.relative_to(ROOT).parts[0] not in ("tests", "eval")
        and re.search(r"cuda\.is_available|mps\.is_available|init_process_group", p.read_text())
    }
    assert asks == ASKS
    for path in SCRIPTS:
        assert not re.search(
            r"\.cuda\(|to\(['\"](cuda|mps)|device\(['\"](cuda|mps)", path.read_text()
        ), path.name


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_a_script_imports_only_pinned_packages_and_common(path):
    allowed = {"torch", "numpy", "tqdm", "safetensors", "PIL", "scipy", "common", *sys.stdlib_module_names}
    for file in [path, *(ROOT / "common").rglob("*.py")]:
        for node in ast.walk(parsed(file)):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else ([node.module] if isinstance(node, ast.ImportFrom) else [])
            )
            wrong = {n.split(".")[0] for n in names} - allowed
            optional = {"wandb", "triton", "torchao"}  # asked for by a flag, with a line when missing
            assert wrong <= optional, f"{file.name} imports {wrong}"


def test_nothing_is_unpickled():
    for path in FILES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                call = ast.unparse(node.func)
                if call == "torch.load":
                    assert any(
                        k.arg == "weights_only" and k.value.value is True for k in node.keywords
                    ), path.name
                assert (
                    call not in ("pickle.load", "pickle.loads", "joblib.load") or "tests" in path.parts
                ), path.name
                if call == "np.load":
                    assert not any(
                        k.arg == "allow_pickle" and k.value.value for k in node.keywords
                    ), path.name


# --- documents ---------------------------------------------------------------------------


def defined(path):
    """Functions, classes, methods as Class.name, and module-level names of a file."""
    found = set()
    for node in parsed(path).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            found |= {t.id for t in node.targets if isinstance(t, ast.Name)}
    return found


def test_the_reading_guide_names_what_is_there():
    text, checked = (ROOT / "docs" / "reading.md").read_text(), 0
    for line in text.splitlines():
        file = None
        for word in re.findall(r"`([^`]+)`", line):
            if re.fullmatch(r"[\w/]+\.py", word):
                file = ROOT / word
                assert file.is_file() or word == "drift_pixel.py", word
            elif file and re.fullmatch(r"[A-Za-z_]\w*(\.\w+)?", word):
                assert word in defined(file), f"{word} is not in {RELATIVE(file)}"
                checked += 1
    assert checked > 30
    for path in SCRIPTS:
        assert f"`{path.name}`" in text, f"docs/reading.md does not mention {path.name}"


@pytest.mark.parametrize(
    "page", sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")]), ids=lambda p: p.name
)
def test_links_and_pictures_of_a_page_exist(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


# --- a packed script ----------------------------------------------------------------------


def pack(script, folder):
    """What `make pack SCRIPT=...` does, from the line of the Makefile."""
    line = next(row for row in (ROOT / "Makefile").read_text().splitlines() if "tar -czf" in row)
    command = (
        line.strip()
        .replace("$(SCRIPT)", script)
        .replace("dist/", f"{folder}/")
        .replace("mkdir -p dist &&", "")
    )
    subprocess.run(command, shell=True, check=True, cwd=ROOT)
    away = folder / script
    with tarfile.open(folder / f"{script}.tar.gz") as tar:
        tar.extractall(away, filter="data")
    return away


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_a_packed_script_runs_in_another_folder(path, tmp_path):
    away = pack(path.stem, tmp_path)
    assert not [p for p in away.rglob("*") if p.name == "__pycache__"]
    fast = dict(
        drift_toy=["--preset", "smoke", "--steps", "2", "--no-pictures", "--count", "64"],
        hope_lm=["--preset", "smoke", "--steps", "2", "--width", "16", "--length", "32"],
        beta_vae_arc=["--preset", "smoke", "--steps", "2", "--n", "100"],
    )
    words = fast.get(path.stem, ["--help"])
    words += ["--out", str(tmp_path / "out")] if "--help" not in words else []
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, path.name, *words], cwd=away, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-1000:]
    if "--help" not in words:
        assert list((tmp_path / "out").rglob("*.safetensors"))
    else:
        assert "presets" in done.stdout


def test_the_drills_find_what_they_look_for(tmp_path):
    """A drill that cannot fail proves nothing: give each guard a reader that does the wrong thing."""
    from eval._drill_worker import bad, guarded, harm, judged, rng_of
    import time
    deeds = [lambda: "fine", lambda: {}["x"], lambda: os.kill(os.getpid(), 9), lambda: bytearray(3 << 30),
             lambda: time.sleep(1e9)]
    import eval._drill_worker as worker
    before, worker.LIMIT_S = worker.LIMIT_S, 5
    try:
        said = dict(guarded(lambda i: judged(deeds[i], (ValueError,)), 0, len(deeds)))
    finally:
        worker.LIMIT_S = before
    assert [bad(said[i]) for i in range(5)] == [False, True, True, True, True], said
    assert "KeyError" in said[1] and "-9" in said[2] and "MEMORY" in said[3] and said[4] == "hang"
    assert judged(lambda: 1, (), lambda value: value != 2 and "one").startswith("WRONG")
    path = tmp_path / "a"
    for kind, check in (("flip", lambda b: len(b) == 8 and any(b)), ("truncate", lambda b: len(b) < 8)):
        path.write_bytes(bytes(8))
        harm(path, kind, rng_of(0))
        assert check(path.read_bytes())
    harm(path, "delete", rng_of(0))
    assert not path.exists()
