"""Planted faults: what the tests must notice; `python -m tests.planted_faults` plants them."""
