"""Seconds of the machine's elementary work, as `python -m benchmarks.calibrate --write` measured them: what formulas are chosen by.

Only their ratios matter, and those differ less between machines than the formulas that they choose from do.
"""

MACHINE = "AMD EPYC, threads: 1, torch 2.13.0+cpu"
PRODUCT, BATCHED, ENTRY, CALL = 2e-11, 2.3e-11, 1.7e-10, 9.9e-06
"""A multiplication of a large matrix product, of products of a matrix for each sample, an entry written and read again, and a call."""
