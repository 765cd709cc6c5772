"""The About tab: what this is, its figures and its endpoints."""
