"""Evaluation of a model: inference, metrics, baselines, report."""
