"""Scripts that call train.py's stages with other functions, and measure what comes of it."""
