"""Measurements of speed, memory and fidelity: the commands of `python -m bench`."""
