"""Files to and from the Hugging Face Hub, each one checked. This folder knows nothing of runs."""
