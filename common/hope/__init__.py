"""Parts of hope_lm.py beside its science: the scan, optimisers, the text pipeline, sidecars."""
