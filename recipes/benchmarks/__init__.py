"""Measure speed and memory of search and ranking beside baselines."""
