"""Reading and writing: atomic writes, checkpoints, pictures, sheets and one-line messages."""
