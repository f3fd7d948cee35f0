"""Fine-tuning: the pre-training path with another head and other targets. It changes neither."""
