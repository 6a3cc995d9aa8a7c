"""Training a causal language model on text: what `pyckpt train` runs.

For example::

    from pyckpt import train

    result = train.run(train.TrainConfig(data="book.txt", steps=1000, out="runs/book"))
    print(result.validation_loss)
"""

from __future__ import annotations

from pyckpt.train.config import TrainConfig
from pyckpt.train.folder import read_config
from pyckpt.train.loop import TrainResult, exit_code, run

__all__ = ["TrainConfig", "TrainResult", "exit_code", "read_config", "run"]
