"""Documents of users: texts with fields and embeddings."""
