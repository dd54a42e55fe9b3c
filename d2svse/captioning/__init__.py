"""Dense text for pictures: by a LLaVA of transformers or an OpenAI-compatible endpoint, and what it is like."""
