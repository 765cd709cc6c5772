"""The Steer tab: features turned up or down, swaps, strips and recipes."""
