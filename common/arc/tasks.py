"""ARC grids from files: readers that name what is wrong, one corpus layout, held-out tasks, no leaks.

    corpus = load_corpus("arc.json,re_arc.npz")     ARC JSON, RE-ARC, .npz; "" is procedural
    corpus.part("train")                            the grids of one split

A corpus is arrays: grids uint8 [N, P, P] with 10 outside, shapes, task, task_ids, io, split, source.
"""

import functools
import hashlib
import math
import pathlib
import re
import zlib
from dataclasses import dataclass, fields

import numpy as np

from common.arc.generators import procedural
from common.files import read_json
from common.files import read_npz as read_arrays
from common.flags import UserError

OUTSIDE = 10
TRAIN, VAL, TEST, UNSPLIT = 0, 1, 2, 255
SPLITS = dict(train=TRAIN, val=VAL, test=TEST)
PROCEDURAL, ARC_TRAINING, ARC_EVALUATION, ARC2, REARC = range(5)
SOURCES = ("procedural", "ARC-1 training", "ARC-1 evaluation", "ARC-2", "RE-ARC or .npz")


@dataclass
class Corpus:
    grids: np.ndarray           # uint8 [N, P, P], codes 0-10, anchored top left
    shapes: np.ndarray          # uint8 [N, 2]
    task: np.ndarray            # int32 [N], index into task_ids
    task_ids: np.ndarray        # str [T]
    io: np.ndarray              # uint8 [N]: 0 input, 1 output, 2 neither
    split: np.ndarray           # uint8 [N]: 0 train, 1 val, 2 test
    source: np.ndarray          # uint8 [N]: index into SOURCES

    def __len__(self):
        return len(self.grids)

    def where(self, keep):
        """The grids that a mask or an index list names."""
        rows = {f.name: getattr(self, f.name) for f in fields(self)}
        return Corpus(**{k: v if k == "task_ids" else v[keep] for k, v in rows.items()})

    def part(self, split):
        return self.where(self.split == SPLITS[split])


def check_grid(rows, where, canvas=30):
    """A list of rows of integers 0-9 -> uint8 [h, w], or UserError that names the place and the fault."""
    if not isinstance(rows, list) or not rows or not all(isinstance(r, list) and r for r in rows):
        raise UserError(f"{where}: a grid is a non-empty list of non-empty rows")
    if len({len(r) for r in rows}) > 1:
        raise UserError(f"{where}: ragged grid, rows of {sorted({len(r) for r in rows})} cells")
    if len(rows) > canvas or len(rows[0]) > canvas:
        raise UserError(f"{where}: grid of {len(rows)}x{len(rows[0])}; the largest is {canvas}x{canvas}")
    cells = [c for r in rows for c in r]
    if any(type(c) is not int for c in cells):
        raise UserError(f"{where}: cell {next(c for c in cells if type(c) is not int)!r} is not an integer")
    if min(cells) < 0 or max(cells) > 9:
        raise UserError(f"{where}: colour {min(cells) if min(cells) < 0 else max(cells)} is not one of 0-9")
    return np.array(rows, np.uint8)


def stack(rows, canvas):
    """A Corpus from (grid [h, w], task id, io, source, split) rows."""
    grids = np.full((len(rows), canvas, canvas), OUTSIDE, np.uint8)
    for place, (grid, *_) in zip(grids, rows):
        place[:grid.shape[0], :grid.shape[1]] = grid
    ids, task = np.unique([r[1] for r in rows], return_inverse=True)
    io, source, split = (np.array([r[i] for r in rows], np.uint8) for i in (2, 3, 4))
    shapes = np.array([r[0].shape for r in rows], np.uint8)
    return Corpus(grids, shapes, task.astype(np.int32), ids, io, split, source)


def read_tasks(path, canvas):
    """Grids of a JSON file: a task, {"training": ..., "evaluation": ...}, Kaggle challenges, RE-ARC."""
    data = read_json(path, object)
    strange = UserError(f"{path}: expected a task with 'train' and 'test', a list of pairs, or tasks by name")
    second = re.search(r"arc[-_]?(agi)?[-_]?2", path.as_posix().lower())

    def rows(name, task, held):
        if isinstance(task, list):
            pairs = [("", p) for p in task]
        elif isinstance(task, dict) and isinstance(task.get("train"), list):
            pairs = [(k, p) for k in ("train", "test") for p in task.get(k, [])]
        else:
            raise strange
        source = REARC if isinstance(task, list) else ARC_EVALUATION if held else ARC_TRAINING
        source = ARC2 if second else source
        for i, (part, pair) in enumerate(pairs):
            place = f"{path}: task {name} {part}[{i}]"
            if not isinstance(pair, dict) or "input" not in pair:
                raise UserError(f"{place} has no 'input'")
            for io, key in enumerate(("input", "output")):
                if key in pair:
                    grid = check_grid(pair[key], f"{place} {key}", canvas)
                    yield grid, name, io, source, TEST if held else UNSPLIT

    held = "evaluation" in path.as_posix()
    try:
        return stack([r for t in tasks_in(data, path, held) for r in rows(*t)], canvas)
    except (AttributeError, TypeError):         # a list where tasks by name belong, and the like
        raise strange from None


def tasks_in(data, path, held):
    """[(name, task, held out)] of a file's JSON; solutions in a file of their own are put in their places."""
    if isinstance(data, dict) and {"training", "evaluation"} & set(data):
        tasks = [(n, t, part == "evaluation")
                 for part in ("training", "evaluation") for n, t in data.get(part, {}).items()]
    elif isinstance(data, list) or isinstance(data, dict) and "train" in data:
        tasks = [(path.stem, data, held)]
    elif isinstance(data, dict) and data:
        tasks = [(n, t, held) for n, t in data.items()]
        answers = path.with_name(path.name.replace("_challenges", "_solutions"))
        solved = read_json(answers) if answers != path and answers.exists() else {}
        for name, task, _ in tasks:
            if isinstance(task, dict):
                for pair, grid in zip(task.get("test", []), solved.get(name, [])):
                    pair.setdefault("output", grid)
    else:
        raise TypeError("no tasks")
    return tasks


def read_npz(path, canvas):
    """A corpus.npz, a bare `grids` array (with `task`, `io`... if it has them), or train/val/test arrays."""
    data = read_arrays(path)
    parts = [k for k in SPLITS if k in data]
    if "grids" not in data and not parts:
        raise UserError(f"{path}: has keys {sorted(data)}; expected 'grids', or 'train', 'val' and 'test'")
    split = None
    if "grids" not in data:
        if len({data[k].shape[1:] for k in parts}) > 1 or any(data[k].ndim != 3 for k in parts):
            found = ", ".join(f"{k} {list(data[k].shape)}" for k in parts)
            raise UserError(f"{path}: {found}; expected [N, h, w]")
        split = np.concatenate([np.full(len(data[k]), SPLITS[k], np.uint8) for k in parts])
        data["grids"] = np.concatenate([data[k] for k in parts])
    grids = data["grids"]
    whole = np.issubdtype(grids.dtype, np.integer)
    if grids.ndim != 3 or not whole or not grids.size or max(grids.shape[1:]) > canvas:
        raise UserError(f"{path}: grids are {grids.dtype} {list(grids.shape)}; "
                        f"expected integers [N, h, w] of at most {canvas}x{canvas}")
    if grids.min() < 0 or grids.max() > OUTSIDE:
        code = grids.min() if grids.min() < 0 else grids.max()
        raise UserError(f"{path}: code {code}; colours are 0-9, and 10 is outside")
    n = len(grids)
    full = np.full((n, canvas, canvas), OUTSIDE, np.uint8)
    full[:, :grids.shape[1], :grids.shape[2]] = grids
    shapes, solid = rectangles(full)
    if not solid.all():
        raise UserError(f"{path}: grid {int(solid.argmin())} is not a solid rectangle at the top left")

    def column(key, value, most, kind=np.uint8):
        given = data.get(key, np.full(n, value))
        if given.shape != (n,) or given.dtype.kind not in "iu" or given.min() < 0 or given.max() > most:
            what = "index into 'task_ids'" if key == "task" else f"whole number of at most {most}"
            raise UserError(f"{path}: '{key}' must hold one {what} a grid")
        return given.astype(kind)

    ids, task = data.get("task_ids"), np.arange(n, dtype=np.int32)
    if "task" in data:
        task = column("task", 0, len(ids) - 1 if ids is not None and ids.ndim else 2**31 - 1, np.int32)
    if ids is None and "task" in data:
        ids, task = np.unique(task, return_inverse=True)
        ids, task = ids.astype(str), task.astype(np.int32)
    elif ids is None:
        ids = np.array([f"{path.stem}{i:06d}" for i in range(n)])
    if ids.dtype.kind != "U" or ids.ndim != 1 or task.max() >= len(ids):
        raise UserError(f"{path}: 'task_ids' must hold the name of each task as text")
    split = column("split", UNSPLIT, UNSPLIT) if split is None else split
    return Corpus(full, shapes.astype(np.uint8), task, ids, column("io", 2, 2), split,
                  column("source", REARC, len(SOURCES) - 1))


def rectangles(grid_NPP):
    """(height and width [N, 2], whether each is a non-empty solid rectangle at the top left [N])."""
    real = grid_NPP != OUTSIDE
    shape = np.stack([real.any(2).sum(1), real.any(1).sum(1)], 1)
    row, col = (np.arange(n) < shape[:, a, None] for a, n in ((0, real.shape[1]), (1, real.shape[2])))
    return shape, (real == row[:, :, None] & col[:, None]).all((1, 2)) & (shape > 0).all(1)


def join(parts):
    """Several corpora as one; equal task ids are the same task."""
    ids, index = np.unique(np.concatenate([p.task_ids for p in parts]), return_inverse=True)
    starts = np.cumsum([0] + [len(p.task_ids) for p in parts])
    task = np.concatenate([index[s + p.task] for s, p in zip(starts, parts)]).astype(np.int32)
    arrays = ("grids", "shapes", "io", "split", "source")
    rest = {k: np.concatenate([getattr(p, k) for p in parts]) for k in arrays}
    return Corpus(task=task, task_ids=ids, **rest)


def split_tasks(corpus):
    """Hold out by task: the tenth of the tasks with the smallest SHA-256 is val, the next test if none is.

    Where a held-out task has original ARC grids, its RE-ARC grids are dropped: they would only repeat it.
    """
    free = np.unique(corpus.task[corpus.split == UNSPLIT])
    order = sorted(free, key=lambda t: hashlib.sha256(str(corpus.task_ids[t]).encode()).hexdigest())
    tenth = max(1, round(len(order) / 10))
    wanted = [s for s in (VAL, TEST) if not (corpus.split == s).any()] if len(order) > 2 else []
    part = np.full(len(corpus.task_ids), TRAIN, np.uint8)
    for i, s in enumerate(wanted):
        part[order[i * tenth:(i + 1) * tenth]] = s
    corpus.split = np.where(corpus.split == UNSPLIT, part[corpus.task], corpus.split)
    original = np.zeros(len(corpus.task_ids), bool)
    original[corpus.task[np.isin(corpus.source, (ARC_TRAINING, ARC_EVALUATION, ARC2))]] = True
    return corpus.where((corpus.split == TRAIN) | (corpus.source != REARC) | ~original[corpus.task])


def canonical(grid):
    """The same bytes for all eight symmetries and all renamings of the colours of a grid [h, w]."""
    forms = []
    for g in (grid, grid.T):
        for s in (g, g[::-1], g[:, ::-1], g[::-1, ::-1]):
            _, first, name = np.unique(s, return_index=True, return_inverse=True)
            forms.append((s.shape, np.argsort(np.argsort(first))[name].astype(np.uint8).tobytes()))
    return min(forms)


def drop_leaks(corpus):
    """Drop training grids found in val or test up to symmetry and renaming, and repeats -> (corpus, n, n)."""
    n, P = len(corpus), corpus.grids.shape[1]
    code = np.arange(n)[:, None] * 11 + corpus.grids.reshape(n, -1)
    count = np.bincount(code.ravel(), minlength=11 * n).reshape(n, 11)[:, :10]
    key = np.concatenate([np.sort(corpus.shapes, 1), np.sort(count, 1)], 1)     # equal for equal forms; cheap
    held = corpus.split != TRAIN
    group = np.unique(key, axis=0, return_inverse=True)[1].ravel()
    suspect = np.flatnonzero(~held & np.isin(group, group[held]))
    form = lambda i: canonical(corpus.grids[i, :corpus.shapes[i, 0], :corpus.shapes[i, 1]])
    near = np.flatnonzero(held & np.isin(group, group[suspect]))
    known = {form(i) for i in near}
    leak = np.zeros(n, bool)
    leak[[i for i in suspect if form(i) in known]] = True
    repeat = np.ones(n, bool)
    repeat[np.unique(corpus.grids.reshape(n, P * P).view(f"V{P * P}").ravel(), return_index=True)[1]] = False
    repeat &= ~held & ~leak
    return corpus.where(~(leak | repeat)), int(leak.sum()), int(repeat.sum())


@functools.lru_cache(4)
def load_corpus(data, canvas=30, n=20_000, seed=0, fixed=False):
    """What `data` names (files or folders, comma-separated), split by task; procedural grids for no name."""
    if not data:
        for more in (4 / 3, 2, 4):              # about one in five repeats an earlier one
            rows = [(g, t, 2, PROCEDURAL, UNSPLIT) for g, t in procedural(int(n * more), canvas, seed, fixed)]
            corpus = drop_leaks(split_tasks(stack(rows, canvas)))[0]
            if len(corpus) >= n:
                break
        return corpus.where(slice(0, n))
    parts = []
    for name in data.split(","):
        path = pathlib.Path(name)
        files = [path] if path.is_file() else sorted(
            p for p in path.rglob("*") if p.suffix in (".json", ".npz") and "_solutions" not in p.name)
        if not files:
            raise UserError(f"--data {name}: no such file, or a folder without .json or .npz")
        parts += [(read_npz if p.suffix == ".npz" else read_tasks)(p, canvas) for p in files]
    corpus = join(parts)
    if (corpus.split == UNSPLIT).any():
        corpus = drop_leaks(split_tasks(corpus))[0]
    if not (corpus.split == TRAIN).any():
        raise UserError(f"--data {data}: nothing left to train on; add training tasks")
    if fixed and (corpus.shapes != canvas).any():
        raise UserError(f"--sizes fixed needs every grid to be {canvas}x{canvas}; use --sizes coded")
    return corpus


def top_up(corpus, n, seed=0):
    """A corpus filled up to n with procedural training grids that neither leak nor repeat."""
    canvas, short = corpus.grids.shape[1], n - len(corpus)
    rows = [(g, t, 2, PROCEDURAL, TRAIN) for g, t in procedural(short * 4 // 3 + 50, canvas, seed)]
    return drop_leaks(join([corpus, stack(rows, canvas)]))[0].where(slice(0, n))


# --- statistics ------------------------------------------------


def grid_statistics(grid_NPP):
    """Validity, sizes and colours of grids [N, P, P], codes 0-10 -> dict of plain numbers."""
    real, (shape, valid) = grid_NPP != OUTSIDE, rectangles(grid_NPP)
    count = np.stack([(grid_NPP == c).sum((1, 2)) for c in range(10)], 1)
    below = real[:, 1:]                         # a cell with a cell above it
    same = ((grid_NPP[:, 1:] == grid_NPP[:, :-1]) & below).sum() / max(below.sum(), 1)
    return dict(n=len(grid_NPP), valid=float(valid.mean()),
                mean_h=float(shape[:, 0].mean()), mean_w=float(shape[:, 1].mean()),
                colors_per_grid=float((count > 0).sum(1).mean()), equal_to_cell_above=float(same),
                modal_share=float((count.max(1) / np.maximum(count.sum(1), 1)).mean()),
                color_share=(count.sum(0) / max(count.sum(), 1)).tolist(),
                distinct=len(np.unique(grid_NPP.reshape(len(grid_NPP), -1), axis=0)))


def code_nats(corpus):
    """Mean nats a grid costs in other codes: uniform over sizes and colours, and zlib at level 9."""
    area = corpus.shapes.astype(float).prod(1)
    raw = [bytes(s) + g[:s[0], :s[1]].tobytes() for g, s in zip(corpus.grids, corpus.shapes)]
    nats = 8 * math.log(2)
    return dict(uniform_code_nats=float((area * math.log(10) + 2 * math.log(corpus.grids.shape[1])).mean()),
                zlib_nats=float(np.mean([len(zlib.compress(r, 9)) for r in raw]) * nats),
                zlib_together_nats=len(zlib.compress(b"".join(raw), 9)) / len(raw) * nats)
