"""Parts of dit_t2i.py beside its science: public checkpoint formats, encoders, captions, pictures, memory."""
