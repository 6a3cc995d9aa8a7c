"""Triton kernels and their launchers, installed as `pyckpt.triton_kernels`.

Code here knows torch and triton and imports nothing of pyckpt: `pyckpt.ops` calls it, never the reverse. It
is installed below pyckpt because the import name `triton_kernels` belongs to a package of the Triton project.

`attention.py` launches the kernels of `attention_fwd.py` and `attention_bwd.py`, with tiles chosen by `tuning.py`.
"""
