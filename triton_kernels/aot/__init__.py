"""Ahead-of-time compilation of every kernel that ships, and what the compiler says of it (`make aot`).

`compile.py` compiles one `Case`; `attention.py` and its like list the cases of a family; `__main__.py` is the command.
"""
