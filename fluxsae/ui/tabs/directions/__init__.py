"""The Directions tab: the map of features, their neighbours, and layers compared."""
