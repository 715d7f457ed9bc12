"""What quantisation tools write: how the tensors of a quantised module follow the cut of its weight."""
