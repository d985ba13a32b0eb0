"""Results in and out of the formats of other benchmarks."""
