"""Other libraries that a model is used from; each module needs the extra of its name."""
