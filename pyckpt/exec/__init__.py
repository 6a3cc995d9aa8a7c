"""Executors: the only places that know the order in which the parts of a block run."""
