"""Benchmarks: what `make bench` runs. Nothing here is shipped, and nothing here is a test."""
