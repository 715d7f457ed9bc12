"""Bytes at a place: files, locks, checksums, names, headers, pickles, the Hub."""
