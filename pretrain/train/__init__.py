"""Logits to checkpoints. This room knows Lightning; it must not know what is done with a finished run."""
