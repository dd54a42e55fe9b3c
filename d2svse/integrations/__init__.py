"""Use a model from other libraries. Each module needs the extra of its name."""
