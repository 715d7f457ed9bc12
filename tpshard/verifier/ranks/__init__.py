"""What each rank of a set holds, under the source's names."""
