"""TAOBAO-MM in bounded memory: preparation, streamed training, extrapolation and report."""
