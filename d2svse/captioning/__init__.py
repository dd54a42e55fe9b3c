"""Caption images with dense captions: a LLaVA of transformers, an OpenAI-compatible endpoint, and reports."""
