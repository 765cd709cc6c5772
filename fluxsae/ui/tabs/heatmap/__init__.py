"""The Heatmap tab: what fires in one picture, and where."""
