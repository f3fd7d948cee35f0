"""A run to something that a user wants: a loaded model, an exported directory."""
