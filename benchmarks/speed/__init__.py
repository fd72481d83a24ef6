"""What the benchmarks of time and memory share."""
