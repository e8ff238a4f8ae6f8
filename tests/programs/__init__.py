"""Random programs: networks that nobody wrote, for tests that compare every method with the loop."""
