"""What FLUX.1-dev costs at full size, measured with random weights: `python -m train.benchmark_gpu`."""
