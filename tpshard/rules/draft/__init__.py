"""Rules to start from for an unknown architecture."""
