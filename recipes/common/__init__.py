"""Common parts of all recipes: command lines, files, hashes, run tracking, profiling."""
