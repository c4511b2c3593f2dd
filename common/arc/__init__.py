"""Parts of beta_vae_arc.py beside its science: task files, grid generators, embeddings of the latents."""
