"""pyckpt: transformer blocks that train at any sequence length on a fixed amount of memory, with exact gradients."""

from pyckpt import _source_tree, measure, ops  # noqa: F401 (_source_tree: its import has the effect)
from pyckpt._version import __version__
from pyckpt.attend.context import ContextParallel
from pyckpt.block import CkptGenericBlock, CkptTransformerBlock
from pyckpt.functional import activation, attention, glu, layer_norm, linear_cross_entropy, rms_norm, rope
from pyckpt.keep import Kept, keep_within
from pyckpt.model import CkptCausalLM, CkptTransformer
from pyckpt.save import SAVE_SETS, Save
from pyckpt.stream import Stream
from pyckpt.swap import swap, unswap
from pyckpt.token_losses import token_losses

__all__ = [
    "SAVE_SETS",
    "CkptCausalLM",
    "CkptGenericBlock",
    "CkptTransformer",
    "CkptTransformerBlock",
    "ContextParallel",
    "Kept",
    "Save",
    "Stream",
    "__version__",
    "activation",
    "attention",
    "glu",
    "keep_within",
    "layer_norm",
    "linear_cross_entropy",
    "measure",
    "ops",
    "rms_norm",
    "rope",
    "swap",
    "token_losses",
    "unswap",
]
