"""What FLUX.1-dev costs at full size, measured with random weights: `python -m train.benchmarks gpu`."""
