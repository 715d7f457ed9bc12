"""Families of decoders, from config.json alone."""
