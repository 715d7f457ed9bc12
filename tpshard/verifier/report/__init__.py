"""The verdict, and the files that say it."""
