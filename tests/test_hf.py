"""Models to and from Hugging Face transformers' files: the same numbers both ways, and clear errors for the rest."""

from __future__ import annotations

import copy
import json
import math
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from helpers import a_few, assert_exact, assert_within
from torch import Tensor, nn

from pyckpt import CkptCausalLM, CkptGenericBlock, CkptTransformerBlock, Stream
from pyckpt.hf import folder, load_pretrained, save_pretrained

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, which reads it then
transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

V = 61
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gqa": ("Llama", {}),
    "mha-tied": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "biases-of-attention": ("Llama", {"attention_bias": True}),
    "biases-of-the-mlp": ("Llama", {"mlp_bias": True, "head_dim": 12}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 256}),
    "linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "head-dim": ("Llama", {"head_dim": 14, "rms_norm_eps": 1e-5}),
    "geglu": ("Llama", {"hidden_act": "gelu"}),
    "geglu-tanh": ("Llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 5}),
    "mistral-window-of-one": ("Mistral", {"sliding_window": 1}),
    "mistral-uneven": ("Mistral", {"sliding_window": None, "hidden_size": 30, "head_dim": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0}),
    "qwen2-head-dim": ("Qwen2", {"head_dim": 12}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-biases": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen3-window-tied": (
        "Qwen3",
        {
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 0,
            "tie_word_embeddings": True,
        },
    ),
}
OWN: dict[str, dict[str, Any]] = {
    "layernorm": {"norm": "layernorm"},
    "gelu": {"mlp": "gelu"},
    "relu2-tied": {"mlp": "relu2", "tie_embeddings": True},
    "softcap": {"softcap": 5.0},
    "no-rope": {"rope_theta": None},
    "biases-window": {"bias": True, "window": 3},
    "biases-qk-norm": {"bias": True, "qk_norm": True},
    "biases-of-the-mlp-window": {"bias": "mlp", "window": 3},
    "biases-of-qkv-qk-norm": {"bias": "qkv", "qk_norm": True},
    "layernorm-rope": {"norm": "layernorm", "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
}

Model = nn.Module


def theirs(kind: str, **options: Any) -> Model:
    """A model of transformers in which no weight is at its initial one or zero."""
    config = getattr(transformers, f"{kind}Config")(**(SIZES | options))
    model = getattr(transformers, f"{kind}ForCausalLM")._from_config(config, attn_implementation="sdpa")
    randomize(model)
    return model.eval()


def ours(**options: Any) -> CkptCausalLM:
    model = CkptCausalLM(V, 2, 32, 4, **({"n_kv_heads": 2, "d_ff": 48} | options))
    randomize(model)
    return model


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        p.normal_(std=0.15)
        if "norm" in name and name.endswith("weight"):
            p += 1


def tokens(batch: int = 2, length: int = 24) -> Tensor:
    return torch.randint(0, V, (batch, length))


def exact(model: Model) -> Model:
    """The same model in float64 throughout: transformers has its norms and rotary angles in float32."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _norm64(module)
    model.model.rotary_emb.forward = _rotary64(model.config)
    return model


def _norm64(module: Any) -> Callable[[Tensor], Tensor]:
    eps = module.variance_epsilon
    return lambda x: module.weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def _rotary64(config: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    rope = config.rope_parameters
    dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)  # no field of a Qwen2
    frequencies = []
    for i in range(dim // 2):
        frequency = rope["rope_theta"] ** (-2 * i / dim)
        if rope["rope_type"] == "linear":
            frequency /= rope["factor"]
        elif rope["rope_type"] == "llama3":
            before = rope["original_max_position_embeddings"]
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            length = 2 * math.pi / frequency
            if length > before / low:
                frequency /= rope["factor"]
            elif length >= before / high:
                smooth = (before / length - low) / (high - low)
                frequency *= (1 - smooth) / rope["factor"] + smooth
        frequencies.append(frequency)
    inv = torch.tensor(frequencies, dtype=torch.float64)

    def forward(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = (position_ids[..., None].double() * inv).repeat(1, 1, 2)
        return angles.cos(), angles.sin()

    return forward


def results(model: Model, ids: Tensor) -> dict[str, Tensor]:
    """Logits, loss and the gradient of every parameter, by name."""
    model.zero_grad(set_to_none=True)
    if isinstance(model, CkptCausalLM):
        logits, loss = model(ids), model.loss(ids)
    else:
        logits = model(ids, use_cache=False).logits
        # Not its own loss, which is of the logits in float32.
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)), ids[:, 1:].flatten()
        )
    loss.backward()
    return {"logits": logits.detach(), "loss": loss.detach()} | {
        f"d{name}": p.grad for name, p in model.named_parameters()
    }


def errors(got: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors by name; those of all gradients of vectors together.

    Such a gradient is few numbers, each of them a sum over tokens that cancels, so that its own error is chance.
    """
    assert got.keys() == truth.keys()
    single: dict[str, float] = {}
    vectors: list[float] = []
    for name, want in truth.items():
        size = float(torch.linalg.vector_norm(got[name].double() - want) / torch.linalg.vector_norm(want))
        if want.dim() == 1:
            vectors.append(size)
        else:
            single[name] = size
    return single | {"gradients of vectors": math.hypot(*vectors) / len(vectors) ** 0.5}


def assert_as_good(got: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """Relative errors of at most twice those of transformers in the same dtype, plus the dtype's rounding."""
    reference = errors(plain, truth)
    for name, size in errors(got, truth).items():
        allowed = 2 * reference[name] + 2 * torch.finfo(got["logits"].dtype).eps
        assert_within(size, allowed, f"{name}: {size:.2e}, more than the {allowed:.2e} allowed")


def same_weights(a: Model, b: Model) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(x[n].dtype == y[n].dtype and torch.equal(x[n], y[n]) for n in x)


def auto(path: Path, **options: Any) -> Model:
    """What transformers loads, with nothing missing or left over."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


def edit(path: Path, change: dict[str, Any] | Callable[[dict[str, Any]], Any], name: str = "config.json") -> None:
    config = json.loads((path / name).read_text())
    if callable(change):
        change(config)
    else:
        config |= change
    (path / name).write_text(json.dumps({k: v for k, v in config.items() if v is not DROP}))


DROP = "<drop>"

# --- the same numbers, both ways ---


@pytest.mark.parametrize("name", MODELS)
def test_transformers_to_pyckpt_and_back(name: str, tmp_path: Path) -> None:
    kind, options = MODELS[name]
    reference = theirs(kind, **options)
    reference.save_pretrained(tmp_path / "theirs")
    model = load_pretrained(tmp_path / "theirs")
    assert same_weights(model, reference)
    ids = tokens()
    truth = results(exact(reference), ids)
    assert_as_good(results(model, ids), results(reference, ids), truth)
    torch.testing.assert_close(model.loss(ids), reference(ids, labels=ids).loss, rtol=1e-5, atol=1e-6)
    double = copy.deepcopy(model).double()
    assert_exact(double(ids).detach(), truth["logits"], terms=10.0)

    model.save_pretrained(tmp_path / "ours")
    back = auto(tmp_path / "ours")
    # Without a window a Mistral is a Llama.
    assert type(back).__name__ == ("LlamaForCausalLM" if name == "mistral" else f"{kind}ForCausalLM")
    assert same_weights(back, reference)
    assert torch.equal(back(ids).logits, reference(ids).logits)
    assert back.config.rope_parameters == reference.config.rope_parameters
    assert back.config.eos_token_id == reference.config.eos_token_id
    # transformers keeps our entry; its files are read all the same.
    back.save_pretrained(tmp_path / "again")
    assert load_pretrained(tmp_path / "again").config == model.config


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "Llama"),
        ({"tie_embeddings": True, "bias": True, "norm_eps": 1e-6}, "Llama"),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3, "mlp": "geglu"}, "Llama"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "Llama"),
        ({"bias": "attention"}, "Llama"),
        ({"bias": "mlp"}, "Llama"),
        ({"bias": "qkv"}, "Qwen2"),
        ({"bias": "qkv", "window": 4, "head_dim": 20, "tie_embeddings": True}, "Qwen2"),
        ({"bias": "attention", "qk_norm": True}, "Qwen3"),
        ({"window": 4}, "Mistral"),
        ({"window": (0, 9), "mlp": "geglu_tanh"}, "Mistral"),
        ({"qk_norm": True, "window": 3}, "Qwen3"),
        ({"qk_norm": True, "head_dim": 20, "tie_embeddings": True}, "Qwen3"),
    ],
)
def test_pyckpt_to_transformers_and_back(options: dict[str, Any], kind: str, tmp_path: Path) -> None:
    model = ours(**options)
    save_pretrained(model, tmp_path)
    reference = auto(tmp_path)
    assert type(reference).__name__ == f"{kind}ForCausalLM"
    assert same_weights(reference, model)
    ids = tokens()
    assert_as_good(results(model, ids), results(reference, ids), results(exact(reference), ids))
    loaded = load_pretrained(tmp_path)
    assert loaded.spec == model.spec
    assert same_weights(loaded, model)
    assert torch.equal(loaded.loss(ids), model.loss(ids))


def test_any_token_may_be_the_first_or_last(tmp_path: Path) -> None:
    """A Llama config that names no token ids has 1 and 2, and 2 would stop generating."""
    save_pretrained(ours(), tmp_path)
    config = auto(tmp_path).config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)


@pytest.mark.parametrize("name", OWN)
def test_what_transformers_lacks(name: str, tmp_path: Path) -> None:
    model = ours(**OWN[name])
    model.save_pretrained(tmp_path)
    loaded = CkptCausalLM.from_pretrained(tmp_path)
    assert loaded.spec == model.spec
    assert loaded.tie_embeddings == model.tie_embeddings
    assert same_weights(loaded, model)
    ids = tokens()
    assert torch.equal(loaded.loss(ids), model.loss(ids))
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["CkptCausalLM"]
    for auto_class in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):
        with pytest.raises(Exception, match=r"pyckpt|hidden_size"):
            auto_class.from_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_shards(tied: bool, tmp_path: Path) -> None:
    reference = theirs("Llama", tie_word_embeddings=tied)
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="15KB")
    assert not (tmp_path / "theirs" / folder.SINGLE).exists()
    model = load_pretrained(tmp_path / "theirs")
    assert same_weights(model, reference)
    save_pretrained(model, tmp_path / "ours", max_shard_bytes=15_000)
    shards = sorted((tmp_path / "ours").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    for shard in shards:
        assert sum(t.nbytes for t in safetensors.torch.load_file(shard).values()) <= 15_000
    assert same_weights(auto(tmp_path / "ours"), reference)
    assert same_weights(load_pretrained(tmp_path / "ours"), reference)
    save_pretrained(model, tmp_path / "tensors", max_shard_bytes=1)  # a file for each tensor
    written = len(list((tmp_path / "tensors").glob("model-*.safetensors")))
    assert written == len(list(model.parameters()))  # a tied head once
    assert same_weights(load_pretrained(tmp_path / "tensors"), reference)


def test_bfloat16(tmp_path: Path) -> None:
    reference = theirs("Llama").bfloat16()
    reference.save_pretrained(tmp_path / "theirs")
    model = load_pretrained(tmp_path / "theirs")
    assert same_weights(model, reference)
    ids = tokens()
    assert_as_good(results(model, ids), results(reference, ids), results(exact(reference), ids))
    save_pretrained(model, tmp_path / "ours")
    assert same_weights(auto(tmp_path / "ours"), reference)  # the dtype comes from config.json
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_dtypes_devices_and_options_of_a_load(tmp_path: Path) -> None:
    model = ours()
    model.model.norm.double()
    save_pretrained(model, tmp_path)
    state = torch.random.get_rng_state()
    loaded = load_pretrained(tmp_path, device="cpu", save="input", segments="sqrt", tile=8, tile_bytes=1 << 20)
    assert torch.equal(torch.random.get_rng_state(), state)  # random weights are not made first
    assert same_weights(loaded, model)  # each in its dtype
    assert {block.save for block in loaded.blocks} == {"input"}
    assert {(block.tile, block.tile_bytes) for block in loaded.blocks} == {(8, 1 << 20)}
    assert loaded.model.layers.segments == "sqrt"
    assert all(p.requires_grad and p.is_leaf for p in loaded.parameters())
    double = load_pretrained(tmp_path, dtype=torch.float64)
    assert {p.dtype for p in double.parameters()} == {torch.float64}
    with torch.device("meta"):
        assert load_pretrained(tmp_path).lm_head.weight.is_meta


def test_a_loaded_model_does_not_lean_on_its_files(tmp_path: Path) -> None:
    model = ours()
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    with (tmp_path / folder.SINGLE).open("r+b") as file:
        file.truncate(100)
    assert same_weights(loaded, model)


def test_a_tie_made_or_cut_by_hand_is_what_is_saved(tmp_path: Path) -> None:
    model = ours(tie_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)
    save_pretrained(model, tmp_path / "cut")
    assert same_weights(load_pretrained(tmp_path / "cut"), model)
    model = ours()
    model.lm_head.weight = model.model.embed_tokens.weight
    save_pretrained(model, tmp_path / "made")
    loaded = load_pretrained(tmp_path / "made")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_views_of_one_buffer_are_saved(tmp_path: Path) -> None:
    model = ours()
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    start = 0
    for p in model.parameters():
        p.data = flat[start : start + p.numel()].view(p.shape)
        start += p.numel()
    save_pretrained(model, tmp_path)
    assert same_weights(load_pretrained(tmp_path), model)


def test_extra_config_is_carried(tmp_path: Path) -> None:
    theirs("Llama", eos_token_id=[7, 9], max_position_embeddings=333).save_pretrained(tmp_path / "theirs")
    model = load_pretrained(tmp_path / "theirs")
    save_pretrained(model, tmp_path / "ours")
    config = auto(tmp_path / "ours").config
    assert (config.eos_token_id, config.max_position_embeddings) == ([7, 9], 333)
    model.extra_config = {"hidden_size": 3}
    with pytest.raises(ValueError, match=r"extra_config has 'hidden_size'; expected only bos_token_id"):
        save_pretrained(model, tmp_path / "ours")


def test_tokenizers_are_written(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2, ".": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    save_pretrained(ours(), tmp_path / "plain", tokenizer=tokenizer)
    assert Tokenizer.from_file(str(tmp_path / "plain" / "tokenizer.json")).encode("b a c").ids == [1, 0, 2]
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert loaded("b a c")["input_ids"] == [1, 0, 2]
    assert loaded.decode([0, 3]) == "a ."
    save_pretrained(ours(), tmp_path / "theirs", tokenizer=loaded)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")("b a c")["input_ids"] == [1, 0, 2]


@pytest.mark.parametrize("name", ["gqa", "biases", "qwen3"])
def test_a_layer_of_theirs_loads_into_a_block(name: str) -> None:
    kind, options = MODELS[name]
    layer = theirs(kind, **options).model.layers[1]
    block = CkptTransformerBlock(
        32,
        4,
        n_kv_heads=2,
        head_dim=options.get("head_dim"),
        d_ff=48,
        bias=name == "biases",
        qk_norm=name == "qwen3",
    )
    block.load_state_dict(layer.state_dict())
    assert same_weights(block, layer)


def test_files_are_as_readable_as_others(tmp_path: Path) -> None:
    save_pretrained(ours(), tmp_path)
    (tmp_path / "mine").touch()
    assert {p.stat().st_mode for p in tmp_path.iterdir()} == {(tmp_path / "mine").stat().st_mode}


# --- configs as others wrote them ---


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    theirs("Llama").save_pretrained(path)
    return path


@pytest.fixture
def checkpoint(llama: Path, tmp_path: Path) -> Path:
    """A Llama of transformers, to be spoilt."""
    return Path(shutil.copytree(llama, tmp_path / "checkpoint"))


def test_configs_of_transformers_4(checkpoint: Path) -> None:
    edit(checkpoint, {"rope_parameters": DROP, "dtype": DROP, "head_dim": DROP, "torch_dtype": "float32"})
    edit(checkpoint, {"rope_theta": 70000.0, "rope_scaling": {"type": "linear", "factor": 2.0}})
    spec = load_pretrained(checkpoint).spec
    assert (spec.rope_theta, spec.head_dim) == (70000.0, 8)
    assert spec.rope_scaling == (("rope_type", "linear"), ("factor", 2.0))
    edit(checkpoint, {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}})
    spec = load_pretrained(checkpoint).spec
    assert spec.rope_theta == 70000.0
    assert dict(spec.rope_scaling or ())["original_max_position_embeddings"] == 32
    edit(checkpoint, {"rope_scaling": None})
    assert load_pretrained(checkpoint).spec.rope_scaling is None


def test_ours_has_the_entries_that_transformers_4_reads(tmp_path: Path) -> None:
    scaling = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    save_pretrained(ours(rope_theta=5e5, rope_scaling=scaling), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"]) == (5e5, scaling)
    assert config["rope_parameters"] == LLAMA3
    assert config["max_position_embeddings"] == 32 * 8


def test_entries_that_are_not_there_are_transformers_defaults(checkpoint: Path) -> None:
    for key in ("rope_parameters", "rms_norm_eps", "hidden_act", "attention_bias", "mlp_bias", "tie_word_embeddings"):
        edit(checkpoint, {key: DROP})
    model = load_pretrained(checkpoint)
    assert (model.spec.rope_theta, model.spec.norm_eps, model.spec.mlp) == (10000.0, 1e-6, "swiglu")
    edit(checkpoint, {"model_type": "mistral", "architectures": DROP})
    assert load_pretrained(checkpoint).spec.window == (4095, 0)


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_token_ids_that_are_not_there_are_transformers_defaults(kind: str, tmp_path: Path) -> None:
    theirs(kind, head_dim=8).save_pretrained(tmp_path / "theirs")
    keys = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "initializer_range")
    edit(tmp_path / "theirs", dict.fromkeys(keys, DROP))
    save_pretrained(load_pretrained(tmp_path / "theirs"), tmp_path / "ours")
    before, after = (transformers.AutoConfig.from_pretrained(tmp_path / name) for name in ("theirs", "ours"))
    assert [getattr(after, key) for key in keys] == [getattr(before, key) for key in keys]


def test_layer_types_of_a_mistral_that_agree_with_its_window(tmp_path: Path) -> None:
    """With them AutoModel takes it for a Ministral."""
    theirs("Mistral", sliding_window=5).save_pretrained(tmp_path)
    edit(tmp_path, {"layer_types": ["sliding_attention"] * 2})
    reference, ids = auto(tmp_path), tokens()
    torch.testing.assert_close(load_pretrained(tmp_path)(ids), reference(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("token", [5, -1])
def test_the_embedding_of_padding_is_not_trained(token: int, tied: bool, tmp_path: Path) -> None:
    reference = theirs("Llama", pad_token_id=token, tie_word_embeddings=tied)
    reference.save_pretrained(tmp_path)
    model, ids = load_pretrained(tmp_path), tokens()
    ids[:, 3] = token % V
    truth = results(exact(reference), ids)
    assert_as_good(results(model, ids), results(reference, ids), truth)
    model.zero_grad()
    model.loss(ids, stream=Stream(tile=7)).backward()
    got = model.model.embed_tokens.weight.grad
    torch.testing.assert_close(got, truth["dmodel.embed_tokens.weight"].float(), rtol=1e-4, atol=1e-6)


def test_a_padding_token_out_of_range_is_none(checkpoint: Path) -> None:
    edit(checkpoint, {"pad_token_id": V})
    assert load_pretrained(checkpoint).model.embed_tokens.padding_idx is None


def test_buffers_of_old_files_are_ignored(checkpoint: Path) -> None:
    change(checkpoint, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    load_pretrained(checkpoint)


def test_dropout_is_read_and_written(checkpoint: Path, tmp_path: Path) -> None:
    """transformers knows the rate on attention's probabilities; that on the residual branches is ours alone."""
    edit(checkpoint, {"attention_dropout": 0.1})
    model = load_pretrained(checkpoint)
    assert (model.spec.dropout, model.spec.attention_dropout) == (0.0, 0.1)
    ours = CkptCausalLM(17, 1, d_model=16, n_heads=2, dropout=0.2, attention_dropout=0.3)
    ours.save_pretrained(tmp_path / "ours")
    again = load_pretrained(tmp_path / "ours")
    assert (again.spec.dropout, again.spec.attention_dropout) == (0.2, 0.3)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "phi3"}, r"model_type is 'phi3', expected one of llama, mistral, qwen2, qwen3"),
    ({"model_type": DROP}, r"model_type is None"),
    ({"model_type": ["llama"]}, r"model_type is \['llama'\]"),
    ({"model_type": "pyckpt"}, r"'pyckpt' is None, expected the arguments"),
    ({"architectures": ["LlamaForSequenceClassification"]}, r"architectures is .*other heads are not read"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, r"'yarn', expected default, linear"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, r"factor is None, expected a positive number"),
    ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, r"factor is '2', expected a positive number"),
    ({"attention_dropout": 1.5}, r"attention_dropout must be a number in \[0, 1\), got 1.5"),
    ({"rope_parameters": LLAMA3 | {"factor": 0}}, r"factor is 0, expected a positive number"),
    ({"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, r"low_freq_factor must be below"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, r"one flat object for all layers"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, r"0\.5, expected 1: .* whole heads"),
    ({"partial_rotary_factor": 0.25}, r"0\.25, expected 1: .* whole heads"),
    ({"rope_theta": 5e5}, r"rope_theta is 500000.0 and rope_parameters has 10000.0"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"they disagree"),
    ({"hidden_act": "relu"}, r"hidden_act is 'relu', expected one of silu"),
    ({"pretraining_tp": 2}, r"pretraining_tp is 2, expected 1"),
    ({"quantization_config": {"quant_method": "gptq"}}, r"quantized weights are not read"),
    ({"is_causal": False}, r"expected a causal model"),
    ({"is_causal": None}, r"is_causal is None, expected a causal model"),  # which for transformers is not one
    ({"num_attention_heads": 3}, r"n_heads=3 is not a multiple of n_kv_heads=2"),
    ({"hidden_size": DROP}, r"hidden_size is None, expected a positive whole number"),
    ({"vocab_size": "61"}, r"vocab_size is '61', expected a positive whole number"),
    ({"num_hidden_layers": 0}, r"num_hidden_layers is 0, expected a positive whole number"),
    ({"rms_norm_eps": -1.0}, r"rms_norm_eps is -1\.0, expected a positive number"),
    ({"tie_word_embeddings": "no"}, r"tie_word_embeddings is 'no', expected true or false"),
    (
        {"model_type": "mistral", "architectures": None, "sliding_window": 0},
        r"sliding_window is 0, expected a positive",
    ),
    (
        {"model_type": "mistral", "architectures": None, "layer_types": ["full_attention", "sliding_attention"]},
        r"expected all 'full_attention' or all 'sliding_attention'",
    ),
    (
        {"model_type": "mistral", "architectures": None, "layer_types": ["full_attention"] * 2},
        r"layer_types is .* and sliding_window is 4096: .* make them agree",
    ),
    (
        {"model_type": "qwen3", "architectures": None, "layer_types": ["full_attention", "sliding_attention"]},
        r"expected all 'full_attention' or all 'sliding_attention'",
    ),
    (
        {"model_type": "qwen3", "architectures": None, "layer_types": ["sliding_attention"] * 2},
        r"layer_types asks for sliding attention, but",
    ),
    (
        {"model_type": "qwen3", "architectures": None, "use_sliding_window": True, "max_window_layers": 1},
        r"expected all 'full_attention' or all 'sliding_attention'",
    ),
    (
        {"model_type": "qwen2", "architectures": None, "use_sliding_window": True, "max_window_layers": 1},
        r"expected all 'full_attention' or all",
    ),
]


@pytest.mark.parametrize(
    ("change_of_config", "message"), REFUSED, ids=lambda v: next(iter(v)) if isinstance(v, dict) else ""
)
def test_configs_that_no_block_computes(change_of_config: dict[str, Any], message: str, checkpoint: Path) -> None:
    edit(checkpoint, change_of_config)
    with pytest.raises(ValueError, match=message) as caught:
        load_pretrained(checkpoint)
    assert str(checkpoint / "config.json") in str(caught.value)


OWN_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"layer_scale": 0.1}, r"'pyckpt' has 'layer_scale', which this version of pyckpt does not know"),
    ({"vocab_size": DROP}, r"vocab_size is None"),
    ({"bias": "no"}, r"bias must be True, False, or one of qkv, attention, mlp, got 'no'"),
    ({"mlp": "swish"}, r"arguments that make no model: mlp='swish' does not exist"),
    ({"softcap": "5"}, r"arguments that make no model"),
    ({"rope_scaling": "linear"}, r"arguments that make no model"),
]


@pytest.mark.parametrize(("change_of_entry", "message"), OWN_REFUSED)
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_spoilt_arguments_of_our_own(norm: str, change_of_entry: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_pretrained(ours(norm=norm), tmp_path)

    def spoil(config: dict[str, Any]) -> None:
        entry = config["pyckpt"] | change_of_entry
        config["pyckpt"] = {k: v for k, v in entry.items() if v is not DROP}

    edit(tmp_path, spoil)
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


def test_entries_that_disagree(tmp_path: Path) -> None:
    save_pretrained(ours(), tmp_path)
    edit(tmp_path, {"hidden_act": "gelu", "rms_norm_eps": 1e-3})
    with pytest.raises(ValueError, match=r"disagree on norm_eps, mlp: .* Remove 'pyckpt' to go by the others"):
        load_pretrained(tmp_path)
    edit(tmp_path, {"pyckpt": DROP})
    assert load_pretrained(tmp_path).spec.mlp == "geglu"


# --- files that are not whole ---


def change(path: Path, spoil: Callable[[dict[str, Tensor]], Any], name: str = folder.SINGLE) -> None:
    tensors = safetensors.torch.load_file(path / name)
    spoil(tensors)
    safetensors.torch.save_file(tensors, path / name, metadata={"format": "pt"})


def test_files_cut_short(checkpoint: Path) -> None:
    file = checkpoint / folder.SINGLE
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for size in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, (header + len(data)) // 2, len(data) - 1):
        file.write_bytes(data[:size])
        with pytest.raises(RuntimeError, match=rf"model\.safetensors \({size} bytes\) is not a whole safetensors file"):
            load_pretrained(checkpoint)
    file.write_bytes(data)
    load_pretrained(checkpoint)


@pytest.mark.parametrize(
    "content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b"\xff" * 99]
)
def test_files_that_are_something_else(content: bytes, checkpoint: Path) -> None:
    (checkpoint / folder.SINGLE).write_bytes(content)
    with pytest.raises(RuntimeError, match=r"is not a whole safetensors file.*Git LFS pointer; fetch or save"):
        load_pretrained(checkpoint)


@pytest.mark.parametrize("content", ["", "{", '{"model_type": ', "[]", "3", "\ud800"])
def test_config_that_is_no_json_object(content: str, checkpoint: Path) -> None:
    (checkpoint / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(RuntimeError, match=r"config\.json (can't be read as JSON|holds a \w+, expected a JSON object)"):
        load_pretrained(checkpoint)


def test_folders_that_are_no_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not there; give a folder .* Hub must be downloaded first"):
        load_pretrained("nobody/nothing")
    with pytest.raises(ValueError, match=r"is a file; give a folder"):
        load_pretrained(checkpoint / "config.json")
    (checkpoint / folder.SINGLE).rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(RuntimeError, match=r"it has pytorch_model\.bin, which is not read.*safe_serialization=True"):
        load_pretrained(checkpoint)
    (checkpoint / "pytorch_model.bin").unlink()
    with pytest.raises(RuntimeError, match=r"has neither model\.safetensors nor .*; fetch or save"):
        load_pretrained(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(RuntimeError, match=r"has no config\.json"):
        load_pretrained(checkpoint)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"does not fit its config\.json\. missing: model\.norm\.weight"),
        (lambda t: t.pop("lm_head.weight"), r"missing: lm_head\.weight"),
        (lambda t: t.update({"score.weight": torch.ones(2)}), r"not expected: score\.weight"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(31)}),
            r"of another shape: model\.norm\.weight is \(31,\), expected \(32,\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
            r"model\.norm\.weight is I8, expected F64, F32, BF16, F16\. Quantized",
        ),
        (lambda t: [t.pop(n) for n in list(t) if "layers.1" in n], r"missing: .*, .*, .*, .* and 5 more\. The files"),
    ],
)
def test_weights_that_do_not_fit(spoil: Callable[[dict[str, Tensor]], Any], message: str, checkpoint: Path) -> None:
    change(checkpoint, spoil)
    with pytest.raises(RuntimeError, match=message):
        load_pretrained(checkpoint)


def test_a_config_of_another_model(checkpoint: Path) -> None:
    edit(checkpoint, {"intermediate_size": 64, "vocab_size": 62})
    with pytest.raises(RuntimeError, match=r"lm_head\.weight is \(61, 32\), expected \(62, 32\)|and 4 more"):
        load_pretrained(checkpoint)


def test_a_tied_head_that_is_in_the_file(checkpoint: Path) -> None:
    edit(checkpoint, {"tie_word_embeddings": True})
    with pytest.raises(RuntimeError, match=r"says tie_word_embeddings, but .* differ"):
        load_pretrained(checkpoint)
    change(checkpoint, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = load_pretrained(checkpoint)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_shards_that_are_not_whole(tmp_path: Path) -> None:
    save_pretrained(ours(), tmp_path / "whole", max_shard_bytes=15_000)
    count = len(list((tmp_path / "whole").glob("model-*.safetensors")))

    def spoilt(do: Callable[[Path], Any], message: str) -> None:
        path = Path(shutil.copytree(tmp_path / "whole", tmp_path / "spoilt"))
        do(path)
        with pytest.raises(RuntimeError, match=message):
            load_pretrained(path)
        shutil.rmtree(path)

    first, second = (folder.shard_name(i, count) for i in range(2))
    spoilt(lambda p: (p / first).unlink(), rf"names {count} shards, and {first} .* not there; fetch the missing")
    spoilt(lambda p: os.truncate(p / second, 3000), rf"{second} \(3000 bytes\) is not a whole safetensors file")
    spoilt(lambda p: shutil.copy(p / first, p / second), r"do not hold the same tensors: .* fetch or save")
    spoilt(lambda p: change(p, lambda t: t.popitem(), first), r"do not hold the same tensors: .* fetch or save")

    def twice(path: Path) -> None:
        """A tensor of the first shard in the second one too, with other numbers."""
        name, t = next(iter(safetensors.torch.load_file(path / first).items()))
        change(path, lambda tensors: tensors.update({name: t + 1}), second)

    spoilt(twice, r"do not hold the same tensors: .* or in another shard")
    spoilt(lambda p: (p / folder.INDEX).write_text("{"), r"index\.json can't be read as JSON")
    spoilt(lambda p: (p / folder.INDEX).write_text("{}"), r"has no weight_map from tensor names")
    outside = json.dumps({"weight_map": {"a": "../model.safetensors"}})
    spoilt(lambda p: (p / folder.INDEX).write_text(outside), r"names the shard '\.\./model\.safetensors', expected")


def test_adapters_in_the_folder_are_not_read(checkpoint: Path) -> None:
    """transformers would load them into the model."""
    (checkpoint / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has adapter_config\.json, and adapters are not read: .* Merge them"):
        load_pretrained(checkpoint)


# --- models that can't be saved, and arguments that are wrong ---


def test_arguments_that_are_wrong(tmp_path: Path) -> None:
    model = ours()
    save_pretrained(model, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(TypeError, match=r"model is a Linear, expected a CkptCausalLM"):
        save_pretrained(nn.Linear(2, 2), tmp_path)  # type: ignore[arg-type]
    for limit in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=r"max_shard_bytes must be a positive int"):
            save_pretrained(model, tmp_path, max_shard_bytes=limit)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"tokenizer is a str, expected a tokenizers\.Tokenizer"):
        save_pretrained(model, tmp_path, tokenizer="tokenizer.json")
    with pytest.raises(ValueError, match=r"config\.json is a file; give the name of a folder"):
        save_pretrained(model, tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"dtype is torch\.int8, expected None or one of float32"):
        load_pretrained(tmp_path, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"save='nothing' does not exist"):
        load_pretrained(tmp_path, save="nothing")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_models_that_were_changed(tmp_path: Path) -> None:
    model = ours()
    model.model.layers[0].self_attn.q_proj.extra = nn.Parameter(torch.ones(2))
    with pytest.raises(RuntimeError, match=r"built with: model\.layers\.0\.self_attn\.q_proj\.extra added, missing or"):
        save_pretrained(model, tmp_path / "m")
    model = ours()
    model.lm_head = nn.Linear(32, V + 1, bias=False)
    with pytest.raises(RuntimeError, match=r"lm_head\.weight added, missing or of another shape"):
        save_pretrained(model, tmp_path / "m")
    model = ours()
    model.model.layers[1] = CkptGenericBlock(nn.Identity(), nn.Identity(), 32, 4)
    with pytest.raises(RuntimeError, match=r"blocks are not the ones it was built with"):
        save_pretrained(model, tmp_path / "m")
    model = ours()
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(RuntimeError, match=r"layers\.0\.\S+ and model\.layers\.1\.\S+ are one parameter"):
        save_pretrained(model, tmp_path / "m")
    with pytest.raises(RuntimeError, match=r"on meta, expected a plain tensor .* with data"):
        save_pretrained(CkptCausalLM(V, 2, 32, 4, device="meta"), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_safetensors_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(RuntimeError, match=r"needs safetensors.*pip install 'pyckpt\[hf\]'"):
        save_pretrained(ours(), tmp_path / "m")
    with pytest.raises(RuntimeError, match=r"pip install 'pyckpt\[hf\]'"):
        load_pretrained(tmp_path)
    assert not (tmp_path / "m").exists()


# --- saves that are stopped ---

SHARDED, WHOLE = 40_000, 10**9
KINDS = [(WHOLE, WHOLE), (WHOLE, SHARDED), (SHARDED, WHOLE), (SHARDED, SHARDED)]


class Killed(BaseException):
    """What ends a process: nothing it would still do happens."""


class Disk:
    """Lets so many changes of names through. What comes then fails: once, or it and all that follows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.done = 0

    def fail(self, at: int, what: BaseException, for_good: bool) -> None:
        self.done = 0
        for owner, name in ((os, "replace"), (pathlib.Path, "unlink"), (pathlib.Path, "mkdir"), (shutil, "rmtree")):
            self.monkeypatch.setattr(owner, name, self._counted(getattr(owner, name), at, what, for_good))

    def _counted(self, fn: Callable[..., Any], at: int, what: BaseException, for_good: bool) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self.done += 1
            if self.done - 1 == at or (for_good and self.done > at):
                if isinstance(what, OSError) and kwargs.get("ignore_errors"):
                    return None
                raise what
            return fn(*args, **kwargs)

        return wrapper

    def mend(self) -> None:
        self.monkeypatch.undo()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    yield Disk(monkeypatch)


def old_and_new() -> tuple[CkptCausalLM, CkptCausalLM]:
    """Two models of which no file can be mistaken for the other's: sizes, names and config differ."""
    return ours(), CkptCausalLM(V, 2, 40, 4, d_ff=48, bias=True, tie_embeddings=True, rope_theta=5e5)


def whole(path: Path, old: CkptCausalLM, new: CkptCausalLM) -> CkptCausalLM:
    """The one of the two that the folder holds."""
    found = load_pretrained(path)
    (model,) = (m for m in (old, new) if m.spec == found.spec and same_weights(m, found))
    return model


def whole_for_all(path: Path, old: CkptCausalLM, new: CkptCausalLM) -> CkptCausalLM:
    """`whole`, and transformers reads the same one or nothing."""
    model = whole(path, old, new)
    if (path / "config.json").exists():
        assert same_weights(auto(path), model)
    else:
        with pytest.raises((OSError, ValueError)):
            auto(path)
    return model


@pytest.mark.parametrize("kinds", a_few(KINDS, always=(1, 2)))
@pytest.mark.parametrize("for_good", a_few([False, True], always=(1,)), ids=["failing-once", "killed"])
def test_a_save_that_stops_anywhere(kinds: tuple[int, int], for_good: bool, disk: Disk, tmp_path: Path) -> None:
    before, after = kinds
    old, new = old_and_new()
    save_pretrained(old, tmp_path / "old", max_shard_bytes=before)
    (tmp_path / "old" / "notes.txt").write_text("mine")
    save_pretrained(new, tmp_path / "new", max_shard_bytes=after)
    files = {p.name for p in (tmp_path / "new").iterdir()} | {"notes.txt"}
    seen, stopped, at = [], True, 0
    while stopped:
        path = Path(shutil.copytree(tmp_path / "old", tmp_path / f"at-{at}"))
        disk.fail(at, Killed() if for_good else OSError(28, "no space left"), for_good)
        try:
            save_pretrained(new, path, max_shard_bytes=after)
        except (Killed, RuntimeError):
            stopped = True
        else:
            stopped = disk.done > at  # a failure to clean up is none
        disk.mend()
        seen.append(whole_for_all(path, old, new))
        # The next save makes everything good, also one of the other model.
        last = old if at % 2 else new
        save_pretrained(last, path, max_shard_bytes=after)
        assert whole(path, old, new) is last
        if last is new:
            assert {p.name for p in path.iterdir()} == files
        at += 1
    assert seen[0] is old
    assert seen[-1] is new
    assert seen == sorted(seen, key=lambda model: model is new)  # never back again


def test_every_replace_that_fails(disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = old_and_new()
    replace, calls = os.replace, 0
    for at in range(99):
        path = tmp_path / f"at-{at}"
        save_pretrained(old, path)
        calls = 0

        def failing(*args: Any, at: int = at) -> None:
            nonlocal calls
            calls += 1
            if calls > at:
                raise OSError(5, "Input/output error")
            replace(*args)

        monkeypatch.setattr(os, "replace", failing)
        if calls == 0 and at == 0:
            with pytest.raises(RuntimeError, match=r"could not be written to .* What was there before is untouched"):
                save_pretrained(new, path)
            assert whole(path, old, new) is old
            assert {p.name for p in path.iterdir()} == {"config.json", folder.SINGLE}
        else:
            try:
                save_pretrained(new, path)
            except RuntimeError as error:
                assert "is complete in" in str(error)
                assert "saving to the same folder again" in str(error)
            else:
                break
            assert whole(path, old, new) is new
        monkeypatch.setattr(os, "replace", replace)
    assert at == 3  # the folder, the weights, config.json


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = old_and_new()
    save_pretrained(old, tmp_path)

    def full(tensors: Any, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(RuntimeError, match=r"could not be written .*No space left.* untouched: make room"):
        save_pretrained(new, tmp_path)
    monkeypatch.undo()
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", folder.SINGLE}
    assert whole(tmp_path, old, new) is old


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks on Windows")
def test_two_writers_into_one_folder(tmp_path: Path) -> None:
    old, new = old_and_new()
    save_pretrained(old, tmp_path)
    with pytest.raises(Killed), folder.saving(tmp_path) as staging:
        (staging / "half").touch()
        with pytest.raises(RuntimeError, match=r"another process is saving to .* now: wait"):
            save_pretrained(new, tmp_path)
        assert (staging / "half").exists()
        assert whole(tmp_path, old, new) is old  # those who read need no lock
        raise Killed
    save_pretrained(new, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", folder.SINGLE}


def test_a_folder_that_others_wrote_to_after_a_stopped_save(disk: Disk, tmp_path: Path) -> None:
    """config.json beside a finished save is newer than it, so it counts."""
    old, new = old_and_new()
    disk.fail(3, Killed(), True)
    with pytest.raises(Killed):
        save_pretrained(new, tmp_path)
    disk.mend()
    assert (tmp_path / folder.FINISHED).is_dir()
    assert whole(tmp_path, old, new) is new
    reference = theirs("Llama")
    reference.save_pretrained(tmp_path)
    assert same_weights(load_pretrained(tmp_path), reference)
    save_pretrained(old, tmp_path)
    assert whole(tmp_path, old, new) is old
    assert not (tmp_path / folder.FINISHED).exists()
