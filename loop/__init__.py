"""What surrounds an optimisation: optimisers, fits, processes, progress and interrupts."""
