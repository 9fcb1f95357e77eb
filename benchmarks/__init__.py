"""Measurements: each prints a table and writes JSON; none is a test and none asserts a time."""
