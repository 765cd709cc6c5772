"""Training of the embedded miniature FLUX, run as `python -m train.miniature`."""
