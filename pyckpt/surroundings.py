"""What a `CkptCausalLM` reads beside its blocks: embedding, final norm and head, which its loss does not call."""

from __future__ import annotations

from typing import Any

from torch import nn

from pyckpt.spec import BlockSpec

_NORMS: dict[str, type[nn.Module]] = {"rmsnorm": nn.RMSNorm, "layernorm": nn.LayerNorm}


def _runs(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """A call of it is one of these classes' own: FSDP2 gives a module a class that inherits it."""
    return type(module).forward in [kind.forward for kind in kinds] and "forward" not in vars(module)


def check_norm(norm: Any) -> None:
    """Raise ValueError where the final norm is none of PyTorch's: its parameters are read."""
    if not _runs(norm, nn.RMSNorm, nn.LayerNorm) or norm.weight is None:
        raise ValueError(
            f"model.norm is a {type(norm).__name__}, expected a torch.nn.RMSNorm or LayerNorm with a weight, which is "
            "read: another one would not be called"
        )


def check_head(head: Any) -> None:
    """Raise ValueError where the head is not the linear layer whose weight alone the loss reads."""
    if not _runs(head, nn.Linear) or head.bias is not None:
        bias = " with a bias" if getattr(head, "bias", None) is not None else ""
        raise ValueError(
            f"lm_head is a {type(head).__name__}{bias}, expected a torch.nn.Linear without one: the loss makes no "
            "logits, reads its weight alone, and would leave out anything else; merge adapters, or compute the loss of "
            "the logits, model(tokens)"
        )


def check_streamed(embedding: Any, norm: Any, spec: BlockSpec) -> None:
    """Raise ValueError where a streamed loss, which looks up rows and norms tile by tile, would compute others."""
    odd = [n for n in ("max_norm", "scale_grad_by_freq", "sparse") if getattr(embedding, n, None)]
    if not _runs(embedding, nn.Embedding) or odd:
        raise ValueError(
            f"model.embed_tokens is a {type(embedding).__name__}{f' with {odd[0]}' if odd else ''}, expected a plain "
            "torch.nn.Embedding: a streamed loss looks up rows of its weight, and calls nothing; merge adapters, or "
            "run without stream="
        )
    biased = spec.norm == "layernorm"
    if not _runs(norm, _NORMS[spec.norm]) or (getattr(norm, "bias", None) is not None) != biased:
        raise ValueError(
            f"model.norm is a {type(norm).__name__}, expected the {spec.norm} of the model's options in a streamed "
            "loss; run without stream="
        )
