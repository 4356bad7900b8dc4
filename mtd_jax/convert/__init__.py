"""Weights in and out: native checkpoints, Hugging Face directories, GGUF files."""
