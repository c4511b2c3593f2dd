"""Phases that leave proof: atomic JSON, manifests with the hash of every input and output, bundles, checkers.

A phase is complete when its manifest.json exists (it is written last), its outputs still have the hashes in
it, and its inputs and its part of the config are those it ran with.  A bundle is a folder whose bundle.json
names every file by relative path and SHA-256; nothing in it is ever unpickled.
"""

import csv
import gzip
import hashlib
import io
import json
import math
import platform
import tarfile
import time
from pathlib import Path, PurePosixPath

import numpy
import scipy
import torch

from common.files import sha256_file, write_atomic
from common.sealed import load_weights, save_weights
from common.flags import UserError

POLICIES = ("threshold", "gate", "scrc", "temperature", "dirichlet", "beta", "platt", "isotonic", "ensemble")
TENSORS = "streetvision/tensors@1"
REQUIRED = {"threshold": ("threshold",), "scrc": ("scrc_params",), "temperature": ("temperature",)}


def digest(value):
    """First 12 hex digits of the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:12]


def write_json(path, value):
    """Sorted keys, indent 2, trailing newline, atomic; NaN and infinity are refused -> SHA-256 of the
    file."""
    data = (json.dumps(value, sort_keys=True, indent=2, allow_nan=False) + "\n").encode()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)
    return hashlib.sha256(data).hexdigest()


def read_json(path):
    """A JSON object from a file, or a UserError of one line."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file {path}")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):                            # a pickle, a picture, half a file
        raise UserError(f"{path} is not JSON") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def save_tensors(path, tensors, meta):
    """Weights with the facts of `meta` in the file's metadata; equal tensors and facts are equal bytes."""
    save_weights(path, tensors, dict(meta, schema=TENSORS))


def load_tensors(path, device="cpu"):
    """(tensors, meta) of a file of save_tensors; UserError when it is damaged or another kind of file."""
    tensors, meta = load_weights(path, device)
    if meta.pop("schema", None) != TENSORS:
        raise UserError(f"{path} was not written by this program")
    return tensors, meta


# --- manifests -----------------------------------------------------------


def facts(path):
    return dict(path=Path(path).name, sha256=sha256_file(path), size_bytes=Path(path).stat().st_size)


def write_manifest(folder, phase, *, config_hash, seed, commit, inputs, outputs, metrics, grants, started,
                   device):
    """folder/manifest.json, last of all files of the phase.  inputs, outputs: {name: path}."""
    now = time.time()
    stamp = "%Y-%m-%dT%H:%M:%SZ"
    write_json(Path(folder, "manifest.json"), dict(
        schema="streetvision/manifest@1", phase=phase,
        run_id=time.strftime("%Y%m%dT%H%M%S", time.gmtime(started)),
        git_sha=commit or "unknown", config_hash=config_hash, seed=seed,
        inputs={k: facts(p) for k, p in inputs.items()}, outputs={k: facts(p) for k, p in outputs.items()},
        metrics=metrics, splits={g["split"]: g["purpose"] for g in grants}, grants=grants,
        duration_seconds=round(now - started, 3), started_at=time.strftime(stamp, time.gmtime(started)),
        finished_at=time.strftime(stamp, time.gmtime(now)),
        env=dict(python=platform.python_version(), torch=torch.__version__, numpy=numpy.__version__,
                 scipy=scipy.__version__, device=str(device))))


def stale(folder, config_hash, inputs):
    """Why the phase must run (again), or None: "no manifest", "config", "input NAME", "output NAME"."""
    path = Path(folder, "manifest.json")
    if not path.is_file():
        return "no manifest"
    try:
        manifest = read_json(path)
        if manifest["config_hash"] != config_hash:
            return "config"
        if set(manifest["inputs"]) != set(inputs):
            return "inputs"
        for name, file in inputs.items():
            if not Path(file).is_file() or sha256_file(file) != manifest["inputs"][name]["sha256"]:
                return f"input {name}"
        for name, fact in manifest["outputs"].items():
            file = Path(folder, fact["path"])
            if not file.is_file() or sha256_file(file) != fact["sha256"]:
                return f"output {name}"
    except (UserError, KeyError, TypeError):
        return "damaged manifest"
    return None


# --- checkers ------------------------------------------------------------


def _number(errors, name, value, low=0.0, high=1.0):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        errors.append(f"{name} must be a finite number, not {value!r}")
    elif not low <= value <= high:
        errors.append(f"{name} = {value} is outside [{low}, {high}]")


def policy_errors(path, expected=None):
    """What is wrong with a policy file, as a list of lines; empty when sound."""
    try:
        policy = read_json(path)
    except UserError as error:
        return [str(error)]
    errors, kind = [], policy.get("policy_type")
    if kind not in POLICIES:
        return [f"policy_type {kind!r} is none of {', '.join(POLICIES)}"]
    if expected and kind != expected:
        errors.append(f"policy_type is {kind}, expected {expected}")
    errors += [f"{kind} policy without {name}" for name in REQUIRED.get(kind, ()) if name not in policy]
    if "threshold" in policy:
        _number(errors, "threshold", policy["threshold"])
    params = policy.get("scrc_params")
    if kind == "scrc" and params is not None:
        if not isinstance(params, dict):
            return errors + ["scrc_params must be an object"]
        need = ("calibrator", "decision_threshold", "selection", "risk", "fnr", "pac")
        errors += [f"scrc_params without {name}" for name in need if name not in params]
        if "decision_threshold" in params:
            _number(errors, "decision_threshold", params["decision_threshold"])
        for part, keys in (("selection", ("xi",)), ("risk", ("alpha",)), ("fnr", ("alpha",)),
                           ("pac", ("alpha", "delta"))):
            if not isinstance(params.get(part, {}), dict):
                errors.append(f"{part} must be an object")
                continue
            for key in keys:
                if part in params:
                    _number(errors, f"{part}.{key}", params[part].get(key))
    for name, value in (policy.get("metrics") or {}).items():
        if value is not None and not isinstance(value, (int, float)):
            errors.append(f"metric {name} must be a number or null")
    return errors


def inside(root, name):
    """root/name for a plain relative path; UserError for absolute paths, '..' and links."""
    pure = PurePosixPath(str(name).replace("\\", "/"))
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or ":" in pure.parts[0]:
        raise UserError(f"unsafe path {str(name)!r} in a bundle; only names inside its folder are allowed")
    path = Path(root, *pure.parts)
    if path.is_symlink():
        raise UserError(f"{path} is a link; a bundle holds plain files only")
    return path


def bundle_errors(path):
    """What is wrong with a bundle.json and the files that it names, as a list of lines; empty when sound."""
    try:
        bundle = read_json(path)
    except UserError as error:
        return [str(error)]
    root, errors = Path(path).parent, []
    policies = bundle.get("policy")
    errors += [f"bundle without {key}" for key in ("model_checkpoint", "policy") if not bundle.get(key)]
    if policies is not None and not (isinstance(policies, dict) and {"path", "sha256"} <= set(policies)):
        errors.append("policy must be exactly one object with path and sha256")
        policies = None
    named = [(bundle.get("model_checkpoint"), bundle.get("model_sha256")),
             (bundle.get("cvfm_weights"), bundle.get("cvfm_sha256")),
             (bundle.get("model_config"), bundle.get("model_config_sha256"))]
    named += [(f.get("path"), f.get("sha256")) for f in (bundle.get("probes") or {}).values()]
    if policies:
        named.append((policies["path"], policies["sha256"]))
    for name, sha in named:
        if not name:
            continue
        try:
            file = inside(root, name)
        except UserError as error:
            errors.append(str(error))
            continue
        if not file.is_file():
            errors.append(f"{name} is missing")
        elif sha256_file(file) != sha:
            errors.append(f"{name} does not match its hash")
        elif policies and name == policies["path"]:
            errors += policy_errors(file, bundle.get("policy_type"))
    return errors


def check(path):
    """Check a bundle.json, policy file or .tar.gz by content -> its kind; UserError with the first fault."""
    if str(path).endswith((".tar.gz", ".tgz")):
        safe_members(path)
        return "archive"
    value = read_json(path)
    is_bundle = "model_checkpoint" in value or Path(path).name == "bundle.json"
    errors = bundle_errors(path) if is_bundle else policy_errors(path)
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise UserError(f"{path}: {errors[0]}{more}")
    return "bundle" if is_bundle else f"{value['policy_type']} policy"


# --- archives --------------------------------------------------------------


def write_archive(path, root, names):
    """Deterministic tar.gz of files under root: sorted names, no times, no owners; equal files, equal
    bytes."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in sorted(names):
            info = tarfile.TarInfo(name)
            info.size, info.mode = Path(root, name).stat().st_size, 0o644
            with open(Path(root, name), "rb") as file:
                tar.addfile(info, file)
    write_atomic(path, gzip.compress(raw.getvalue(), 6, mtime=0))


def safe_members(path):
    """Names in a tar.gz after refusing absolute names, '..', links and devices; UserError otherwise."""
    try:
        with tarfile.open(path, "r:gz") as tar:
            members = tar.getmembers()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path} is not a tar.gz: {error}") from None
    for m in members:
        inside("", m.name)
        if not m.isfile():
            raise UserError(f"{m.name!r} in {path} is no plain file; a bundle holds plain files only")
    return [m.name for m in members]


def extract(path, out):
    """Unpack a bundle archive into out after safe_members."""
    names = safe_members(path)
    with tarfile.open(path, "r:gz") as tar:
        for name in names:
            target = inside(out, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(target, tar.extractfile(name).read())
    return names


def write_csv(path, rows):
    """Rows (dicts with equal keys) as CSV, atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())
