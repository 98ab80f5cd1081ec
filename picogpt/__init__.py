"""GPT from scratch as a reproducible experiment."""

__version__ = "0.1.0"
