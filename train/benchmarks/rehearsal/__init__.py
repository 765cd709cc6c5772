"""Every stage of a run at FLUX.1-dev's true widths, with random weights: `python -m train.benchmarks rehearsal`."""
