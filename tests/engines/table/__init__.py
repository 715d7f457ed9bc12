"""Reads vLLM's names off vLLM: an entry of its table for a type of model, from what its classes hold after loading.

`python -m tests.engines.table NAME_OR_DIRECTORY ...`, run by `make engine-table`. In the order of the work:

- `coded`: a checkpoint whose elements say where they come from, and what of it stands in a rank's parameters;
- `reading`: one checkpoint loaded by vLLM's own classes at several widths, taken apart into the tensors of parameters;
- `cuts`: which of the cuts that the table can say gives each tensor's share of every rank;
- `names`: patterns, from pairs of names;
- `findings`: what readings of several checkpoints of one type say together, as an entry;
- `known`: whether an entry says the same as the table does;
- `nested`: the same of models that nest a text model;
- `replay`: what vLLM held of one checkpoint, recorded, for tests of the tool where there is no vLLM.
"""
