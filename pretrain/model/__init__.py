"""Batches to logits. This room knows tensors; it must not know files, corpora or training."""
