"""The tokenwise halves of a block: `pre` (x -> q, k, v) and `post` (x, o -> y), forward and backward, on any tile.

Two kinds with one interface (`interface.Tokenwise`): `standard`, hand-written, for the usual families, and `generic`,
which wraps any two modules and asks autograd, tile by tile.
"""
