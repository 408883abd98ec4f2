"""Measured results, and the tables of the pages."""
