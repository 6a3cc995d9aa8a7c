"""As much kept from forward to backward as some memory holds: `pyckpt.keep_within`."""

from __future__ import annotations

import pytest
import torch
from swap_models import make_model
from torch import nn

import pyckpt
from pyckpt.measure.units import parse_bytes
from pyckpt.save import bytes_per_token, kept_bytes

SETS = list(pyckpt.SAVE_SETS)
TOKENS = 2 * 96


def lm(n_layers: int = 4, **options) -> pyckpt.CkptCausalLM:
    return pyckpt.CkptCausalLM(50, n_layers, 64, 4, **{"n_kv_heads": 2, "d_ff": 96, "tile": 32, **options})


def saved(model: nn.Module, loss) -> dict[str, int]:
    with pyckpt.measure.memory(model) as m:
        loss().backward()
    return m.per_module


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class TestChoice:
    def bytes_of(self, model, name: str) -> int:
        return TOKENS * bytes_per_token(model.spec, name, torch.float32)

    def test_stays_within_the_memory(self):
        model = lm()
        least, most = (4 * self.bytes_of(model, name) for name in ("input", "all"))
        for memory in range(least, most + 1, (most - least) // 40):
            kept = pyckpt.keep_within(model, memory, TOKENS)
            assert kept.sets == tuple(block.save for block in model.blocks)
            assert kept.bytes == sum(self.bytes_of(model, name) for name in kept.sets) <= memory
        assert pyckpt.keep_within(model, most, TOKENS).sets == ("all",) * 4
        assert pyckpt.keep_within(model, least, TOKENS).sets == ("input",) * 4

    def test_nothing_that_would_fit_is_left_out(self):
        model = lm()
        least, most = (4 * self.bytes_of(model, name) for name in ("input", "all"))
        for memory in range(least, most, (most - least) // 23):
            kept = pyckpt.keep_within(model, memory, TOKENS)
            for name in kept.sets:
                grown = [self.bytes_of(model, n) - self.bytes_of(model, name) for n in SETS[: SETS.index(name)]]
                assert all(more == 0 or kept.bytes + more > memory for more in grown)

    def test_attention_comes_first_then_the_last_blocks(self):
        model = lm()
        attention, everything = (self.bytes_of(model, name) for name in ("attention", "all"))
        assert pyckpt.keep_within(model, 2 * attention + 2 * self.bytes_of(model, "input"), TOKENS).sets == (
            *("input", "input"),
            *("attention", "attention"),
        )
        kept = pyckpt.keep_within(model, 3 * attention + everything, TOKENS)
        assert kept.sets == ("attention", "attention", "attention", "all")

    def test_blocks_of_different_kinds(self):
        class Post(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.out = nn.Linear(64, 64)

            def forward(self, x, o):
                return x + self.out(o)

        class Pre(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.qkv = nn.Linear(64, 192)

            def forward(self, x, positions):
                return self.qkv(x).chunk(3, dim=-1)

        generic = pyckpt.CkptGenericBlock(Pre(), Post(), 64, 4)
        parallel = pyckpt.CkptTransformerBlock(64, 4, residual="parallel")
        stack = pyckpt.CkptTransformer([generic, parallel])
        kept = pyckpt.keep_within(stack, "1GiB", TOKENS)
        assert kept.sets == ("attention+qkv", "all")  # a generic block has no other
        x = torch.randn(2, 96, 64, requires_grad=True)
        assert sum(saved(stack, lambda: stack(x).sum()).values()) == pytest.approx(kept.bytes, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("save", pyckpt.SAVE_SETS)
@pytest.mark.parametrize(
    "options",
    [{}, {"mlp": "gelu", "norm": "layernorm", "bias": True}, {"norm_placement": "sandwich"}, {"residual": "parallel"}],
    ids=["llama", "gpt", "gemma", "neox"],
)
def test_bytes_are_those_that_are_kept(options, save, dtype):
    block = pyckpt.CkptTransformerBlock(256, 4, n_kv_heads=2, d_ff=512, tile=64, save=save, dtype=dtype, **options)
    x = torch.randn(1, 320, 256, dtype=dtype)
    with pyckpt.measure.memory(block) as m:
        block(x)
    plan = block.plan(320, dtype, dtype, x.device)
    arithmetic = kept_bytes(plan.save, plan.attend, plan.post_tensors, 256, dtype, dtype)
    assert 320 * arithmetic == pytest.approx(m.saved_bytes, rel=0.01)


def test_under_autocast():
    model = lm()
    tokens = torch.randint(50, (2, 96))
    with torch.autocast("cpu", torch.bfloat16):
        kept = pyckpt.keep_within(model, "1GiB", TOKENS)
        per_module = saved(model, lambda: model.loss(tokens))
    assert sum(per_module.values()) == pytest.approx(kept.bytes, rel=0.01)
    assert pyckpt.keep_within(model, "1GiB", TOKENS, torch.bfloat16).bytes == kept.bytes
    assert pyckpt.keep_within(model, "1GiB", TOKENS).bytes > kept.bytes


def test_gradients_are_the_same_bits():
    model = lm()
    tokens = torch.randint(50, (2, 96))
    model.loss(tokens).backward()
    want = gradients(model)
    for memory in range(400_000, 2_000_000, 237_119):
        model.zero_grad()
        pyckpt.keep_within(model, memory, TOKENS)
        model.loss(tokens).backward()
        assert all(torch.equal(g, want[n]) for n, g in gradients(model).items())


class TestSwapped:
    @pytest.mark.parametrize("family", ["Llama", "Gemma2", "GPTNeoX", "Mixtral"])
    def test_a_model_of_transformers(self, family):
        model = make_model(family)
        pyckpt.swap(model)
        ids = torch.randint(1, 61, (2, 40))
        model(ids, labels=ids).loss.backward()
        want = gradients(model)
        saved_bytes = []
        both = [pyckpt.keep_within(model, memory, 80) for memory in (2 * 80 * 48 * 4, "1GiB")]
        for kept in both:
            pyckpt.keep_within(model, kept.bytes, 80)
            model.zero_grad()
            with pyckpt.measure.memory(model) as m:
                model(ids, labels=ids).loss.backward()
            saved_bytes.append(m.saved_bytes)
            assert all(torch.equal(g, want[n]) for n, g in gradients(model).items())
        assert both[0].sets == ("input", "input")
        assert set(both[1].sets) <= {"all", "attention+qkv"}
        assert saved_bytes[1] - saved_bytes[0] == pytest.approx(both[1].bytes - both[0].bytes, rel=0.01)

    def test_encoder_layers_of_pytorch(self):
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True), 3)
        pyckpt.swap(model)
        kept = pyckpt.keep_within(model, "1GiB", 64)
        assert kept.sets == ("all",) * 3
        layer = model.layers[0].forward
        assert {block.save for block in layer.ways} == {"all"}

    def test_compiled_after_it(self):
        model = make_model("Llama")
        pyckpt.swap(model)
        ids = torch.randint(1, 61, (2, 24))
        model(ids, labels=ids).loss.backward()
        want = gradients(model)
        pyckpt.keep_within(model, "1GiB", 48)
        model.zero_grad()
        torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=ids).loss.backward()
        assert all(torch.allclose(g, want[n], atol=1e-6) for n, g in gradients(model).items())


@pytest.mark.parametrize("container", [pyckpt.CkptTransformer, lambda blocks: nn.Sequential(*blocks)])
def test_a_block_in_two_places_keeps_twice_as_much(container):
    shared, other = (pyckpt.CkptTransformerBlock(64, 4, n_kv_heads=2, d_ff=96, tile=32) for _ in range(2))
    stack = container([shared, other, shared])
    x = torch.randn(2, 96, 64)
    for memory in ("1GiB", 9 * TOKENS * 64 * 4):
        kept = pyckpt.keep_within(stack, memory, TOKENS)
        assert kept.sets == (shared.save, other.save)
        with pyckpt.measure.memory(stack) as m:
            stack(x).sum().backward()
        assert sum(m.per_module.values()) == kept.bytes <= kept.memory


def test_says_what_it_chose():
    model = lm()
    text = str(pyckpt.keep_within(model, 1 << 20, TOKENS))
    assert text.startswith("4 blocks (")
    assert text.endswith("of 1.00 MiB for 192 tokens")
    assert "of 'all'" in text


class TestBadInput:
    @pytest.mark.parametrize("memory", [0, -5, 1.5, True, None, "", "much", "-1GiB", "1 XB", "0MB"])
    def test_memory(self, memory):
        with pytest.raises(ValueError, match=r"memory=.*expected a number of bytes above 0, or text such as '20GiB'"):
            pyckpt.keep_within(lm(), memory, TOKENS)

    def test_what_is_no_int(self):
        with pytest.raises(ValueError, match=r"memory=1000000000\.0: expected .*; the number has to be an int, as int"):
            pyckpt.keep_within(lm(), 1e9, TOKENS)

    @pytest.mark.parametrize(
        ("dtype", "error", "message"),
        [
            ("bf16", TypeError, r"dtype must be None or a torch\.dtype, as torch\.bfloat16, got 'bf16'"),
            (torch.int32, ValueError, r"dtype is torch\.int32, expected None or one of float32"),
        ],
    )
    def test_dtype(self, dtype, error, message):
        with pytest.raises(error, match=message):
            pyckpt.keep_within(lm(), "1GiB", TOKENS, dtype)

    @pytest.mark.parametrize("model", [None, [pyckpt.CkptTransformerBlock(16, 2)]])
    def test_model(self, model):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got a (NoneType|list)"):
            pyckpt.keep_within(model, "1GiB", TOKENS)

    @pytest.mark.parametrize("tokens", [0, -1, 2.0, True, "8"])
    def test_tokens(self, tokens):
        with pytest.raises(ValueError, match=r"tokens=.*expected a positive number of tokens"):
            pyckpt.keep_within(lm(), "1GiB", tokens)

    def test_too_little_changes_nothing(self):
        model = lm(save="attention+mid")
        with pytest.raises(ValueError, match=r"memory=1.00 KiB is less than the inputs of all blocks take, 192 KiB"):
            pyckpt.keep_within(model, 1024, TOKENS)
        assert {block.save for block in model.blocks} == {"attention+mid"}

    def test_models_without_blocks(self):
        with pytest.raises(ValueError, match=r"this Linear has no blocks that keep a save set: call pyckpt.swap"):
            pyckpt.keep_within(nn.Linear(3, 3), "1GiB", TOKENS)
        whole = make_model("Falcon")
        pyckpt.swap(whole)
        with pytest.raises(
            ValueError, match=r"no blocks that keep a save set: its swapped layers run again as a whole"
        ):
            pyckpt.keep_within(whole, "1GiB", TOKENS)

    def test_segments_streams_and_places(self):
        swapped = make_model("Llama")
        pyckpt.swap(swapped, segments=2)
        streamed = make_model("Llama")
        pyckpt.swap(streamed, stream=pyckpt.Stream(tile=16))
        for model in (lm(segments=2), swapped, streamed):
            with pytest.raises(ValueError, match="the model's blocks run in segments or streamed"):
                pyckpt.keep_within(model, "1GiB", TOKENS)
        with pytest.raises(ValueError, match=r"the blocks have a pyckpt.Save that places"):
            pyckpt.keep_within(lm(save=pyckpt.Save("attention", {"x": "file"})), "1GiB", TOKENS)


def test_sizes_as_people_write_them():
    sizes = {"1": 1, "20GiB": 20 * 2**30, "1.5 gib": 3 * 2**29, "800 MB": 8 * 10**8, "64k": 64_000, "2Ti": 2**41}
    assert {text: parse_bytes(text) for text in sizes} == sizes
    assert parse_bytes(17) == 17
