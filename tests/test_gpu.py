"""What only a GPU shows, from end to end: whole models in half precision, page-locked stores and their copy streams,
the allocator's peak, CUDA graphs. Run by `make gpu`; the kernels' own tests are beside it."""

from __future__ import annotations

import gc

import pytest
import torch
from blocks import assert_as_good, assert_same_bits, randomise, step

import pyckpt
from pyckpt.compare.baseline import PlainBlock, PlainCausalLM
from pyckpt.ops import attention_cudnn
from pyckpt.save import kept_names, save_set

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(not GPU, reason="needs a GPU")

BLOCK = {"d_model": 256, "n_heads": 4, "n_kv_heads": 2, "d_ff": 520}
VOCAB = 1000
SIZES = {"vocab_size": VOCAB, "n_layers": 3, **BLOCK}
HALF = [torch.bfloat16, torch.float16]


def make_lm(dtype: torch.dtype, **options) -> pyckpt.CkptCausalLM:
    model = pyckpt.CkptCausalLM(**SIZES, **options, device=DEVICE, dtype=torch.float64)
    randomise(model)
    return model.to(dtype)


def twin(model: pyckpt.CkptCausalLM, dtype: torch.dtype) -> PlainCausalLM:
    plain = PlainCausalLM(**SIZES, device=DEVICE, dtype=dtype)
    plain.load_state_dict({n: t.to(dtype) for n, t in model.state_dict().items()})
    return plain


def results(model, tokens, **options) -> dict[str, torch.Tensor]:
    """The losses of all rows of tokens together and one by one, and the gradients of the former."""
    model.zero_grad(set_to_none=True)
    loss = model.loss(tokens, **options)
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    with torch.no_grad():  # many, since the rounding of one number is chance
        losses = torch.stack([model.loss(row[None], **options) for row in tokens]) if tokens.dim() > 1 else loss
    return {**grads, "loss": losses.detach()}


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape, device=DEVICE)


# --- exact --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("products", ["none", "all"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 100, "softcap": 20.0, "qk_norm": True},
        {"norm": "layernorm", "mlp": "gelu", "bias": True, "rope_theta": None},
        {"causal": False, "n_kv_heads": 4, "head_dim": 128},
    ],
    ids=["llama", "window-softcap-qk_norm", "gpt2", "full-128"],
)
def test_a_block(options, dtype, products, monkeypatch):
    monkeypatch.setenv("PYCKPT_FUSED", products)
    config = {**BLOCK, **options}
    block = pyckpt.CkptTransformerBlock(**config, device=DEVICE, dtype=torch.float64, tile=300)
    randomise(block)
    state = block.state_dict()
    plains = []
    for d in (dtype, torch.float64):
        plains.append(PlainBlock(**config, device=DEVICE, dtype=d))
        plains[-1].load_state_dict({n: t.to(d) for n, t in state.items()})
    x, dy = (torch.randn(2, 701, 256, device=DEVICE, dtype=dtype) for _ in range(2))
    theirs, truth = (step(p, x.to(d), dy.to(d)) for p, d in zip(plains, (dtype, torch.float64), strict=True))
    block = block.to(dtype)
    ours = step(block, x, dy)
    assert_as_good(ours, theirs, truth, dtype)
    for save in pyckpt.SAVE_SETS:
        block.save = save
        assert_same_bits(step(block, x, dy), ours)


def test_positions_of_several_axes():
    """Also in a CUDA graph, which can't hold a copy of what says by which axis a pair turns."""
    config = {**BLOCK, "rope_axes": [0] * 12 + [1, 2] * 10}
    block = pyckpt.CkptTransformerBlock(**config, device=DEVICE, dtype=torch.float64, tile=300)
    randomise(block)
    plains = []
    for d in (torch.bfloat16, torch.float64):
        plains.append(PlainBlock(**config, device=DEVICE, dtype=d))
        plains[-1].load_state_dict({n: t.to(d) for n, t in block.state_dict().items()})
    x, dy = (torch.randn(2, 701, 256, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    positions = torch.randint(0, 3000, (2, 701, 3), device=DEVICE)
    theirs, truth = (
        step(p, x.to(d), dy.to(d), None, positions) for p, d in zip(plains, (x.dtype, torch.float64), strict=True)
    )
    block = block.to(x.dtype)
    ours = step(block, x, dy, None, positions)
    assert_as_good(ours, theirs, truth, x.dtype)
    if GPU:
        graphed = torch.cuda.make_graphed_callables(block, (torch.randn_like(x).requires_grad_(), positions))
        graphed(x, positions).backward(dy)
        for name, p in block.named_parameters():
            assert torch.equal(p.grad, ours[name]), name


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    "stream",
    [None, pyckpt.Stream(128), pyckpt.Stream(200, "device"), pyckpt.Stream(200, "file")],
    ids=["resident", "host", "device", "file"],
)
def test_a_language_model(dtype, stream):
    """Resident and streamed, by tiles that do not divide the length."""
    model = make_lm(dtype)
    tokens = random_tokens(6, 701)
    ours = results(model, tokens, stream=stream)
    assert_same_bits(results(model, tokens, stream=stream), ours)
    assert_as_good(ours, *(results(twin(model, d), tokens) for d in (dtype, torch.float64)), dtype)


def test_every_store_gives_the_same_bits_over_many_runs(unpoisoned):
    """A copy that a stream did not wait for shows as another result, sooner or later."""
    model = make_lm(torch.bfloat16, segments=2)
    tokens = random_tokens(1, 5000)
    want = results(model, tokens, stream=pyckpt.Stream(256, "device"))
    for store in ("host", "file"):
        stream = pyckpt.Stream(256, store)
        for _ in range(8 if store == "host" else 2):
            assert_same_bits(results(model, tokens, stream=stream), want)


def test_places_give_the_same_bits(unpoisoned):
    kept = kept_names(save_set("all"))
    blocks = [pyckpt.CkptTransformerBlock(**BLOCK, device=DEVICE, dtype=torch.bfloat16) for _ in range(6)]
    stack = pyckpt.CkptTransformer(blocks)
    x, dy = (torch.randn(1, 3001, 256, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    for block in stack:
        block.save = "all"
    want = step(stack, x, dy)
    for place in ("host", "file"):
        for block in stack:
            block.save = pyckpt.Save("all", dict.fromkeys(kept, place), last=1)
        for _ in range(4):
            assert_same_bits(step(stack, x, dy), want)


def test_dropout_is_the_same_for_every_tile_and_save_set():
    block = pyckpt.CkptTransformerBlock(
        **BLOCK, device=DEVICE, dtype=torch.bfloat16, dropout=0.2, attention_dropout=0.1
    ).train()
    x, dy = (torch.randn(2, 301, 256, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))

    def seeded():
        torch.manual_seed(5)
        return step(block, x, dy)

    want = seeded()
    for save in pyckpt.SAVE_SETS:
        block.save = save
        assert_same_bits(seeded(), want)
    block.tile = 64  # sums over tokens in another order, and the same values dropped
    got = seeded()
    assert torch.equal(got["y"], want["y"]) and torch.equal(got["dx"], want["dx"])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("length", [512, 701])
@pytest.mark.parametrize(
    "options", [{}, {"causal": False, "n_kv_heads": 4, "head_dim": 128}], ids=["causal", "full-128"]
)
def test_a_block_with_cudnns_attention(options, length, dtype, unpoisoned, monkeypatch):
    """Where it is asked for; what it does not take goes to ours."""
    calls = []
    for name in ("forward", "backward"):
        right = getattr(attention_cudnn, name)
        monkeypatch.setattr(attention_cudnn, name, lambda *a, name=name, right=right: calls.append(name) or right(*a))
    config = {**BLOCK, **options}
    plains = [PlainBlock(**config, device=DEVICE, dtype=d) for d in (dtype, torch.float64)]
    randomise(plains[1])
    state = plains[1].state_dict()
    plains[0].load_state_dict({n: t.to(dtype) for n, t in state.items()})
    x, dy = (torch.randn(2, length, 256, device=DEVICE, dtype=dtype) for _ in range(2))
    theirs, truth = (step(p, x.to(d), dy.to(d)) for p, d in zip(plains, (dtype, torch.float64), strict=True))
    block = pyckpt.CkptTransformerBlock(**config, device=DEVICE, dtype=dtype)
    block.load_state_dict({n: t.to(dtype) for n, t in state.items()})
    monkeypatch.setenv("PYCKPT_ATTENTION", "cudnn")
    assert_as_good(step(block, x, dy), theirs, truth, dtype)
    assert calls == ["forward", "backward"]
    softcapped = pyckpt.CkptTransformerBlock(**config, softcap=5.0, device=DEVICE, dtype=dtype)
    softcapped.load_state_dict(block.state_dict())
    step(softcapped, x, dy)
    torch.use_deterministic_algorithms(True)
    step(block, x, dy)
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_stream_with_cudnns_attention(dtype, unpoisoned, monkeypatch):
    """Pairs of tiles that are seen whole, or to the diagonal, are cuDNN's; of a window's edge they are ours."""
    calls = []
    for name in ("tile_forward", "tile_backward"):
        right = getattr(attention_cudnn, name)
        monkeypatch.setattr(attention_cudnn, name, lambda *a, name=name, right=right: calls.append(name) or right(*a))
    monkeypatch.setenv("PYCKPT_ATTENTION", "cudnn")
    model = make_lm(dtype)
    tokens = random_tokens(2, 701)
    ours = results(model, tokens, stream=pyckpt.Stream(200))
    assert set(calls) == {"tile_forward", "tile_backward"}
    assert_as_good(ours, *(results(twin(model, d), tokens) for d in (dtype, torch.float64)), dtype)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_loss_of_a_large_vocabulary(recompute):
    x = torch.randn(2100, 256, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(50257, 256, device=DEVICE, dtype=torch.bfloat16) / 5).requires_grad_()
    target = torch.randint(0, 50257, (2100,), device=DEVICE)
    target[::7] = -100

    def found(loss, x, weight):
        return {
            "loss": loss.detach(),
            **dict(zip(("dx", "dw"), torch.autograd.grad(loss, [x, weight]), strict=True)),
        }

    def plain(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight)]
        logits = torch.nn.functional.linear(*leaves).to(torch.promote_types(dtype, torch.float32))
        return found(torch.nn.functional.cross_entropy(logits, target), *leaves)

    theirs, truth = plain(torch.bfloat16), plain(torch.float64)
    loss = pyckpt.linear_cross_entropy(x, weight, target, recompute=recompute)
    assert_as_good(found(loss, x, weight), theirs, truth, torch.bfloat16)


# --- memory -------------------------------------------------------------------------------------------------


def peak_of(fn) -> int:
    """Bytes above what is there before, after a run that has set up what stays."""
    fn()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fn()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("store", ["host", "file"])
def test_the_peak_of_a_streamed_step_does_not_depend_on_the_length(store):
    model = make_lm(torch.bfloat16)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    peaks = []
    for length in (4096, 8192, 16384):
        tokens, stream = random_tokens(1, length), pyckpt.Stream(1024, store)
        peaks.append(peak_of(lambda: model.loss(tokens, stream=stream).backward()))  # noqa: B023
    assert max(peaks) <= 1.01 * min(peaks), peaks


def test_a_streamed_step_of_a_packed_batch():
    model = make_lm(torch.bfloat16)
    # Across tiles of 500, and several within one.
    starts = [0, 90, 91, 400, 1300, 1301, 1380, 1380, 1490, 2600, 3001]
    cu = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
    tokens = random_tokens(3001)
    truth = make_lm(torch.float64)
    truth.load_state_dict({n: t.double() for n, t in model.state_dict().items()})
    resident, exact = (results(m, tokens, cu_seqlens=cu) for m in (model, truth))
    streamed = results(model, tokens, cu_seqlens=cu, stream=pyckpt.Stream(500))
    assert_same_bits(results(model, tokens, cu_seqlens=cu, stream=pyckpt.Stream(500)), streamed)
    for found in (resident, exact, streamed):
        assert torch.isfinite(found.pop("loss"))  # of one number the rounding is chance
    assert_as_good(streamed, resident, exact, torch.bfloat16)


def test_saved_bytes_on_a_gpu():
    block = pyckpt.CkptTransformerBlock(**BLOCK, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(1, 4000, 256, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    block(x).sum().backward()
    found = {}
    for save in ("all", "attention", "input"):
        block.save = save
        with pyckpt.measure.memory(block) as m:
            block(x).sum().backward()
        found[save] = m.saved_bytes
        assert m.peak_bytes >= m.saved_bytes - x.nbytes
    assert x.nbytes <= found["input"] < found["attention"] < found["all"]


# --- with the user's tools ----------------------------------------------------------------------------------


def test_training_lowers_the_loss():
    curves = []
    for stream in (None, pyckpt.Stream(128)):
        torch.manual_seed(1)
        model = pyckpt.CkptCausalLM(**SIZES, device=DEVICE, dtype=torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3, fused=True)
        tokens, losses = random_tokens(2, 400), []
        for _ in range(20):
            loss = model.loss(tokens, stream=stream)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        curves.append(losses)
    for losses in curves:
        assert losses[-1] < 0.85 * losses[0], losses


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast(dtype):
    model = make_lm(torch.float32)
    tokens = random_tokens(6, 301)
    truth = results(twin(model, torch.float64), tokens)
    scaler = torch.amp.GradScaler(init_scale=2.0**8, enabled=dtype == torch.float16)

    def run(model):
        model.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, dtype):
            loss = model.loss(tokens)
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        grads = {n: p.grad / scale for n, p in model.named_parameters()}
        with torch.no_grad(), torch.autocast(DEVICE, dtype):
            losses = torch.stack([model.loss(row[None]) for row in tokens])
        return {**grads, "loss": losses}

    assert_as_good(run(model), run(twin(model, torch.float32)), truth, dtype)


@pytest.mark.parametrize("scaling", [None, {"rope_type": "given", "frequencies": [0.5**i for i in range(32)]}])
def test_a_cuda_graph(scaling):
    block = pyckpt.CkptTransformerBlock(**BLOCK, rope_scaling=scaling, device=DEVICE, dtype=torch.bfloat16)
    x, dy = (torch.randn(1, 512, 256, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    want = step(block, x, dy)
    sample = torch.randn_like(x).requires_grad_()
    graphed = torch.cuda.make_graphed_callables(block, (sample,))
    leaf = x.clone().requires_grad_()
    y = graphed(leaf)
    y.backward(dy)
    assert torch.equal(y, want["y"]) and torch.equal(leaf.grad, want["dx"])
    for name, p in block.named_parameters():
        assert torch.equal(p.grad, want[name]), name


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile(backend):
    model = make_lm(torch.bfloat16)
    tokens = random_tokens(2, 301)
    want = results(model, tokens)
    compiled = torch.compile(lambda t: model.loss(t), backend=backend, fullgraph=True)
    model.zero_grad(set_to_none=True)
    loss = compiled(tokens)
    loss.backward()
    assert torch.isfinite(loss)
    for name, p in model.named_parameters():  # the code between the ops may round elsewhere
        assert (p.grad - want[name]).norm() <= 0.02 * want[name].norm(), name


class Dropping(torch.nn.Module):
    """A layer that nobody knows, in a list: a swap has it run again as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = torch.nn.LayerNorm(64), torch.nn.Linear(64, 192)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64))
        self.drop = torch.nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, 16)).movedim(2, 0).transpose(2, 3)
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.2, is_causal=True)
        x = x + self.drop(o.transpose(1, 2).flatten(2))
        return x + self.drop(self.mlp(x))


def test_layers_that_run_again_drop_the_same():
    """By the device's generator, which torch.utils.checkpoint sees to by tensors that it is given itself."""
    model = torch.nn.Sequential(torch.nn.ModuleList(Dropping() for _ in range(3))).to(DEVICE)
    x = torch.randn(2, 33, 64, device=DEVICE)

    def run() -> dict[str, torch.Tensor]:
        torch.manual_seed(7)
        model.zero_grad()
        y = x.clone().requires_grad_()
        h = y
        for layer in model[0]:
            h = layer(h)
        h.square().sum().backward()
        drawn = torch.rand(3, device=DEVICE)  # the second runs leave the generator as it was
        return {"y": h.detach(), "dx": y.grad, "drawn": drawn, **{n: p.grad for n, p in model.named_parameters()}}

    plain = run()
    assert {e.path for e in pyckpt.swap(model).entries} == {"checkpointed"}
    assert_same_bits(run(), plain)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_a_swapped_llama(padded):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=520,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    made = transformers.LlamaForCausalLM(config)
    state = {n: t.clone() for n, t in made.state_dict().items()}
    batch = {"input_ids": random_tokens(4, 260), "labels": random_tokens(4, 260)}
    if padded:
        mask = torch.ones(4, 260, dtype=torch.long, device=DEVICE)
        mask[1, 200:] = 0
        mask[2, :70] = 0
        batch |= {"attention_mask": mask}
        batch["labels"][mask == 0] = -100

    def run(dtype, swapped=False):
        model = transformers.LlamaForCausalLM(config).to(DEVICE, dtype).train()
        model.load_state_dict(state)
        if swapped:
            report = pyckpt.swap(model)
            assert "standard" in str(report)
        loss = model(**batch).loss
        loss.backward()
        return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}}

    theirs, truth = run(torch.bfloat16), run(torch.float64)
    theirs.pop("loss"), truth.pop("loss")  # of one number the rounding is chance
    ours = run(torch.bfloat16, swapped=True)
    assert torch.isfinite(ours.pop("loss"))
    assert_as_good(ours, theirs, truth, torch.bfloat16)
