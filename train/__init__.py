"""Thin scripts over the library, run as `python -m train.NAME`."""
