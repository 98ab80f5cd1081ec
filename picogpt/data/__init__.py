"""Data: downloads, tokenizers, token files, the order of batches."""
