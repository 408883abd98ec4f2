"""Serve a checkpoint over HTTP: schemas, batching, users' caches, the served model, metrics and the app."""
