"""`save_pretrained` and `load_pretrained`: a `CkptCausalLM` to and from a folder as transformers has it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyckpt import errors
from pyckpt.block import CkptTransformerBlock
from pyckpt.exec.tiling import TILE_BYTES
from pyckpt.hf import folder, weights
from pyckpt.hf.config import Arguments, arguments_of, carried_of, from_config, to_config
from pyckpt.hf.weights import listed
from pyckpt.model import CkptCausalLM, Segments
from pyckpt.save import Save, SaveSet

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ADAPTER = "adapter_config.json"
MAX_SHARD_BYTES = 5_000_000_000
# A buffer in files of old versions of transformers, which computes it now, as we do.
_IGNORED = "rotary_emb.inv_freq"

# --- saving ---


def save_pretrained(
    model: CkptCausalLM,
    path: str | os.PathLike[str],
    tokenizer: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config.json and the weights, in the dtypes they have, into the folder `path`.

    transformers loads it as a Llama, a Mistral (sliding window), a Qwen2 (bias="qkv") or a Qwen3 (qk_norm). A model
    that none of them computes is written too, in a form that `load_pretrained` reads and transformers refuses.
    `model.extra_config` gives the token ids and max_position_embeddings in config.json.

    A checkpoint that is there already is replaced when the new one is complete; whenever this stops, one of
    the two is whole and `load_pretrained` loads it. Needs room for both. Other files in the folder stay.

    tokenizer: a `tokenizers.Tokenizer` or a transformers tokenizer to write beside the model.
    max_shard_bytes: larger models are split into files of at most so many bytes, with an index.

    Raises TypeError and ValueError for other arguments, RuntimeError for models that are not as they were
    built and for files that can't be written; nothing in the folder is changed then, unless the message says so.
    """
    weights.require_safetensors()
    if not isinstance(model, CkptCausalLM):
        raise TypeError(
            f"model is a {type(model).__name__}, expected a CkptCausalLM (for a wrapped one, the inner model)"
        )
    max_shard_bytes = errors.positive_int("max_shard_bytes", max_shard_bytes)
    _check_tokenizer(tokenizer)
    tensors = _tensors(model)
    config = to_config(arguments_of(model), _widest([t.dtype for t in tensors.values()]), model.extra_config)
    with folder.saving(Path(path)) as new:
        if tokenizer is not None:
            _write_tokenizer(tokenizer, new)
        weights.write(new, tensors, max_shard_bytes)
        folder.write_json(new / folder.CONFIG, config)


def _tensors(model: CkptCausalLM) -> dict[str, Tensor]:
    """The tensors to write, by name, a tied head once; checked to be those of the model's arguments."""
    if any(not isinstance(b, CkptTransformerBlock) or b.spec != model.spec for b in model.model.layers):
        raise RuntimeError(
            "the model's blocks are not the ones it was built with; only a model of equal blocks is saved"
        )
    arguments = arguments_of(model)
    found: dict[str, Tensor] = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    differing = sorted({name for name, _ in _shapes(found) ^ _shapes(_skeleton(arguments).state_dict())})
    if differing:
        raise RuntimeError(
            f"the model's parameters are not the ones it was built with: {listed(differing)} added, missing or of "
            "another shape. Merge adapters and remove parametrizations first"
        )
    for name, t in found.items():
        if t.is_meta or type(t) not in (nn.Parameter, Tensor) or t.dtype not in errors.FLOAT_DTYPES:
            raise RuntimeError(
                f"{name} is a {type(t).__name__} of {t.dtype} on {t.device}, expected a plain tensor of one of "
                f"{errors.names(errors.FLOAT_DTYPES)} with data; gather sharded parameters first"
            )
    if arguments["tie_embeddings"]:
        del found[HEAD]
    _check_single(found)
    return found


def _check_single(tensors: dict[str, Tensor]) -> None:
    """Raise RuntimeError where two names are one parameter: a model that is loaded has two."""
    names: dict[int, str] = {}
    for name, t in tensors.items():
        first = names.setdefault(id(t), name)
        if first != name:
            raise RuntimeError(
                f"{first} and {name} are one parameter, and files keep no tie but that of the embeddings; give the "
                "second one its own, a copy of the first"
            )


def _shapes(tensors: dict[str, Tensor]) -> set[tuple[str, tuple[int, ...]]]:
    return {(name, tuple(t.shape)) for name, t in tensors.items()}


def _skeleton(arguments: Arguments, **options: Any) -> CkptCausalLM:
    """A model without data."""
    with torch.device("meta"):
        return CkptCausalLM(**arguments, **options)


def _widest(dtypes: list[torch.dtype]) -> torch.dtype:
    """The dtype that holds all of these without loss."""
    widest = dtypes[0]
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


def _check_tokenizer(tokenizer: Any) -> None:
    if tokenizer is not None and not (hasattr(tokenizer, "save_pretrained") or hasattr(tokenizer, "to_str")):
        raise TypeError(
            f"tokenizer is a {type(tokenizer).__name__}, expected a tokenizers.Tokenizer or a transformers tokenizer"
        )


def _write_tokenizer(tokenizer: Any, new: Path) -> None:
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(str(new))
        return
    (new / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    # By default transformers 4 takes spaces out of the decoded text that tokenizers leaves in.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    folder.write_json(new / "tokenizer_config.json", settings)


# --- loading ---


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    save: str | SaveSet | Save = "attention",
    segments: Segments = None,
    tile: int | None = None,
    tile_bytes: int = TILE_BYTES,
) -> CkptCausalLM:
    """The model in a folder that `save_pretrained` wrote, or transformers from a Llama, Mistral, Qwen2 or Qwen3.

    device: default PyTorch's. dtype: float32, float64, bfloat16 or float16; default: as in the files.
    save, segments, tile, tile_bytes: as for `CkptCausalLM`. Tensors are copied one by one: memory is the model's own.
    As in transformers, the embedding of config.json's pad_token_id is not trained (`padding_idx` of nn.Embedding).

    Raises ValueError for a config.json that a CkptCausalLM does not compute exactly and for a folder with adapters,
    RuntimeError for files that are missing, damaged or do not fit the config.
    """
    weights.require_safetensors()
    errors.check_dtype("dtype", dtype)
    root = Path(path)
    config_path, weights_path = _find(root)
    config = folder.read_json(config_path)
    arguments = from_config(config, str(config_path))
    model = _skeleton(arguments, save=save, segments=segments, tile=tile, tile_bytes=tile_bytes)
    device = torch.get_default_device() if device is None else torch.device(device)
    with weights.open_weights(root, weights_path) as files:
        names = _check_tensors(model, files, weights_path)
        tensors = {name: _copy(files.read(name), device, dtype) for name in names}
        if HEAD in files.shapes and HEAD not in names:
            _check_tied(files.read(HEAD), files.read(EMBEDDING), config_path)
    _fill(model, tensors)
    model.model.embed_tokens.padding_idx = _padding_row(config.get("pad_token_id"), model.vocab_size)
    model.extra_config = carried_of(config)
    return model


def _find(root: Path) -> tuple[Path, Path]:
    """config.json, and the single file of weights or the index."""
    if not root.is_dir():
        raise ValueError(
            f"{root} is {'a file' if root.exists() else 'not there'}; give a folder with config.json and "
            f"{folder.SINGLE}. Models on the Hugging Face Hub must be downloaded first"
        )
    if (root / ADAPTER).is_file():
        raise ValueError(
            f"{root} has {ADAPTER}, and adapters are not read: transformers would add them to the model. Merge them "
            "(merge_and_unload of PEFT) and save the model again, or, for the model without them, move that file away"
        )
    config, found = folder.locate(root, folder.CONFIG), folder.locate_weights(root)
    if config is None:
        raise RuntimeError(f"{root} has no {folder.CONFIG}; give a folder that save_pretrained wrote")
    if found is None:
        other = sorted(p.name for pattern in ("pytorch_model*", "*.pth", "*.gguf") for p in root.glob(pattern))
        raise RuntimeError(
            f"{root} has neither {folder.SINGLE} nor {folder.INDEX}; "
            + (
                f"it has {listed(other)}, which is not read. Load it with transformers and save it as safetensors: "
                "model.save_pretrained(folder, safe_serialization=True)"
                if other
                else "fetch or save the checkpoint again"
            )
        )
    return config, found


def _check_tensors(model: CkptCausalLM, files: weights.WeightFiles, path: Path) -> list[str]:
    """The names of the tensors to read, after a look at the headers."""
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    optional = {HEAD} if model.tie_embeddings else set()
    found = {name: shape for name, shape in files.shapes.items() if not name.endswith(_IGNORED)}
    missing = [name for name in expected if name not in found and name not in optional]
    unexpected = [name for name in found if name not in expected]
    shapes = [f"{n} is {found[n]}, expected {s}" for n, s in expected.items() if n in found and found[n] != s]
    problems = [("missing", missing), ("not expected", unexpected), ("of another shape", shapes)]
    if missing or unexpected or shapes:
        raise RuntimeError(
            f"{path} does not fit its config.json. "
            + "; ".join(f"{what}: {listed(names)}" for what, names in problems if names)
            + ". The files are of different models or the config was changed; fetch or save the checkpoint again"
        )
    odd = [f"{name} is {files.dtypes[name]}" for name in found if files.dtypes[name] not in weights.DTYPES]
    if odd:
        raise RuntimeError(
            f"{path}: {listed(odd)}, expected {', '.join(weights.DTYPES)}. Quantized weights are not read: dequantize "
            "the model and save it again"
        )
    return [name for name in expected if name not in optional]


def _copy(t: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    # Not the tensor itself: it is a view of the file, which may be replaced.
    return torch.empty(t.shape, dtype=dtype or t.dtype, device=device).copy_(t)


def _check_tied(head: Tensor, embedding: Tensor, config: Path) -> None:
    if head.dtype != embedding.dtype or not torch.equal(head, embedding):
        raise RuntimeError(
            f"{config} says tie_word_embeddings, but {HEAD} and {EMBEDDING} differ in the weights. Set it to false to "
            f"keep both, or remove {HEAD}"
        )


def _fill(model: CkptCausalLM, tensors: dict[str, Tensor]) -> None:
    for name, t in tensors.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(t))
    if model.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def _padding_row(token: Any, vocab: int) -> int | None:
    """The row of this token; None if there is none. A negative one counts from the end, as in nn.Embedding."""
    if not isinstance(token, int) or isinstance(token, bool) or not -vocab <= token < vocab:
        return None
    return token % vocab
