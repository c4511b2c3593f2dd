"""The index of a data set, one row an image: our own index.jsonl, the Hugging Face export, or folders."""

import json
from pathlib import Path

from common.files import read_json
from common.flags import UserError
from common.images import EXTENSIONS

FOLDERS = {"0": 0, "no_roadwork": 0, "none": 0, "1": 1, "roadwork": 1}
# our name <- column of natix-network-org/roadwork, nested or written with a dot
EXPORTED = {"path": "image", "vid_id": "video_info.vid_id", "seq_id": "video_info.seq_id",
            "frame": "video_info.frame_id", "city": "city_name", "daytime": "scene_level_tags.daytime",
            "weather": "scene_level_tags.weather"}


def read_index(data):
    """Rows [{id, path, label, group, ...}] of index.jsonl, labels.json or class folders under `data`.

    The group is that of the row, else its video, else its sequence, else the image is a group of its own.
    Raises UserError naming the first bad row or folder.
    """
    root = Path(data)
    if (root / "index.jsonl").is_file():
        rows = [plain(row) for row in read_lines(root / "index.jsonl")]
    elif (root / "labels.json").is_file():
        rows = [dict(path=r.get("filename"), label=r.get("label")) if isinstance(r, dict) else r
                for r in read_json(root / "labels.json", list)]
    elif root.is_dir() and (folders := sorted(p for p in root.iterdir() if p.is_dir())):
        if odd := [p.name for p in folders if p.name.lower() not in FOLDERS]:
            raise UserError(f"{root / odd[0]}: a class folder must be one of "
                            f"{', '.join(FOLDERS)}; or write index.jsonl")
        rows = [dict(path=str(f.relative_to(root)), label=FOLDERS[p.name.lower()])
                for p in folders for f in sorted(p.rglob("*")) if f.suffix.lower() in EXTENSIONS]
    else:
        raise UserError(f"{root} holds no index.jsonl, no labels.json and no class folders; "
                        "`demo-data --out DIR` draws a data set")
    for number, row in enumerate(rows, 1):
        sound = isinstance(row, dict) and row.get("label") in (0, 1) and isinstance(row.get("path"), str)
        if not sound:
            raise UserError(f"{root}: row {number} needs a path and a label 0 or 1, got {row}")
        row["id"] = row["path"]
        group = row.get("group") or row.get("vid_id") or row.get("seq_id")
        row["group"] = str(group) if group not in (None, "") else row["path"]
    if len({r["id"] for r in rows}) != len(rows) or not rows:
        raise UserError(f"{root}: {len(rows)} rows, {len({r['id'] for r in rows})} different paths")
    return rows


def plain(row):
    """A row of the Hugging Face export under our names: {"video_info": {"vid_id": 7}} and
    {"video_info.vid_id": 7} give vid_id 7.  What the row already has under our name stays."""
    if not isinstance(row, dict):
        return row
    out = dict(row)
    for name, column in EXPORTED.items():
        value = row.get(column)
        if value is None:
            head, _, tail = column.partition(".")
            value = row[head].get(tail) if isinstance(row.get(head), dict) else None
        value = value.get("path") if isinstance(value, dict) else value     # an image is bytes and a path
        if value is not None:
            out.setdefault(name, value)
    return out


def read_lines(path):
    """The JSON values of a file's lines."""
    rows = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError):
            raise UserError(f"{path}, line {number}: not JSON") from None
    return rows
