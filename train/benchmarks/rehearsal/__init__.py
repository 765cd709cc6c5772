"""Every stage of a run at a FLUX's true widths, with random weights: `python -m train.benchmarks rehearsal`."""
