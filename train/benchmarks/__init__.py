"""Speed beside other tools and beside the physical floor: `python -m train.benchmarks NAME`."""
