"""Parts of streetvision.py beside its science: one file per mechanism of the pipeline."""
