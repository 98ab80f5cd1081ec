"""Measurements: each writes one record, with every run and not only the mean."""
