"""A vector index in Milvus, embedded or on a server."""
