"""Measures of encoders and generators; each file is self-contained and needs no run."""
