"""Quantised modules as the floating-point weights that they stand for, in float64, by one formula a format."""
