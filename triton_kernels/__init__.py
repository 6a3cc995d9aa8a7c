"""Triton kernels and their launchers, installed as `pyckpt.triton_kernels`.

Code here knows torch and triton and imports nothing of pyckpt: `pyckpt.ops` calls it, never the reverse. It
is installed below pyckpt because the import name `triton_kernels` belongs to a package of the Triton project.

There are no kernels in it yet; until there are, `pyckpt.ops` serves every op with PyTorch's own.
"""
