"""Search in images and texts: the index that keeps them, its answers and their gallery."""
