"""Parts of drift_latent.py and drift_pixel.py that the idea does not need: files, codecs, queues, ranks, the
judge."""
