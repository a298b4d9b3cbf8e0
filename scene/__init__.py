"""Captures, cameras, photographs and Gaussian files: what every representation of a scene shares."""
