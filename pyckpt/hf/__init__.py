"""Saving and loading `CkptCausalLM` in the form of Hugging Face transformers: safetensors and config.json."""

from pyckpt.hf.pretrained import load_pretrained, save_pretrained

__all__ = ["load_pretrained", "save_pretrained"]
