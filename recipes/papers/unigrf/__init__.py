"""UniGRF on MovieLens-1M: ablations, report and results."""
