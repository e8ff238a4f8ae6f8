"""Seconds of the machine's elementary work, as `python -m benchmarks.calibrate --write` measured them: what formulas are chosen by.

Only their ratios matter, and those differ less between machines than the formulas that they choose from do.
"""

MACHINE = "AMD EPYC, threads: 2, torch 2.13.0+cpu"
PRODUCT, BATCHED, ENTRY, CALL = 1e-11, 1.2e-11, 9.9e-11, 1e-05
"""A multiplication of a large matrix product, of products of a matrix for each sample, an entry written and read again, and a call."""
