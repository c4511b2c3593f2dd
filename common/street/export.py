"""The bundle of phase 6: a folder with everything that prediction needs, each file named with its SHA-256."""

import time
from pathlib import Path

from common import run
from common.files import sha256_file, write_atomic
from common.street import bundle, fusion


def write_bundle(paths, splits_sha256, manifests, *, config, card, trained_on_weights, license, compress,
                 probes):
    """Copy artifacts of a run into paths.export_dir and describe them in bundle.json -> outputs {name: path}.

    config: facts of the model for model_config.json; card: those of model_card.json; manifests: {phase:
    file}; trained_on_weights: the model comes from published weights, so their licence must go along.
    Raises run.UserError that lists everything missing.
    """
    report = dict(chosen="single_view", best_untrained=None)
    if paths.cvfm_report.is_file():
        report = bundle.read_json(paths.cvfm_report)
    copies = _copies(paths, report, license if trained_on_weights else None, probes)
    out = paths.export_dir
    out.mkdir(parents=True, exist_ok=True)
    for name, path in copies.items():
        write_atomic(out / name, path.read_bytes())
    raw = bundle.read_json(paths.thresholds_json)["threshold"] if paths.thresholds_json.is_file() else None
    bundle.write_json(out / "model_config.json", dict(
        config, schema="streetvision/model@1", fusion_mode=report["chosen"], raw_threshold=raw,
        best_untrained=report["best_untrained"], id2label=dict(enumerate(config["class_names"]))))
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    about = f"Roadwork classifier, DINOv3 {config['size']}, fusion {report['chosen']}, calibrated, with sets"
    bundle.write_json(out / "model_card.json", dict(card, description=about, submission_time=stamp))
    sha = {name: sha256_file(out / name) for name in (*copies, "model_config.json", "model_card.json")}
    fused = "cvfm_weights.safetensors"
    bundle.write_json(paths.bundle_json, dict(
        schema="streetvision/bundle@1", policy_type="scrc", version=card["version"], created_at=stamp,
        policy=dict(policy_type="scrc", path="scrc_params.json", sha256=sha["scrc_params.json"]),
        model_checkpoint="model.safetensors", model_sha256=sha["model.safetensors"],
        model_config="model_config.json", model_config_sha256=sha["model_config.json"],
        cvfm_weights=fused if fused in sha else None, cvfm_sha256=sha.get(fused),
        probes={n: dict(path=n, sha256=sha[n]) for n in sha if n.startswith("probe_")},
        fusion_mode=report["chosen"], class_names=config["class_names"], input_size=config["image"],
        splits_sha256=splits_sha256,
        phase_manifests={p: sha256_file(f) for p, f in manifests.items() if Path(f).is_file()}))
    if errors := bundle.bundle_errors(paths.bundle_json):
        raise RuntimeError(f"the exported bundle is unsound: {errors}")
    outputs = {name: out / name for name in (*sha, "bundle.json")}
    if compress:
        bundle.write_archive(paths.bundle_tar, out, [*sha, "bundle.json"])
        outputs["bundle.tar.gz"] = paths.bundle_tar
    return outputs


def _copies(paths, report, license, probes):
    """{name in the bundle: file}, or a UserError that lists every file that is missing."""
    need = {"phase1 model": paths.model_best, "phase5 policy": paths.scrc_params_json,
            "splits": paths.splits_json}
    if report["chosen"] in fusion.TRAINED:
        need["phase4c weights"] = paths.cvfm_weights
    if license is not None:
        need["DINOv3 licence text (--phase6-license)"] = Path(license or "?")
    if missing := [f"{name} ({path})" for name, path in need.items() if not path.is_file()]:
        raise run.UserError("export needs " + ", ".join(missing))
    copies = {"model.safetensors": paths.model_best, "scrc_params.json": paths.scrc_params_json}
    optional = {"cvfm_weights.safetensors": paths.cvfm_weights}
    if probes:
        optional |= {"probe_before.safetensors": paths.probe_before,
                     "probe_after.safetensors": paths.probe_after}
    copies |= {name: path for name, path in optional.items() if path.is_file()}
    return copies | ({"LICENSE_DINOv3.txt": Path(license)} if license is not None else {})
