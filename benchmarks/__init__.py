"""Benchmarks: ratios, interleaved in one process, medians."""
