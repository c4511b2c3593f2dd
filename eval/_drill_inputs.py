"""Drills on inputs: fuzzed and hostile bytes for every reader, each input format damaged (for drills)."""

import tempfile
from pathlib import Path

from eval._drill_hostile import HOSTILE
from eval._drill_readers import READERS
from eval._drill_worker import bad, guarded, harm, judged, mutate, rng_of

FAST_FOLDER = "/dev/shm"


def place():
    return tempfile.TemporaryDirectory(dir=FAST_FOLDER if Path(FAST_FOLDER).is_dir() else None)


class Input:
    """A sound input in a folder, and what reading it gives."""

    def __init__(self, name, folder):
        self.reader, self.folder = READERS[name], Path(folder)
        self.files = self.reader.make(self.folder)
        self.kept = {p: p.read_bytes() for p in sorted(self.folder.rglob("*")) if p.is_file()}
        self.sound = str(self.reader.read(self.folder))

    def restore(self):
        """As made: readers may write beside their input, rename it, and remove it."""
        for path in sorted(self.folder.rglob("*"), reverse=True):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
            elif not path.is_dir() and path not in self.kept:
                path.unlink()
        for path, data in self.kept.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def read(self, strict=False):
        def different(value):
            return self.reader.checked and strict and str(value) != self.sound and "other content"
        outcome = judged(lambda: self.reader.read(self.folder), self.reader.says, different)
        if (self.folder / "UNPICKLED").exists() or Path("UNPICKLED").exists():
            outcome = "WRONG: a pickle was executed"
        return outcome


def count(work, cases, name):
    """work(i) of every case in a child of its own -> {refused, read, failed, failures}; failures are said."""
    counts, failures = dict(refused=0, read=0), []
    for i, outcome in guarded(work, 0, len(cases)):
        if bad(outcome):
            failures.append(f"{cases[i]}: {outcome}")
        else:
            counts[outcome.split(":")[0]] += 1
    print(f"{name}: {counts}, {len(failures)} failed", *failures[:5], sep="\n    ", flush=True)
    return dict(counts, failed=len(failures), failures=failures[:10])


def hostile(names, n, seed):
    """{reader: {fuzzed, crafted, refused, read, ...}}: n mutated inputs each, then the crafted ones."""
    found = {}
    for name in names:
        with place() as folder:
            one, crafted = Input(name, folder), HOSTILE[name]()
            originals = [one.kept[path] for path in one.files]

            def work(i):
                one.restore()  # the case before may have died in the middle of anything
                if i >= n:
                    one.files[0].write_bytes(list(crafted.values())[i - n])
                else:
                    rng = rng_of(seed, name, i)
                    k = int(rng.integers(len(one.files)))
                    one.files[k].write_bytes(mutate(originals[k], rng))
                return one.read()

            cases = [*(f"fuzz {i}" for i in range(n)), *(f"crafted: {title}" for title in crafted)]
            found[name] = dict(fuzzed=n, crafted=len(crafted), **count(work, cases, f"hostile {name}"))
    return found


def damage(names, rounds, seed):
    """{reader: {cases, ...}}: every file of every input format flipped, cut and deleted `rounds` times."""
    found = {}
    for name in names:
        with place() as folder:
            one = Input(name, folder)
            cases = [(k, kind, r) for r in range(rounds) for k in range(len(one.files))
                     for kind in ("flip", "truncate", "delete")]

            def work(i):
                one.restore()
                k, kind, r = cases[i]
                harm(one.files[k], kind, rng_of(seed, name, k, kind, r))
                return one.read(strict=True)

            found[name] = dict(cases=len(cases), **count(work, cases, f"damage {name}"))
    return found
