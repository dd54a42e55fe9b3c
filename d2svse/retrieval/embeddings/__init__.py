"""Embeddings of images and texts, stored in a folder."""
