"""Where everything of a run lies: RUN/phase1/model_best.safetensors is Paths(RUN).model_best."""

from dataclasses import dataclass
from pathlib import Path

ARTIFACTS = dict(
    config_json="config.json", splits_json="splits.json", access_log="access_log.jsonl",
    pipeline_state="pipeline_state.json", source_weights="source/tiny_source.safetensors",
    phase4a_dir="phase4a_explora", explora_checkpoint="phase4a_explora/explora_checkpoint.safetensors",
    explora_lora="phase4a_explora/explora_lora.safetensors",
    phase1_dir="phase1", model_best="phase1/model_best.safetensors",
    model_second="phase1/model_second.safetensors", model_third="phase1/model_third.safetensors",
    model_last="phase1/model_last.safetensors", model_ema="phase1/model_ema.safetensors",
    peft_adapters="phase1/peft_adapters.safetensors", gate_json="phase1/augmentation_gate.json",
    probe_before="phase1/probe_before.safetensors", probe_after="phase1/probe_after.safetensors",
    phase1_metrics="phase1/metrics.csv", val_calib_logits="phase1/val_calib_logits.safetensors",
    val_select_logits="phase1/val_select_logits.safetensors",
    phase2_dir="phase2", thresholds_json="phase2/thresholds.json",
    threshold_sweep_csv="phase2/threshold_sweep.csv", mcc_curve_plot="phase2/mcc_curve.png",
    phase4c_dir="phase4c_cvfm", cvfm_weights="phase4c_cvfm/cvfm_weights.safetensors",
    cvfm_report="phase4c_cvfm/cvfm_report.json", cvfm_metrics="phase4c_cvfm/metrics.csv",
    val_calib_fused="phase4c_cvfm/val_calib_fused.safetensors",
    val_select_fused="phase4c_cvfm/val_select_fused.safetensors",
    phase5_dir="phase5_scrc", scrc_params_json="phase5_scrc/scrc_params.json",
    calibration_summary="phase5_scrc/calibration_summary.json",
    reliability_plot="phase5_scrc/reliability.png",
    export_dir="export", bundle_json="export/bundle.json", bundle_tar="export/bundle.tar.gz",
    evaluation_dir="evaluation", evaluation_report_json="evaluation/evaluation_report.json",
    predictions_csv="evaluation/predictions.csv")


@dataclass(frozen=True)
class Paths:
    """Every artifact of a run, by the names of ARTIFACTS."""
    run: str

    def __getattr__(self, name):
        if name not in ARTIFACTS:
            raise AttributeError(name)
        return Path(self.run, ARTIFACTS[name])

    def ensure_dirs(self):
        for name in ARTIFACTS:
            if name.endswith("_dir"):
                getattr(self, name).mkdir(parents=True, exist_ok=True)
        return self
