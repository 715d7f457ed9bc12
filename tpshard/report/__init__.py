"""What the verbs return, as values, JSON and pages."""
