"""What may be concluded from a suite's results: intervals, tests, ties, fronts, noise floors."""
