"""The built-in decoder as what a verification runs."""
