"""Reproduce papers: one package per paper, with its ablations, results and report."""
