"""Streamed runs over layers whose weights FSDP2 gathers one at a time: the bits of a run over whole weights.

In a group of one process; with several: test_distributed, test_swap_distributed.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import swap_models
import torch
import torch.distributed as dist
from blocks import assert_same_bits
from helpers import a_few
from processes import gradients, needs_gloo
from swap_models import known, make_adapted, make_batch
from test_model import OPTIONS, SIZES

import pyckpt

pytestmark = needs_gloo
VOCAB = 50


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Loss(torch.nn.Module):
    """The loss as a forward, which is what FSDP2 hooks."""

    def __init__(self, model: pyckpt.CkptCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens: torch.Tensor, stream: pyckpt.Stream | None, logits: bool = False, **options: Any
    ) -> torch.Tensor:
        return self.model(tokens) if logits else self.model.loss(tokens, stream=stream, **options)

    @property
    def layers(self) -> list[torch.nn.Module]:
        return list(self.model.model.layers)


def make_model(n_layers: int = 3, **options: Any) -> Loss:
    return Loss(pyckpt.CkptCausalLM(**{**SIZES, **OPTIONS, "n_layers": n_layers, **options}))


def sharded(model: Any, layers: list[torch.nn.Module], of_layers: Any = None, **options: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for layer in layers:
        fully_shard(layer, **(options if of_layers is None else of_layers))
    return fully_shard(model, **options)


def tokens_of(seq: int = 61) -> torch.Tensor:
    return torch.randint(0, VOCAB, (1, seq))


def stream(tile: int = 7, store: Any = "host", **options: Any) -> pyckpt.Stream:
    return pyckpt.Stream(tile, store, **options)


def step(model: Any, tokens: torch.Tensor, how: pyckpt.Stream, **options: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    losses = model(tokens, how, **options)
    losses.backward(torch.linspace(1.0, 2.0, losses.numel()).view(losses.shape))
    return gradients(model) | {"loss": losses.detach()}


def freeze(model: Loss, what: str) -> None:
    """All but the part of this name."""
    for name, p in model.named_parameters():
        p.requires_grad_(what in name)


@pytest.mark.parametrize(
    "options",
    [{}, {"tie_embeddings": True}, {"save": "input"}, {"save": "all"}, {"dropout": 0.2}, {"segments": 2}],
    ids=str,
)
def test_the_same_bits_as_over_whole_weights(options):
    model, tokens = make_model(**options), tokens_of()
    expected = step(copy.deepcopy(model), tokens, stream())
    model = sharded(model, model.layers)
    for _ in range(2):  # the second finds what the first left behind
        assert_same_bits(step(model, tokens, stream()), expected)
    assert_same_bits(step(model, tokens, stream(), reduction="none"), step_of_whole(model, options, tokens))


def step_of_whole(model: Any, options: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each token's loss, of a model with these weights that nothing shards."""
    whole = make_model(**options)
    whole.load_state_dict({n: t.full_tensor() for n, t in model.state_dict().items()})
    return step(whole, tokens, stream(), reduction="none")


@pytest.mark.parametrize("what", ["embed", "lm_head", "layers.1.", "layers", "norm"])
def test_frozen_parts(what):
    model, tokens = make_model(), tokens_of()
    freeze(model, what)
    expected = step(copy.deepcopy(model), tokens, stream())
    assert_same_bits(step(sharded(model, model.layers), tokens, stream()), expected)


def test_one_layers_weights_are_there_at_a_time():
    from torch.distributed.tensor import DTensor

    model, there = make_model(n_layers=4), []

    def look(what: str, block: int, tile: int) -> None:
        there.append((what, block, [not isinstance(next(m.parameters()), DTensor) for m in model.layers]))

    step(sharded(model, model.layers), tokens_of(), stream(progress=look))
    for what, block, gathered in there:
        assert gathered == [what in ("forward", "backward") and i == block for i in range(4)], (what, block)
    assert {what for what, _, _ in there} == {"embed", "forward", "head", "backward"}


def test_peak_does_not_grow_with_the_length():
    model = make_model()
    model = sharded(model, model.layers)
    step(model, tokens_of(32), kept := stream(16, "file"))
    peaks = []
    for seq in (64, 192):
        model.zero_grad()
        tokens = tokens_of(seq)
        with pyckpt.measure.memory(model) as m:
            model(tokens, kept).backward()
        peaks.append(m.peak_bytes)
    assert peaks[1] <= 1.01 * peaks[0]


def test_gradients_are_accumulated():
    model, (first, second) = make_model(), (tokens_of(), tokens_of())
    whole = copy.deepcopy(model)
    for tokens in (first, second):
        whole(tokens, stream()).backward()
    model = sharded(model, model.layers)
    model.set_requires_gradient_sync(False)
    model(first, stream()).backward()
    model.set_requires_gradient_sync(True)
    model(second, stream()).backward()
    assert_same_bits(gradients(model), gradients(whole))


def test_without_gradients_nothing_is_kept():
    model, tokens = make_model(), tokens_of()
    with torch.no_grad():
        expected = model(tokens, stream())
        assert torch.equal(sharded(model, model.layers)(tokens, stream()), expected)


def test_what_fails_leaves_the_model_as_it_was():
    model, tokens = make_model(), tokens_of()
    expected = step(copy.deepcopy(model), tokens, stream())
    model = sharded(model, model.layers)

    def stop(what: str, block: int, tile: int) -> None:
        if (what, block, tile) == ("forward", 1, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model(tokens, stream(progress=stop))
    assert not gradients(model)
    loss = model(tokens, stream())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"has one backward.*\n?.*retain_graph"):
        loss.backward()
    assert_same_bits(step(model, tokens, stream()), expected)


def test_a_run_that_is_dropped_gives_its_store_back():
    """At once, and not when the garbage collector comes by."""
    model, kept = make_model(), stream()
    loss = sharded(model, model.layers)(tokens_of(), kept)
    run = weakref.ref(loss.grad_fn.run)
    gc.collect()
    gc.disable()
    try:
        assert run() is not None and kept.store._idle is None
        del loss
        assert run() is None and kept.store._idle is not None
    finally:
        gc.enable()


def test_a_limit_of_the_store_is_kept_without_running_layers_again():
    model, tokens = make_model(n_layers=5), tokens_of()
    expected = step(copy.deepcopy(model), tokens, stream())
    model = sharded(model, model.layers)
    with pytest.raises(ValueError, match=r"needs at least ([\d,]+) bytes of the store") as caught:
        step(model, tokens, stream(limit=1000))
    least = int(str(caught.value).split("at least ")[1].split(" ")[0].replace(",", ""))
    assert_same_bits(step(model, tokens, stream(limit=least)), expected)
    best = int(str(caught.value).split("(")[1].split(" ")[0].replace(",", ""))
    assert least < best


def test_weights_of_another_dtype_than_the_embeddings():
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = make_model()
    model = sharded(model, model.layers, of_layers={"mp_policy": MixedPrecisionPolicy(torch.bfloat16)})
    with pytest.raises(ValueError, match=r"layer 0: .*bfloat16.* one MixedPrecisionPolicy"):
        model(tokens_of(), stream())


def test_hooks_of_others():
    model = make_model()
    model = sharded(model, model.layers)
    model.layers[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="block 1 has hooks, and in a streamed run"):
        model(tokens_of(), stream())


def test_layers_that_would_run_again():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = make_model()
    layers = model.model.model.layers
    for i, layer in enumerate(layers):
        layers._modules[str(i)] = checkpoint_wrapper(layer)
    loss = sharded(model, model.layers)(tokens_of(), stream())
    with pytest.raises(RuntimeError, match=r"out of turn.*checkpoint_wrapper"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`", "ignore:.*NO_SHARD.*deprecated")
@pytest.mark.parametrize("what", ["loss", "stack"])
def test_fsdp1_is_told_that_it_cannot_stream(what):
    """Without shards the weights are there, and gradients of a run that calls no wrapper would stay each process's."""
    model = wrapped_by_fsdp1(use_orig_params=True)
    with pytest.raises(ValueError, match="FSDP1 gathers weights"):
        if what == "loss":
            model(tokens_of(), stream())
        else:
            model.module.model.model.layers(torch.randn(1, 5, SIZES["d_model"]), stream=stream())


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`", "ignore:.*NO_SHARD.*deprecated")
def test_fsdp1_without_parameters_of_blocks_is_told_what_to_do():
    with pytest.raises(RuntimeError, match="use_orig_params=True"):
        wrapped_by_fsdp1(use_orig_params=False)(tokens_of(), None)


def wrapped_by_fsdp1(**options: Any) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({pyckpt.CkptTransformerBlock})
    return FullyShardedDataParallel(make_model(), auto_wrap_policy=policy, device_id=torch.device("cpu"), **options)


@pytest.mark.parametrize("how", ["loss", "streamed", "logits"])
@pytest.mark.parametrize("groups", [["norm", "head"], ["norm"], ["head"], ["embedding"], ["embedding", "norm", "head"]])
def test_groups_beside_the_layers(groups, how):
    """As `fully_shard([model.norm, model.lm_head])`, which recipes have: the loss reads them without a call."""
    from torch.distributed.fsdp import fully_shard

    plain = make_model()
    model = copy.deepcopy(plain)
    tokens = torch.randint(0, VOCAB, (2, 11))
    inner = model.model.model
    parts = {"norm": inner.norm, "head": model.model.lm_head, "embedding": inner.embed_tokens}
    for layer in model.layers:
        fully_shard(layer)
    fully_shard([parts[g] for g in groups])
    fully_shard(model)

    def loss_of(m: Loss) -> torch.Tensor:
        if how == "logits":
            return m(tokens, None, logits=True).square().mean()
        return m(tokens, pyckpt.Stream(tile=4) if how == "streamed" else None)

    for _ in range(3):  # what one step leaves must not stand in the way of the next
        for m in (plain, model):
            m.zero_grad()
            loss_of(m).backward()
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(q.grad.full_tensor(), p.grad)


def test_a_loss_outside_the_models_forward():
    """FSDP2 gathers the embedding in the forward of the model alone, unless it is told of another method."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    model, tokens = make_model().model, tokens_of()
    expected = model.loss(tokens, stream=stream())
    model = sharded(model, list(model.model.layers))
    with pytest.raises(ValueError, match=r"register_fsdp_forward_method\(model, 'loss'\)"):
        model.loss(tokens, stream=stream())
    register_fsdp_forward_method(model, "loss")
    assert torch.equal(model.loss(tokens, stream=stream()), expected)


@pytest.mark.filterwarnings("error:FSDP2-wrapped module .*Layer. returned a view")
class TestSwapped:
    """Models of transformers."""

    @pytest.fixture(autouse=True)
    def libraries(self) -> None:
        pytest.importorskip("transformers")

    def both(self, family: str, options: Any = None, **swap: Any) -> tuple[Any, Any]:
        """A model swapped and sharded, and one swapped alone."""
        model = swap_models.make_model(family, **(options or {}))
        whole = copy.deepcopy(model)
        pyckpt.swap(whole, tile=5, stream=stream(store="file"), **swap)
        pyckpt.swap(model, tile=5, stream=stream(store="file"), **swap)
        return sharded(model, list(model.base_model.layers)), whole

    def assert_same_steps(self, model: Any, whole: Any, batch: Any) -> None:
        """Two of them, without logits: the second finds what the first left behind."""
        for _ in range(2):
            for m in (model, whole):
                m.zero_grad()
                out = m(**batch)
                assert out.logits is None
                out.loss.backward()
            assert len(gradients(whole)) == len(gradients(model))
            assert_same_bits(gradients(model), gradients(whole))

    @pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
    @pytest.mark.parametrize("family", a_few(["Llama", "Gemma2", "Mixtral", "GPTNeoX"], always=(1,)))
    def test_the_same_bits_as_over_whole_weights(self, family, kind, no_fallback):
        model, whole = self.both(family)
        batch = known(whole, make_batch(kind))
        for m in (model, whole):
            torch.manual_seed(1)
            m(**batch).loss.backward()
        assert_same_bits(gradients(model), gradients(whole))

    @pytest.mark.parametrize("streamed", [True, False])
    @pytest.mark.parametrize("groups", a_few(["embedding", "norm and head", "both", "base model"], always=(2, 3)))
    @pytest.mark.parametrize("family", a_few(["Llama", "Gemma2"], always=(0,)))
    def test_groups_around_the_layers(self, family, groups, streamed, no_fallback):
        """Embedding, final norm and head that FSDP2 shards by themselves."""
        from torch.distributed.fsdp import fully_shard

        model, batch = swap_models.make_model(family, tie_word_embeddings=False), make_batch("packed")
        whole = copy.deepcopy(model)
        for m in (model, whole):
            pyckpt.swap(m, tile=5, stream=stream() if streamed else None)
        for layer in model.model.layers:
            fully_shard(layer)
        if groups in ("embedding", "both"):
            fully_shard(model.model.embed_tokens)
        if groups in ("norm and head", "both"):
            fully_shard([model.model.norm, model.lm_head])
        if groups == "base model":
            fully_shard(model.model)
        fully_shard(model)
        self.assert_same_steps(model, whole, batch)

    @pytest.mark.parametrize("streamed", [True, False])
    @pytest.mark.parametrize("kind", ["plain", "tied", "on meta", "LoRA"])
    @pytest.mark.parametrize("family", a_few(["Llama", "Gemma2"], always=(0,)))
    def test_as_accelerate_shards_it(self, family, kind, streamed, no_fallback):
        """Trainer and Accelerate have groups for the embedding, and for final norm and head; for all three if tied."""
        pytest.importorskip("peft")
        accelerate = pytest.importorskip("accelerate")
        utils = pytest.importorskip("accelerate.utils.fsdp_utils")
        plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=kind == "on meta"
        )
        # Accelerate itself takes FSDP2 on a GPU alone.
        on_cpu = SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin),
            mixed_precision="no",
            is_main_process=True,
            device=torch.device("cpu"),
            torch_device_mesh=None,
        )
        model, batch = swap_models.make_model(family, tie_word_embeddings=kind == "tied"), make_batch("packed")
        if kind == "LoRA":
            model = make_adapted(model, target_modules=["q_proj", "down_proj"], lora_dropout=0.0)
        whole = copy.deepcopy(model)
        for m in (model, whole):
            pyckpt.swap(m, tile=5, stream=stream() if streamed else None)
        model = utils.fsdp2_prepare_model(on_cpu, model)
        sharded = {type(m).__name__ for m in model.modules() if hasattr(m, "unshard")}
        expected = {f"FSDP{family}DecoderLayer", "FSDPLinear"}
        assert sharded >= expected | (set() if kind == "LoRA" else {f"FSDP{family}RMSNorm"})
        self.assert_same_steps(model, whole, batch)

    @pytest.mark.parametrize("family", ["Phi3", "GPTNeoX"])
    def test_no_weights_wait_for_the_backward(self, family):
        """Of layers, whose fused projections are split, or copied by head; those of the ends do."""
        model, _ = self.both(family, {"num_hidden_layers": 6})
        of_layers = sum(p.nbytes for m in model.base_model.layers for p in m.parameters())
        ids = torch.randint(1, 61, (1, 32))
        with pyckpt.measure.memory(model) as m:
            loss = model(input_ids=ids, labels=ids).loss
            m.mark("forward done")
            loss.backward()
        assert 0 < m.marks["forward done"].live_bytes < 0.25 * of_layers

    def test_segments_are_left_out_with_a_warning(self):
        model, whole = self.both("Llama", segments=2)
        batch = make_batch("plain")
        with pytest.warns(UserWarning, match="streamed without segments"):
            model(**batch).loss.backward()
        whole(**batch).loss.backward()
        assert_same_bits(gradients(model), gradients(whole))

    @pytest.mark.parametrize(
        ("who", "told"),
        [
            ("another hook", "a .*LlamaDecoderLayer has forward hooks: streaming is not used"),
            ("hook on the norm", "final norm is of class .* hooks.*: the layers are streamed, and not what surrounds"),
            ("hidden states", "output_hidden_states=True asks for every layer's: streaming is not used"),
        ],
    )
    def test_what_cannot_be_streamed_so_is_told(self, who, told):
        model, batch = swap_models.make_model("Llama", torch.float64), make_batch("plain")
        whole = copy.deepcopy(model)
        pyckpt.swap(model, tile=5, stream=stream())
        if who == "another hook":
            model.model.layers[1].register_forward_hook(lambda *_: None)
        if who == "hook on the norm":
            model.model.norm.register_forward_hook(lambda *_: None)
        if who == "hidden states":
            batch |= {"output_hidden_states": True}
        model = sharded(model, list(model.model.layers))
        with pytest.warns(UserWarning, match=told):
            model(**batch).loss.backward()
        whole(**batch).loss.backward()
        expected = gradients(whole)
        for name, grad in gradients(model).items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-6)  # norms in float32 there

    @pytest.mark.parametrize("kind", ["plain", "padded"])
    @pytest.mark.parametrize("family", a_few(["Llama", "Olmo"], always=(1,)))
    def test_hidden_states_alone(self, family, kind, no_fallback):
        """The layers are streamed inside the model's own forward, as without FSDP2."""
        model, whole = self.both(family)
        batch = make_batch(kind)
        del batch["labels"]
        results = []
        for m in (model, whole):
            m.zero_grad()
            logits = m(**batch, use_cache=False).logits
            logits.square().sum().backward()
            results.append(gradients(m) | {"logits": logits.detach()})
        assert_same_bits(*results)
