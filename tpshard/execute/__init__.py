"""From a plan to bytes on disk."""
