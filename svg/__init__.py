"""SVG files: read into layers and parameters, drawn, and written back."""
