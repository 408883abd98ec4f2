"""Recipes of UniGRF: prepare data, train, evaluate, recommend, publish."""
