"""Data: assets from outside, tokenizers, token files, the order of batches."""
