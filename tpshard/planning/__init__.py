"""From layouts to steps: numbers only, no model's name and no torch."""
