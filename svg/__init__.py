"""An SVG file as layers and parameters, and back to a file."""
