"""Raw files to batches. This room knows sequences and tokens; it must not know models or training."""
