"""eval/: numbers equal the plain formulas, pages are whole and harmless, mistakes are one line."""

import html.parser
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import draw
from common.metrics import InceptionV3, Moments, inception_score
from eval import _shared, bench, fid, neighbours, report, status, sweep, table

ROOT = Path(__file__).resolve().parent.parent
BAD = b"\x89PNG\r\n\x1a\n and then nothing"


# --- a run on disk, as STYLE lays it out ---------------------------------

def write_run(folder, script="drift_toy", steps=30, preset="demo", images=2, tail="", config=None, rows=None,
              **more):
    folder = Path(folder)
    (folder / "samples").mkdir(parents=True)
    config = dict(steps=steps, lr=1e-3, seed=0, preset=preset, out=str(folder),
                  taus=[0.1, 0.2]) | (config or {})
    (folder / "config.json").write_text(json.dumps(dict(config=config)))
    (folder / f"{script}.py").write_text("# the source that ran\n")
    header = dict(kind="header", time_s=0.0, config=config, argv=[f"{script}.py", "--preset", preset],
                  world=1,
                  commit="1a2b3c", code_sha256="ab" * 32,
                  env=dict(python="3.11.2", torch="2.13.0", cpu="AMD EPYC 7B13", threads=1, gpu=[]))
    if rows is None:
        rows = [dict(kind="train", time_s=0.5 * s, step=s, loss=3 / s, lam={"0.1": 1 / s})
                for s in range(1, steps + 1)]
        rows += [dict(kind="eval", time_s=0.5 * s, step=s, fid=100 / s, n=500) for s in (steps // 2, steps)]
    text = "".join(json.dumps(r) + "\n" for r in [header | more, *rows])
    (folder / "log.jsonl").write_text(text + tail)
    for i in range(images):
        picture = np.random.RandomState(i).randint(0, 256, (4, 8, 8, 3)).astype(np.uint8)
        draw.save(draw.grid(picture), folder / "samples" / f"{10 * (i + 1):08d}.png")
    return folder


SCRIPT = '''"""A toy.

Paper       Toys, arXiv:0000.00001
Differs     smaller,
            and faster
"""
import dataclasses, json, sys
from common.run import opt
@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = opt(30, "steps")
    lr: float = opt(1e-3, "rate; off: as printed in the paper")
    seed: int = opt(0, "seed")
    preset: str = opt("demo", "preset")
    out: str = opt("", "out")
    taus: tuple = opt((0.1, 0.2), "temperatures")
    alphas: tuple = opt((1.0,), "scales", free=True)
PRESETS = {
    "demo": dict(paper="table 1", expect=dict(fid=2.5), set=dict(steps=30)),
    "long": dict(paper="table 1, long", expect=dict(fid=1.5), set=dict(steps=3000)),
}
'''


def write_project(root):
    (root / "docs").mkdir(parents=True)
    (root / "tests").mkdir()
    (root / "drift_toy.py").write_text(SCRIPT)
    (root / "tests" / "test_drift_toy.py").write_text("def test_toys_are_fun():\n    pass\n")
    (root / "README.md").write_text("# Title\n\n<!-- results -->\nold\n<!-- /results -->\n\nrest\n")
    for name in ("evidence", "deviations", "decisions"):
        shutil.copy(ROOT / "docs" / f"{name}.md", root / "docs")
    return root


def fails(name, main, argv, capsys):
    """The one line a mistake prints; checks prefix and exit status 2."""
    with pytest.raises(SystemExit) as stop:
        _shared.cli(name, lambda: main([str(a) for a in argv]))
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if not line.startswith("warning:")]
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith(f"{name}: error: "), err
    return lines[0]


# --- reading runs --------------------------------------------------------

def test_a_full_or_forbidden_disk_is_one_line(tmp_path, capsys):
    def main():
        open(tmp_path / "no" / "such" / "folder", "w")
    with pytest.raises(SystemExit) as stop:
        _shared.cli("eval.x", main)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_torn_lines_are_counted_and_the_rest_is_read(tmp_path):
    run = _shared.read_run(write_run(tmp_path / "r", steps=4, tail='not json\n[1]\n{"kind": "train", "st'))
    assert run.torn == 3 and len(run.rows) == 6 and run.script == "drift_toy" and run.preset == "demo"


def test_config_is_found_when_the_header_is_torn(tmp_path):
    path = write_run(tmp_path / "r")
    lines = (path / "log.jsonl").read_text().splitlines(keepends=True)
    (path / "log.jsonl").write_text('{"kind": "hea\n' + "".join(lines[1:]))
    assert _shared.read_run(path).config["lr"] == 1e-3


@pytest.mark.parametrize("name, step", [("00030000.png", 30000), ("step9.npz", 9), ("samples_12.tar", 12),
                                        ("alpha1.npz", -1), ("alpha1.5.npz", -1), ("field.png", -1),
                                        ("v2.png", -1)])
def test_only_steps_are_taken_for_steps(name, step):
    assert _shared.step_of(name) == step


def test_samples_are_ordered_by_step_not_by_name(tmp_path):
    path = write_run(tmp_path / "r", images=0)
    for step in (9, 100, 20):
        draw.save(np.zeros((4, 4), np.uint8), path / "samples" / f"step{step}.png")
    assert [s for s, _ in _shared.read_run(path).samples()] == [9, 20, 100]


def test_the_best_guidance_scale_is_chosen_by_fid(tmp_path):
    rows = [dict(kind="eval", step=10, alpha=a, fid=f, isc=i) for a, f,
            i in ((1, 5.0, 1.0), (2, 3.0, 2.0), (3, 4.0, 9.0))]
    run = _shared.read_run(write_run(tmp_path / "r", rows=rows))
    scores, notes = _shared.last_scores(run)
    assert scores == dict(alpha=2, fid=3.0, isc=2.0) and notes == ["best of 3 alphas"]


def test_a_comparison_without_eval_lines_shows_its_first_case(tmp_path):
    rows = [dict(kind="case", suite="starts", case=f"case {i}", distance=0.5 + i) for i in range(3)]
    scores, notes = _shared.last_scores(_shared.read_run(write_run(tmp_path / "r", rows=rows)))
    assert scores == dict(distance=0.5) and notes == ["first of 3 cases: starts, case 0"]


# --- fid -----------------------------------------------------------------

class Eye:
    """A stand-in for the network: 24 fixed random projections of the mean colours, K = 5 logits."""
    comparable = True

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.w, self.v = torch.randn(3, 24, generator=g), torch.randn(3, 5, generator=g)

    def features(self, x_NCHW):
        assert x_NCHW.dtype == torch.uint8
        mean = x_NCHW.double().mean((2, 3)).float() / 64
        return dict(pool=(mean @ self.w).sin(), logits=mean @ self.v, spatial=(mean @ self.w)[:, :9].cos())

    def __call__(self, x_NCHW):
        out = self.features(x_NCHW)
        return out["pool"], out["logits"]

    def to(self, device):
        return self


@pytest.fixture
def eye(monkeypatch, tmp_path):
    """Any weights file gives the stand-in network."""
    monkeypatch.setattr(InceptionV3, "load", classmethod(lambda cls, *a, **k: Eye()))
    path = tmp_path / "weights.pth"
    path.write_bytes(b"weights")
    return path


def write_images(folder, n, seed=0, side=12, low=0):
    x = np.random.RandomState(seed).randint(low, 256, (n, side, side, 3)).astype(np.uint8)
    folder.mkdir(parents=True)
    for i, a in enumerate(x):
        Image.fromarray(a).save(folder / f"{i:04d}.png")
    return x


def run_fid(argv, out):
    fid.main([*map(str, argv), "--out", str(out), "--device", "cpu"])
    return json.loads(Path(out).read_text())


def test_fid_end_to_end_with_random_network(tmp_path):
    torch.manual_seed(0)
    net = InceptionV3()
    for name, p in net.named_parameters():
        if name.endswith("conv.weight"):
            torch.nn.init.normal_(p, 0, (2 / np.prod(p.shape[1:])) ** 0.5)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    a, b = write_images(tmp_path / "a", 4), write_images(tmp_path / "b", 3, seed=1, low=90)
    out = run_fid([tmp_path / "a", "--ref", tmp_path / "b", "--inception", tmp_path / "w.pth", "--batch", 3],
                  tmp_path / "m.json")
    with torch.no_grad():
        (fa, la), (fb, _) = (net(torch.from_numpy(x).permute(0, 3, 1, 2)) for x in (a, b))
    fa, fb = fa.double().numpy(), fb.double().numpy()
    # with fewer rows than features the root's trace is the nuclear norm of the centred, scaled data
    ca, cb = ((f - f.mean(0)) / np.sqrt(len(f) - 1) for f in (fa, fb))
    want = (((fa.mean(0) - fb.mean(0)) ** 2).sum() + (ca ** 2).sum() + (cb ** 2).sum()
            - 2 * np.linalg.svd(ca @ cb.T, compute_uv=False).sum())
    assert out["fid"] == pytest.approx(want, rel=1e-4)          # float32 network, batches of 3 against 4
    assert out["n"] == 4 and out["n_reference"] == 3
    # with 4 rows the 10 default splits hold at most one row each, so every score is 1
    assert out["isc"] == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("n, batch", [(103, 7), (40, 64), (10, 3)])
def test_streaming_inception_score_equals_the_whole(n, batch):
    logits = torch.from_numpy(np.random.RandomState(4).standard_normal((n, 12)) * 2)
    score = fid.Score(n)
    for start in range(0, n, batch):
        rows = list(range(start, min(start + batch, n)))
        score.update(rows, logits[rows])
    assert score.result() == pytest.approx(inception_score(logits), rel=1e-12)


def test_folder_tar_and_npz_of_the_same_images_agree(tmp_path, eye):
    x = write_images(tmp_path / "a", 30)
    write_images(tmp_path / "ref", 20, seed=5)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "a", "x")
    np.savez(tmp_path / "a.npz", arr_0=x, labels=np.zeros(30))
    found = [run_fid([tmp_path / name, "--ref", tmp_path / "ref", "--inception", eye, "--batch", 8,
                      "--spatial",
                      "--manifold"], tmp_path / "m.json") for name in ("a", "a.tar", "a.npz")]
    keys = ("fid", "isc", "sfid", "precision", "recall", "density", "coverage", "kid", "n")
    assert all([f[k] for k in keys] == [found[0][k] for k in keys] for f in found) and found[0]["fid"] > 0


def test_images_of_several_sizes_are_all_counted(tmp_path, eye):
    write_images(tmp_path / "a", 5)
    write_images(tmp_path / "a" / "deep", 4, side=20)
    assert run_fid([tmp_path / "a", "--ref", tmp_path / "a", "--inception", eye],
                   tmp_path / "m.json")["n"] == 9


def test_distance_of_a_set_to_itself_is_zero(tmp_path, eye):
    write_images(tmp_path / "a", 12)
    out = run_fid([tmp_path / "a", "--ref", tmp_path / "a", "--inception", eye, "--manifold"],
                  tmp_path / "m.json")
    assert abs(out["fid"]) < 1e-6 and out["precision"] == out["recall"] == 1


def test_eval_record_is_complete(tmp_path, eye):
    write_images(tmp_path / "a", 4)
    record = run_fid([tmp_path / "a", "--ref", tmp_path / "a", "--inception", eye],
                     tmp_path / "m.json")["record"]
    assert record["weights"]["sha256"] == fid.sha256_file(eye) and record["weights"]["bytes"] == 7
    assert record["torchvision"] is None and record["reference"]["listing_sha256"]
    for key in ("samples", "resize", "layer", "dtype", "quantisation", "seed", "comparable", "torch",
                "device"):
        assert key in record
    assert str(tmp_path) not in json.dumps(record)              # names and hashes, no folders


def test_unreadable_files_are_counted_and_named(tmp_path, eye, capsys):
    write_images(tmp_path / "a", 6)
    (tmp_path / "a" / "bad.png").write_bytes(BAD)
    (tmp_path / "a" / "empty.jpg").write_bytes(b"")
    out = run_fid([tmp_path / "a", "--ref", tmp_path / "a", "--inception", eye], tmp_path / "m.json")
    assert out["n"] == 6 and out["record"]["unreadable"] == 2
    assert out["record"]["unreadable_names"] == ["bad.png", "empty.jpg"]
    assert "2 unreadable" in capsys.readouterr().err


def test_fewer_samples_than_features_is_warned_about_with_the_bias(tmp_path, eye, capsys):
    write_images(tmp_path / "a", 6)
    out = run_fid([tmp_path / "a", "--ref", tmp_path / "a", "--inception", eye], tmp_path / "m.json")
    err = capsys.readouterr().err
    assert "warning: 6 samples for 24 features" in err and "sampling alone" in err and out["fid_bias"] > 0


def test_a_dino_distance_has_its_own_name(tmp_path, monkeypatch):
    monkeypatch.setattr(fid.Dino, "__init__", lambda self, path,
                        device: setattr(self, "net", lambda x: Eye()(x)[0]))
    write_images(tmp_path / "a", 5)
    write_images(tmp_path / "b", 5, seed=1)
    out = run_fid([tmp_path / "a", "--ref", tmp_path / "b", "--dino", tmp_path], tmp_path / "m.json")
    assert out["fd_dino"] > 0 and "fid" not in out and "isc" not in out and "DINOv3" in out["record"]["layer"]


def write_stats(path, mu, n=None):
    np.savez(path, mu=mu, sigma=np.eye(len(mu)), **({} if n is None else dict(n=n)))
    return path


def test_statistics_compare_without_a_network(tmp_path, capsys):
    a, b = write_stats(tmp_path / "a.npz", np.zeros(5), 100), write_stats(tmp_path / "b.npz", np.full(5, 2.0))
    assert run_fid([a, "--ref", b], tmp_path / "m.json")["fid"] == pytest.approx(20, abs=1e-9)
    assert fails("eval.fid", fid.main, [a, "--ref", write_stats(tmp_path / "c.npz", np.zeros(6))], capsys)


def test_saved_statistics_give_the_distance_of_the_images(tmp_path, eye):
    write_images(tmp_path / "a", 9)
    write_images(tmp_path / "b", 9, seed=2, low=60)
    fid.main([str(tmp_path / "b"), "--save", str(tmp_path / "b.npz"), "--inception", str(eye), "--spatial"])
    one, two = (run_fid([tmp_path / "a", "--ref", tmp_path / ref, "--inception", eye, "--spatial"],
                        tmp_path / "m.json")
                for ref in ("b", "b.npz"))
    assert two["fid"] == pytest.approx(one["fid"], rel=1e-9) and two["sfid"] == pytest.approx(one["sfid"],
                                                                                              rel=1e-9)
    assert Moments.load(tmp_path / "b.npz").n == 9


def test_last_k_orders_checkpoints(tmp_path, eye):
    run = write_run(tmp_path / "runs" / "drift_toy" / "demo", images=0)
    for step in (5, 100, 20):
        x = np.random.RandomState(step).randint(0, 256, (6, 8, 8, 3)).astype(np.uint8)
        np.savez(run / "samples" / f"step{step}.npz", arr_0=x)
    write_images(tmp_path / "ref", 6, seed=9)
    fid.main([str(run), "--ref", str(tmp_path / "ref"), "--inception", str(eye), "--last", "2"])
    records = json.loads((run / "metrics.json").read_text())
    assert [r["step"] for r in records] == [20, 100]
    logged = [r for r in _shared.read_run(run).rows if r["kind"] == "eval" and "record" in r]
    assert [r["fid"] for r in logged] == [r["fid"] for r in records]


@pytest.mark.parametrize("argv, says", [
    (["none", "--ref", "a"], "nothing at"), (["a", "--ref", "none"], "no reference at"),
    (["a", "--ref", "a"], "--inception"), (["a"], "give --ref"),
                                        (["a", "--ref", "a", "--inception", "none"], "no Inc"),
    (["a", "--ref", "a", "--last", "2"], "--last needs a run"),
                                        (["bad.npz", "--ref", "bad.npz"], "cannot read"),
    (["text.npz", "--ref", "text.npz"], "holds"), (["a", "--reff", "a"], "unrecognized"),
    (["a", "--ref", "a", "--batch", "0"], "--batch"), (["note.txt", "--ref", "a", "--inception", "w"],
                                                       "no folder"),
    (["hollow", "--ref", "a", "--inception", "w"], "no images"),
    (["broken", "--ref", "a", "--inception", "w"], "none of the 1 images"),
                                        (["run", "--ref", "a"], "no sample set")])
def test_fid_mistakes_are_one_line(tmp_path, eye, capsys, monkeypatch, argv, says):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "a", 2)
    write_run(tmp_path / "run", images=1)
    (tmp_path / "hollow").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_bytes(BAD)
    (tmp_path / "bad.npz").write_bytes(b"PK no zip")
    (tmp_path / "note.txt").write_text("hello")
    np.savez(tmp_path / "text.npz", words=np.zeros(3))
    eye.rename(tmp_path / "w")
    assert says in fails("eval.fid", fid.main, argv, capsys)


MEMORY = """
import resource, sys
sys.path[:0] = [{root!r}, {tests!r}]
import numpy as np
from test_eval import Eye, InceptionV3, fid
InceptionV3.load = classmethod(lambda cls, *a, **k: Eye())
fid.main([{npz!r}, "--ref", {npz!r}, "--inception", {npz!r}, "--limit", sys.argv[1]])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_memory_of_fid_does_not_grow_with_the_number_of_images(tmp_path):
    x = np.random.RandomState(0).randint(0, 256, (4000, 64, 64, 3)).astype(np.uint8)     # 49 MB of pixels
    np.savez(tmp_path / "x.npz", arr_0=x)
    code = MEMORY.format(root=str(ROOT), tests=str(ROOT / "tests"), npz=str(tmp_path / "x.npz"))
    peak = [float(subprocess.run([sys.executable, "-c", code, n], capture_output=True, text=True, check=True)
                  .stdout.split()[-1]) for n in ("256", "4000")]
    # the pixels of 3744 more images are 46 MB; the allocator's noise is a few MB
    assert peak[1] - peak[0] < 12, peak


# --- neighbours ----------------------------------------------------------

@pytest.fixture
def planted(tmp_path):
    """60 smooth training images in two classes; samples: 8 new, a copy, a mirrored copy, a noisy copy."""
    rng = np.random.RandomState(0)
    smooth = lambda: Image.fromarray(rng.randint(0, 256, (5, 5, 3)).astype(np.uint8)).resize((32, 32),
                                                                                             Image.BICUBIC)
    sets = dict(train=[smooth() for _ in range(60)], held=[smooth() for _ in range(30)])
    sets["samples"] = [smooth() for _ in range(8)]
    noisy = np.asarray(sets["train"][12]).astype(int) + rng.randint(-4, 5, (32, 32, 3))
    sets["samples"] += [sets["train"][7], sets["train"][9].transpose(Image.FLIP_LEFT_RIGHT),
                        Image.fromarray(noisy.clip(0, 255).astype(np.uint8))]
    for name, images in sets.items():
        for i, image in enumerate(images):
            (tmp_path / name / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / name / f"class{i % 2}" / f"{i:03d}.png")
    return tmp_path


def audit(folder, *more):
    neighbours.main([str(folder / "samples"), "--data", str(folder / "train"), "--side", "32", "--k", "3",
                     "--device", "cpu", "--out", str(folder / "out"), *map(str, more)])
    return json.loads((folder / "out" / "neighbours.json").read_text())


def test_copies_and_mirrored_copies_are_found_at_distance_zero(planted):
    out = audit(planted)
    first = {i["sample"]: i["pixel"][0] for i in out["items"]}
    assert first["class0/008.png"] == dict(image="class1/007.png", rms=0.0, mirrored=False)
    assert first["class1/009.png"] == dict(image="class1/009.png", rms=0.0, mirrored=True)
    assert out["exact_copies"] == out["flagged"] == 2


def test_near_copies_are_flagged_against_held_out_images(planted):
    out = audit(planted, "--held-out", planted / "held")
    assert {i["sample"] for i in out["items"] if i["flagged"]} == {"class0/008.png", "class1/009.png",
                                                                   "class0/010.png"}
    assert out["null_images"] == 30 and 0 < out["thresholds"]["pixel"] < out["null_median"]["pixel"]


def test_neighbours_equal_brute_force(planted):
    out = audit(planted)
    read = lambda name: np.asarray(Image.open(planted / name)).astype(float)
    train = sorted(str(p.relative_to(planted / "train")) for p in (planted / "train").rglob("*.png"))
    for item in out["items"]:
        x = read(Path("samples", item["sample"]))
        want = sorted(min(np.sqrt(((v - read(Path("train", t))) ** 2).mean()) for v in (x, x[:, ::-1]))
                      for t in train)
        got = [n["rms"] for n in item["pixel"]]
        assert got[0] == pytest.approx(want[0], abs=1e-5)       # stored with six decimals


def test_features_find_the_copy_too_and_labels_are_compared(planted, eye):
    out = audit(planted, "--inception", eye, "--held-out", planted / "held")
    item = next(i for i in out["items"] if i["sample"] == "class0/008.png")
    # float32 features of unit length: a cosine is off by at most a few 1e-7
    nearest = item["features"][0]
    assert nearest["image"] == "class1/007.png" and nearest["cosine"] == pytest.approx(1, abs=1e-5)
    labels = [(i["sample"].split("/")[0], i["features"][0]["image"].split("/")[0]) for i in out["items"]]
    assert out["label_match"] == pytest.approx(np.mean([a == b for a, b in labels]))


def test_the_picture_shows_every_sample_with_its_neighbours(planted):
    audit(planted)
    image = np.asarray(Image.open(planted / "out" / "neighbours.png"))
    copy = np.asarray(Image.open(planted / "train" / "class1" / "007.png"))
    big = copy.repeat(2, 0).repeat(2, 1)                        # 32 pixels are shown at 64
    corners = np.argwhere((image[:-63, :-63] == big[0, 0]).all(-1))
    hits = [(y, x) for y, x in corners if (image[y:y + 64, x:x + 64] == big).all()]
    assert len(hits) == 2 and hits[0][0] == hits[1][0]          # sample and nearest, side by side


def test_neighbour_mistakes_are_one_line(planted, capsys):
    say = lambda *argv: fails("eval.neighbours", neighbours.main, argv, capsys)
    assert "nothing at" in say(planted / "none", "--data", planted / "train")
    assert "--k 99" in say(planted / "samples", "--data", planted / "train", "--k", 99)
    assert "required" in say(planted / "samples")
    assert "at least 1" in say(planted / "samples", "--data", planted / "train", "--side", 0)


# --- report --------------------------------------------------------------

class Page(html.parser.HTMLParser):
    """The parsed page: tags with attributes, text, and every violation of nesting."""
    VOID = {"meta", "link", "img", "br", "!doctype"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open, self.wrong = [], [], [], []
        self.feed(text)
        self.close()
        self.wrong += self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        self.text.append(data)

    def all(self, *names):
        return [a for t, a in self.tags if t in names]


def render(*paths, **kw):
    text = report.render([_shared.read_run(p) for p in paths], **kw)
    return text, Page(text)


@pytest.fixture
def two(tmp_path):
    return (write_run(tmp_path / "drift_toy" / "demo"),
            write_run(tmp_path / "drift_toy" / "fast", preset="fast", config=dict(lr=0.5), images=3))


def test_report_is_self_contained(two):
    text, page = render(*two)
    assert not re.search(r"https?://|//[a-z]|@import|url\(", re.sub(r"base64,[^\"]*", "", text))
    assert not page.all("script", "iframe", "object", "embed", "form")
    assert all(a["src"].startswith("data:image/png;base64,")
               for a in page.all("img")) and len(page.all("img")) == 5
    assert all(a["href"].startswith("data:") for a in page.all("link"))
    assert any("default-src 'none'" in a.get("content", "") for a in page.all("meta"))


def test_report_is_well_formed_and_navigable(two):
    text, page = render(*two)
    assert page.wrong == [] and text.startswith("<!doctype html>")
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    targets = [a["href"][1:] for a in page.all("a")]
    assert targets and set(targets) <= set(ids)
    labelled = [a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a]
    assert set(labelled) <= set(ids)
    for tag in ("main", "nav", "header", "footer", "h1"):
        assert len(page.all(tag)) == 1
    assert page.all("html")[0]["lang"] == "en" and page.tags[-1]
    assert any(a.get("name") == "viewport" for a in page.all("meta"))
    levels = [int(t[1]) for t, _ in page.tags if re.fullmatch("h[1-6]", t)]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:]))


def test_report_speaks_to_screen_readers_and_keyboards(two):
    _, page = render(*two)
    assert all(a.get("alt") for a in page.all("img"))
    assert len(page.all("caption")) == len(page.all("table")) > 3
    assert all(a.get("scope") in ("row", "col") for a in page.all("th"))
    assert all(a.get("tabindex") == "0" and a.get("role") == "region"
               for a in page.all("div") if a.get("class") == "scroll")
    assert all(a.get("role") == "img" or a.get("aria-hidden") == "true" for a in page.all("svg"))
    assert ":focus-visible" in "".join(page.text) and "prefers-color-scheme: dark" in "".join(page.text)


HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)> \' onload=a'


def test_report_escapes_everything_from_logs(tmp_path):
    rows = [{"kind": HOSTILE, "step": s, HOSTILE: s * 1.0, "lam": {HOSTILE: 2.0 * s}} for s in (1, 2)]
    rows += [{"kind": "eval", "step": 2, "x" + HOSTILE: 3.0}]
    run = write_run(tmp_path / "drift_toy" / "a<b>&\" onload=\"c", config={HOSTILE: HOSTILE}, rows=rows,
                    argv=["a.py", HOSTILE],
                    commit=HOSTILE, env={HOSTILE: HOSTILE, "cpu": HOSTILE})
    shutil.copy(run / "samples" / "00000010.png", run / "samples" / "x' onerror='a 30.png")
    (run / "samples" / "text.txt").write_text(HOSTILE)
    text, page = render(run, write_run(tmp_path / "drift_toy" / "plain"), title=HOSTILE)
    assert not page.all("script") and page.wrong == []
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
    assert all(a["src"].startswith("data:") for a in page.all("img"))
    assert any(HOSTILE in t for t in page.text) and len([t for t in page.text if HOSTILE in t]) > 8


def test_report_is_the_same_for_the_same_runs(two):
    assert render(*two)[0] == render(*two)[0]


def test_report_tolerates_a_torn_line_and_says_so(tmp_path):
    text, _ = render(write_run(tmp_path / "r", tail='{"kind": "train", "step": 31, "lo'))
    assert "1 torn line(s)" in text


def test_report_of_a_run_that_logged_nothing(tmp_path):
    text, page = render(write_run(tmp_path / "r", rows=[], images=0))
    assert "nothing logged yet" in text and page.wrong == []


def test_non_finite_values_are_gaps_and_are_named(tmp_path):
    rows = [dict(kind="train", step=s, loss=None if s == 3 else float(s)) for s in range(1, 6)]
    rows.append(dict(kind="train", step=6, loss=10 ** 400))
    text, page = render(write_run(tmp_path / "r", rows=rows))
    assert "non-finite values in loss" in text
    points = next(a["points"] for a in page.all("polyline"))
    assert len(points.split()) == 4


def test_a_resume_replaces_the_steps_it_repeats(tmp_path):
    rows = [dict(kind="train", step=s, loss=100.0) for s in (1, 2, 3)]
    rows += [dict(kind="train", step=s, loss=float(s)) for s in (2, 3, 4)]
    run = _shared.read_run(write_run(tmp_path / "r", rows=rows))
    assert report.curves(run)["train", "step"]["loss"] == {1: 100.0, 2: 2.0, 3: 3.0, 4: 4.0}


def test_a_curve_goes_where_its_values_say(tmp_path):
    rows = [dict(kind="train", step=s, loss=float(s)) for s in (0, 50, 100)]
    _, page = render(write_run(tmp_path / "r", rows=rows))
    (x0, y0), (x1, y1), (x2, y2) = (map(float, p.split(","))
                                    for p in page.all("polyline")[0]["points"].split())
    assert x0 < x1 < x2 and y0 > y1 > y2 and x1 - x0 == pytest.approx(x2 - x1, abs=0.2)    # printed to 0.1
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)


def test_guidance_scales_become_curves_over_alpha(tmp_path):
    rows = [dict(kind="eval", step=s, alpha=a, fid=s + a) for s in (10, 20) for a in (1.0, 2.0)]
    found = report.curves(_shared.read_run(write_run(tmp_path / "r", rows=rows)))
    assert found["eval", "alpha"] == {"fid": {1.0: 21.0, 2.0: 22.0}}
    assert found["eval", "step"]["fid at alpha 2"] == {10: 12.0, 20: 22.0}


def test_lines_without_a_step_stand_in_a_table(tmp_path):
    rows = [dict(kind="case", name=f"case {i}", distance=0.5 * i, more=dict(deep=i)) for i in range(3)]
    text, page = render(write_run(tmp_path / "r", rows=rows))
    body = text[text.index('id="t-rows0-0"'):]
    assert "case 2" in body and "<td>1</td><td>2</td></tr>" in body and page.wrong == []
    assert "#tables" in [a["href"] for a in page.all("a")]


def test_a_large_family_of_curves_is_folded(tmp_path):
    rows = [dict(kind="train", step=s, loss=s, lam={f"key{i}": s * i for i in range(1, 9)}) for s in range(3)]
    text, page = render(write_run(tmp_path / "r", rows=rows))
    assert "lam: 8 curves" in text and text.index("<strong>loss") < text.index("lam: 8 curves")
    assert page.wrong == [] and len(page.all("polyline")) == 9


@pytest.mark.parametrize("seed", range(25))
def test_no_log_is_strange_enough_to_break_the_readers(tmp_path, seed):
    rng = np.random.RandomState(seed)
    values = [None, True, -1, 0, 7, 1e308, -1e-308, float("nan"), 10 ** 400, "x", "", [], {}, [1, "a"],
              {"a": None}, {"a": {"b": 2}}, "eval", "train", "header", "case"]
    keys = "kind step epoch loss alpha fid time_s record lam argv env world config".split()
    pick = lambda: values[rng.randint(len(values))]
    rows = [{k: pick() for k in keys if rng.rand() < 0.6} | ({"kind": "eval"} if rng.rand() < 0.5 else {})
            for _ in range(40)]
    config = {k: pick() for k in ("preset", "steps", "device", "lr")}
    header = {k: pick() for k in ("argv", "world", "commit", "env")}
    run = write_run(tmp_path / "r", rows=rows, config=config, **header)
    text, page = render(run)
    assert page.wrong == []
    read, toy = _shared.read_run(run), _shared.Experiment("drift_toy", {}, "", {}, None)
    json.dumps(table.result(read, toy), allow_nan=True), status.stages(read)


def test_config_difference_lists_exactly_what_differs(two):
    text, page = render(*two)
    body = text[text.index('id="t-diff"'):text.index("<details", text.index('id="t-diff"'))]
    assert set(re.findall(r'<th scope="row">(\w+)</th>', body)) == {"lr", "preset", "out"}


def test_a_long_log_makes_a_small_report(tmp_path):
    rows = [dict(kind="train", step=s, loss=1 / (s + 1), lr=s * 1e-6) for s in range(40_000)]
    text, _ = render(write_run(tmp_path / "r", rows=rows, images=0))
    assert len(text) < 120_000


def test_large_pictures_are_reduced_and_broken_ones_are_named(tmp_path):
    run = write_run(tmp_path / "r", images=0)
    draw.save(np.random.RandomState(0).randint(0, 256, (40, 4000)).astype(np.uint8),
              run / "samples" / "1.png")
    (run / "samples" / "2.png").write_bytes(BAD)
    text, page = render(run)
    assert [a["width"] for a in page.all("img")] == [str(report.MOST_PIXELS)]
    assert "not a readable picture" in text


def test_report_mistakes_are_one_line(tmp_path, capsys):
    run = write_run(tmp_path / "runs" / "demo")
    say = lambda *argv: fails("eval.report", report.main, argv, capsys)
    assert "no run at" in say(tmp_path / "none")
    assert f"did you mean {run}" in say(tmp_path / "runs")
    assert "cannot write" in say(run, "--out", tmp_path / "no" / "x.html")
    assert "required" in say()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
         "--disable-background-networking --disable-component-update --disable-sync "
         "--hide-scrollbars --enable-logging=stderr").split()


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_report_renders_in_chromium_without_network_or_errors(tmp_path, two, width):
    page, shot, net = tmp_path / "r.html", tmp_path / "s.png", tmp_path / "net.json"
    report.main([*map(str, two), "--out", str(page)])
    done = subprocess.run([CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'u'}",
                           f"--window-size={width},2400",
                           f"--log-net-log={net}", f"--screenshot={shot}", page.as_uri()],
                          capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]    # no error, no violation of the page's policy
    events = net.read_text()
    asked = set(re.findall(r'"url":"https?://([^"/]*)', events))
    own = re.compile(r"(^|\.)(google|googleapis|gstatic)\.com(:|$)")          # the browser's own errands
    assert not [host for host in asked if not own.search(host)], asked
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape[1] == width
    ink = (np.abs(pixels - pixels[0, 0]).max(-1) > 40)
    assert 0.005 < ink.mean() < 0.9                             # text and pictures, not one colour
    assert not ink[:, -6:].any()                                # nothing runs over the right edge


# --- table, docs, status -------------------------------------------------

def test_table_regenerates_and_says_not_run(tmp_path):
    root = write_project(tmp_path / "p")
    write_run(root / "runs" / "drift_toy" / "demo", preset="demo")
    for _ in range(2):
        table.main(["--root", str(root)])
        text = (root / "README.md").read_text()
        assert ("| drift_toy.py | arXiv:0000.00001, table 1 | demo | fid 2.5 | fid 3.333 (n 500) "
                "| AMD EPYC 7B13, 1 ") in text
        assert "| drift_toy.py | arXiv:0000.00001, table 1, long | long | fid 1.5 | not run | - |" in text
    assert text.startswith("# Title") and text.endswith("rest\n") and "old" not in text


def test_a_shortened_run_does_not_pass_for_its_preset(tmp_path):
    root = write_project(tmp_path / "p")
    write_run(root / "runs" / "drift_toy" / "quick", preset="long", steps=30)
    write_run(root / "runs" / "drift_toy" / "broken", preset="demo", config=dict(steps=90, taus=[0.1]))
    table.main(["--root", str(root)])
    text = (root / "README.md").read_text()
    assert "long with steps=30" in text and "demo with steps=90, taus=[0.1]" in text
    assert "step 30 of 90" in text


def test_results_of_runs_elsewhere_stay(tmp_path):
    root = write_project(tmp_path / "p")
    write_run(root / "runs" / "drift_toy" / "demo", preset="demo")
    table.main(["--root", str(root)])
    before = (root / "README.md").read_text()
    shutil.rmtree(root / "runs")
    table.main(["--root", str(root)])
    assert (root / "README.md").read_text() == before


def test_docs_are_made_from_logs_and_tests(tmp_path):
    root = write_project(tmp_path / "p")
    write_run(root / "runs" / "drift_toy" / "demo", preset="demo")
    table.main(["--root", str(root), "--docs"])
    evidence, deviations, decisions = ((root / "docs" / f"{n}.md").read_text()
                                       for n in ("evidence", "deviations", "decisions"))
    assert "| drift_toy, table 1: fid 2.5 | runs/drift_toy/demo | fid 3.333, n 500 |" in evidence
    assert "`python drift_toy.py --preset long` | not run" in evidence and "toys are fun" in evidence
    assert "| drift_toy.py | smaller, and faster |" in deviations and "| --lr | 0.001 |" in decisions


def test_table_mistakes_are_one_line(tmp_path, capsys):
    root = write_project(tmp_path / "p")
    (root / "README.md").write_text("# no markers\n")
    say = lambda *argv: fails("eval.table", table.main, argv, capsys)
    assert "<!-- results -->" in say("--root", root)
    assert "no README.md" in say("--root", tmp_path)
    (root / "docs" / "results.json").write_text("{")
    assert "damaged" in say("--root", root)


def test_status_names_what_is_missing(tmp_path, capsys):
    root = write_project(tmp_path / "p")
    run = write_run(root / "runs" / "drift_toy" / "demo", preset="demo")
    (run / "ckpt" / "00000030").mkdir(parents=True)
    meta = dict(step=30, world=1, files={"net.safetensors": dict(sha256="0")})
    (run / "ckpt" / "00000030" / "meta.json").write_text(json.dumps(meta))
    status.main(["--root", str(root), "--json", "--verify"])
    toy, = json.loads(capsys.readouterr().out)
    stage, = toy["presets"]["demo"]["runs"]
    assert toy["tests"] and not toy["parity"] and toy["presets"]["long"]["runs"] == []
    assert stage["trained"] and stage["evaluated"]
    assert stage["damaged"] == ["00000030: net.safetensors is missing"]
    assert stage["artifacts"] == {"config": True, "source": True, "RUN.md": False, "ckpt": True,
                                  "weights": False,
                                  "samples": True}
    status.main(["--root", str(root)])
    out = capsys.readouterr().out
    assert "long    not run" in out and "30 of 30 done" in out


# --- sweep and bench -----------------------------------------------------

def fake_evaluate(tmp_path, monkeypatch, body):
    root = write_project(tmp_path / "p")
    found = _shared.experiments(root)
    monkeypatch.setattr(sweep, "ROOT", root)
    monkeypatch.setattr(sweep, "experiments", lambda only: [e for e in found if e.name in only])
    (root / "drift_toy.py").write_text("import json, sys\n" + body)
    return root


EVALUATE = """
words = sys.argv[1:]
flag = lambda name: words[words.index(name) + 1] if name in words else None
assert words[0] == "evaluate" and flag("--lr") == "0.5" and flag("--preset") == "demo", words
step = int(flag("--weights").split("/")[-1].split(".")[0]) if flag("--weights") else 0
row = dict(kind="eval", step=step, fid=step + float(flag("--alphas")), seven=float(flag("--extra") or 0))
open(flag("--out") + "/log.jsonl", "a").write(json.dumps(row) + "\\n")
"""


def test_sweep_runs_each_value_with_the_flags_of_the_run(tmp_path, monkeypatch, capsys):
    root = fake_evaluate(tmp_path, monkeypatch, EVALUATE)
    run = write_run(root / "runs" / "drift_toy" / "demo", config=dict(lr=0.5))
    sweep.main([str(run), "--values", "1,2.5", "--", "--extra", "7"])
    found = json.loads((run / "sweep.json").read_text())["results"]
    assert [(f["value"], f["scores"]) for f in found] == [("1", dict(fid=1.0, seven=7.0)),
                                                          ("2.5", dict(fid=2.5, seven=7.0))]
    assert (run / "sweep.png").is_file() and "2.5" in capsys.readouterr().out


def test_sweep_takes_the_newest_weights_in_order(tmp_path, monkeypatch):
    root = fake_evaluate(tmp_path, monkeypatch, EVALUATE)
    run = write_run(root / "runs" / "drift_toy" / "demo", config=dict(lr=0.5))
    (run / "weights").mkdir()
    for step in (200, 1000, 90):
        (run / "weights" / f"{step}.safetensors").touch()
    sweep.main([str(run), "--values", "1", "--last", "2"])
    found = json.loads((run / "sweep.json").read_text())["results"]
    assert [f["scores"]["fid"] for f in found] == [201.0, 1001.0]


def test_sweep_mistakes_are_one_line(tmp_path, monkeypatch, capsys):
    root = fake_evaluate(tmp_path, monkeypatch, "sys.exit('drift_toy.py: error: no weights yet')\n")
    run = write_run(root / "runs" / "drift_toy" / "demo")
    say = lambda *argv: fails("eval.sweep", sweep.main, argv, capsys)
    assert "no weights yet" in say(run, "--values", "1")
    assert "keeps no weights" in say(run, "--values", "1", "--last", 2)
    assert "at least one value" in say(run, "--values", ",")
    assert "which is not in" in say(write_run(tmp_path / "x", script="other"), "--values", "1")


def test_bench_json_schema(tmp_path, capsys):
    (tmp_path / "eval").mkdir()
    case = dict(what="w", value=6.5, ratio="theirs / ours", goal=5, met=True, agree=True, ours_s=1,
                theirs_s=6.5)
    records = dict(a=dict(cases=dict(x=case, y=dict(skipped="No module named 'peer'"))),
                   b=dict(jax_missing="not installed: jax",
                          rows=[dict(C=8, ours_ms=1.0, speedup_over_plain=2.0,
                                                                       speedup_over_plain_quartiles=[1.5,
                                                                                                     2.5])]))
    for name, record in records.items():
        (tmp_path / "eval" / f"bench_{name}.py").write_text(
            f"import sys\nopen(sys.argv[sys.argv.index('--json') + 1], 'w').write({json.dumps(record)!r})\n")
    bench.main(["--root", str(tmp_path), "--json", str(tmp_path / "b.json")])
    out = json.loads((tmp_path / "b.json").read_text())
    assert out["env"]["cpu"] and out["benches"] == records
    assert all(set(r) == {"bench", "case", "kind", "ratio", "goal", "status"} for r in out["ratios"])
    assert [r["ratio"] for r in out["ratios"]] == [6.5, None, 2.0, None]
    assert [r["status"].split(":")[0] for r in out["ratios"]] == ["met", "not installed",
                                                                  "middle half 1.5 to 2.5",
                                                                  "not installed"]


def test_a_bench_that_crashes_is_reported_as_failed(tmp_path, capsys):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "bench_a.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(SystemExit) as stop:
        bench.main(["--root", str(tmp_path)])
    assert stop.value.code == 1 and "failed: exit status 3" in capsys.readouterr().out
    assert "unknown benchmark 'b'" in fails("eval.bench", bench.main, ["b", "--root", str(tmp_path)], capsys)


@pytest.mark.parametrize("name", ["fid", "neighbours", "sweep", "bench", "table", "status", "report"])
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as stop:
        dict(fid=fid, neighbours=neighbours, sweep=sweep, bench=bench, table=table, status=status,
             report=report)[name].main(["--help"])
    assert stop.value.code == 0 and f"python -m eval.{name}" in capsys.readouterr().out
