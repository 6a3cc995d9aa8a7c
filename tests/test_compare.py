"""The plain baseline against Hugging Face and arithmetic; the comparison on tiny sizes, and what it says."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math

import pytest
import torch

import pyckpt
from pyckpt import compare
from pyckpt.compare import baseline, runner, variants, words
from pyckpt.compare.baseline import PlainBlock, PlainCausalLM, PlainStack
from pyckpt.compare.plot import _spread
from pyckpt.compare.results import Results, Row
from pyckpt.save import SAVE_SETS
from pyckpt.tokenwise.parameters import parameter_shapes

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
OPTIONS = [
    {},
    {"n_kv_heads": 2},
    {"n_kv_heads": 1, "head_dim": 6},
    {"norm": "layernorm", "bias": True},
    *({"mlp": kind} for kind in ("geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu2")),
    {"qk_norm": True, "n_kv_heads": 2},
    {"rope_theta": None},
    {"rope_scaling": LLAMA3},
    {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    {"window": 3},
    {"window": 0},
    {"causal": False},
    {"causal": False, "window": (2, 5)},
    {"causal": False, "window": (-1, 1)},
    {"softcap": 2.0, "n_kv_heads": 2},
    {"softcap": 2.0, "window": 4},
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Work this small only waits for its own threads, and worst of all beside other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def block(**options) -> PlainBlock:
    torch.manual_seed(0)
    return PlainBlock(32, 4, d_ff=48, dtype=torch.float64, **options)


def hidden(*shape: int, **kwargs) -> torch.Tensor:
    return torch.randn(*shape, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64, **kwargs)


class TestPlainBlock:
    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_same_as_ours_in_float64(self, options):
        from pyckpt import CkptTransformerBlock

        plain = block(**options)
        ours = CkptTransformerBlock(32, 4, d_ff=48, dtype=torch.float64, **options)
        ours.load_state_dict(plain.state_dict())
        x = hidden(2, 13)
        positions = torch.randint(0, 100, (2, 13))
        torch.testing.assert_close(ours(x), plain(x))
        torch.testing.assert_close(ours(x, positions), plain(x, positions))
        cu = torch.tensor([0, 5, 6, 13], dtype=torch.int32)
        torch.testing.assert_close(ours(x[0], cu_seqlens=cu), plain(x[0], cu_seqlens=cu))

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_names_and_shapes(self, options):
        plain = block(**options)
        assert {n: tuple(p.shape) for n, p in plain.state_dict().items()} == parameter_shapes(plain.spec)

    @pytest.mark.parametrize(
        "options", [{}, {"norm": "layernorm", "softcap": 2.0, "window": 2, "mlp": "gelu"}], ids=str
    )
    def test_gradcheck(self, options):
        torch.manual_seed(0)
        plain = PlainBlock(8, 2, d_ff=6, dtype=torch.float64, **options)
        x = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
        names = [n for n, _ in plain.named_parameters()]

        def run(x, *weights):
            return torch.func.functional_call(plain, dict(zip(names, weights, strict=True)), (x,))

        assert torch.autograd.gradcheck(run, (x, *plain.parameters()), fast_mode=True)

    @pytest.mark.parametrize("options", [{}, {"causal": False}, {"softcap": 2.0}, {"window": 2}], ids=str)
    def test_packed_is_each_sequence_alone(self, options):
        plain, x = block(**options), hidden(12)
        got = plain(x, cu_seqlens=torch.tensor([0, 4, 5, 12], dtype=torch.int32))
        want = torch.cat([plain(part[None])[0] for part in x.split([4, 1, 7])])
        torch.testing.assert_close(got, want)

    def test_masks(self):
        x = hidden(1, 9, requires_grad=True)
        for options, reach in [
            ({}, range(-9, 1)),
            ({"window": 2}, range(-2, 1)),
            ({"causal": False, "window": (1, 3)}, range(-1, 4)),
            ({"causal": False}, range(-9, 10)),
        ]:
            (g,) = torch.autograd.grad(block(**options)(x)[0, 4].sum(), x)
            seen = {j - 4 for j in range(9) if g[0, j].abs().sum() > 0}
            assert seen == {r for r in reach if 0 <= 4 + r < 9}, options

    def test_a_huge_softcap_is_none(self):
        x = hidden(2, 7)
        torch.testing.assert_close(block(softcap=1e6)(x), block()(x))

    def test_only_differences_of_positions_matter(self):
        x, plain = hidden(2, 7), block()
        torch.testing.assert_close(plain(x, torch.arange(7) + 1000), plain(x))
        torch.testing.assert_close(plain(x, torch.arange(7).expand(2, 7)), plain(x))

    def test_float32_tables_are_float32(self):
        spec = block().spec
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            cos, _ = baseline.rope_tables(spec, hidden(1, 7).to(dtype))
            assert cos.dtype == dtype

    def test_checkpointed_stack(self):
        stack = PlainStack([block(), block()])
        x = hidden(2, 7, requires_grad=True)
        (plain,) = torch.autograd.grad(stack(x).square().sum(), x)
        stack.checkpointed = True
        (ckpt,) = torch.autograd.grad(stack(x).square().sum(), x)
        assert torch.equal(plain, ckpt)


@pytest.mark.parametrize("scaling", [None, LLAMA3], ids=["rope", "llama3"])
@pytest.mark.parametrize("tied", [False, True])
def test_causal_lm_is_hugging_faces(scaling, tied):
    transformers = pytest.importorskip("transformers")
    rope = {"rope_theta": 5000.0, **(scaling or {"rope_type": "default"})}
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_parameters=rope,
        rope_theta=5000.0,
        rope_scaling=scaling,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config)
    options = {"n_kv_heads": 2, "d_ff": 48, "norm_eps": 1e-6, "rope_theta": 5000.0, "rope_scaling": scaling}
    ours = PlainCausalLM(50, 2, 32, 4, tie_embeddings=tied, **options)
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randint(50, (2, 40))
    with torch.no_grad():
        want = theirs(tokens, labels=tokens)
        torch.testing.assert_close(ours(tokens), want.logits, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(ours.loss(tokens), want.loss)


@pytest.fixture(scope="module")
def results() -> Results:
    return compare.run([32, 64], d_model=32, n_heads=4, n_kv_heads=2, n_layers=2, repeats=2, batch=2)


class TestRun:
    def test_rows(self, results):
        assert results.lengths == [32, 64]
        assert results.variants == ["plain", "checkpoint", *SAVE_SETS, "streamed"] == list(compare.VARIANTS)
        for row in results.rows:
            assert row.error is None
            assert row.peak_bytes >= row.saved_bytes - 2 * row.length * 32 * 4  # the input is baseline
            assert (row.saved_bytes == 0) == (row.variant == "streamed")
            assert len(row.all_seconds) == 2 and row.seconds > 0
            assert (row.gradient_error is not None) == (row.length == 32)
            assert row.gradient_error is None or row.gradient_error < 1e-5

    def test_saved_bytes_are_arithmetic(self, results):
        spec = PlainBlock(32, 4, n_kv_heads=2).spec
        config = variants.Config(spec, {}, 2, 2, torch.float32, torch.device("cpu"))
        for row in results.rows:
            if row.variant in SAVE_SETS:
                want = config.saved_bytes(row.variant, row.length)
                assert abs(row.saved_bytes - want) <= 0.01 * want + 1024, row.variant

    def test_checkpoint_keeps_inputs_and_the_rope_tables(self, results):
        row = results.find(64, "checkpoint")
        inputs, tables = 2 * 2 * 64 * 32 * 4, 2 * 64 * 8 * 4
        assert inputs <= row.saved_bytes <= inputs + tables

    def test_order_of_memory(self, results):
        saved = [results.find(64, v).saved_bytes for v in ("plain", *SAVE_SETS)]
        assert saved == sorted(saved, reverse=True)

    def test_a_streamed_language_model_is_flat(self):
        found = compare.run(
            [128, 256], d_model=16, n_heads=2, vocab_size=40, tile=32, repeats=1, variants=["plain", "streamed"]
        )
        peaks = [found.find(n, "streamed").peak_bytes for n in (128, 256)]
        assert peaks[0] == peaks[1]
        assert any("0 B with streamed" in sentence for sentence in words.sentences(found))

    def test_causal_lm(self):
        found = compare.run(
            [16],
            d_model=16,
            n_heads=2,
            vocab_size=40,
            repeats=1,
            variants=["plain", "checkpoint", "attention", "input"],
        )
        assert all(row.error is None and row.gradient_error < 1e-4 for row in found.rows)
        assert "causal LM" in compare.sentences(found)[0] or "vocabulary 40" in compare.table(found).title

    def test_bfloat16_and_tile(self):
        found = compare.run(
            [64], d_model=32, n_heads=2, dtype=torch.bfloat16, tile=16, repeats=1, variants=["attention"]
        )
        assert [row.variant for row in found.rows] == ["attention"]
        assert found.rows[0].error is None

    def test_a_wrong_variant_stops_it(self, monkeypatch):
        forward = pyckpt.CkptTransformer.forward
        monkeypatch.setattr(pyckpt.CkptTransformer, "forward", lambda self, x: forward(self, x) * 1.01)
        with pytest.raises(RuntimeError, match="'attention' is wrong at S = 16"):
            compare.run([16], d_model=16, n_heads=2, variants=["plain", "attention"])

    def test_out_of_memory_is_a_row(self, monkeypatch):
        step = variants.Workload.step

        def failing(self, variant, batch):
            def run():
                if variant == "plain" and batch.x.shape[1] > 16:
                    raise torch.OutOfMemoryError("no more")
                step(self, variant, batch)()

            return run

        monkeypatch.setattr(variants.Workload, "step", failing)
        found = compare.run([16, 32], d_model=16, n_heads=2, repeats=1, variants=["plain", "checkpoint", "attention"])
        assert found.find(32, "plain").error == "out of memory"
        assert found.find(32, "attention").seconds > 0
        assert any("plain PyTorch fails: out of memory" in s for s in compare.sentences(found))

    def test_out_of_memory_while_timed_is_a_row(self, monkeypatch):
        """Memory that another process took meanwhile, say."""
        runs, step = [], variants.Workload.step

        def failing(self, variant, batch):
            def run():
                runs.append(variant)
                if variant == "checkpoint" and runs.count(variant) > 3:  # gradients, memory, one timed run
                    raise torch.OutOfMemoryError("no more")
                step(self, variant, batch)()

            return run

        monkeypatch.setattr(variants.Workload, "step", failing)
        found = compare.run([16], d_model=16, n_heads=2, repeats=3, variants=["plain", "checkpoint", "attention"])
        assert found.find(16, "checkpoint") == Row(16, "checkpoint", error="out of memory")
        for name in ("plain", "attention"):
            assert len(found.find(16, name).all_seconds) == 3
            assert found.find(16, name).gradient_error is not None

    @pytest.mark.parametrize("failing", ["plain", "attention"])
    def test_out_of_memory_of_gradients_is_a_note(self, failing, monkeypatch):
        gradients = variants.Workload.gradients

        def short(self, variant, batch):
            if variant == failing:
                raise torch.OutOfMemoryError("no more")
            return gradients(self, variant, batch)

        monkeypatch.setattr(variants.Workload, "gradients", short)
        found = compare.run([16], d_model=16, n_heads=2, repeats=1, variants=["plain", "attention"])
        assert all(row.error is None and row.seconds > 0 for row in found.rows)
        unchecked = "plain, attention" if failing == "plain" else "attention"
        assert found.notes == [f"Gradients of {unchecked} not checked: out of memory at S = 16."]
        assert found.find(16, "attention").gradient_error is None

    def test_a_batch_that_does_not_fit_is_rows(self, monkeypatch):
        batch = variants.Workload.batch

        def short(self, length):
            if length > 16:
                raise torch.OutOfMemoryError("no more")
            return batch(self, length)

        monkeypatch.setattr(variants.Workload, "batch", short)
        found = compare.run([16, 32], d_model=16, n_heads=2, repeats=1, variants=["plain", "attention"])
        assert all((row.error is None) == (row.length == 16) for row in found.rows)

    @pytest.mark.parametrize("error", [OSError(28, "no room in /tmp"), MemoryError("no room in /tmp")], ids=repr)
    def test_a_scratch_file_without_room_is_a_row(self, error, monkeypatch):
        step = variants.Workload.step

        def failing(self, variant, batch):
            def run():
                if variant == "streamed" and batch.x.shape[1] > 16:
                    raise error
                step(self, variant, batch)()

            return run

        monkeypatch.setattr(variants.Workload, "step", failing)
        options = {"d_model": 16, "n_heads": 2, "repeats": 1, "variants": ["plain", "streamed"]}
        found = compare.run([16, 32], **options)
        assert found.find(32, "streamed") == Row(32, "streamed", error="out of memory")
        assert found.find(32, "plain").seconds > 0
        assert found.notes == ["S = 32, streamed: no room in /tmp."]
        found = compare.run([32], **options)
        assert found.notes[0] == "Gradients of streamed not checked: out of memory at S = 32."

    def test_other_errors_of_the_system_pass(self, monkeypatch):
        def failing(self, variant, batch):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(variants.Workload, "step", failing)
        with pytest.raises(OSError, match="Input/output"):
            compare.run([16], d_model=16, n_heads=2, variants=["plain"])

    def test_other_errors_pass(self, monkeypatch):
        def failing(self, variant, batch):
            raise RuntimeError("a bug")

        monkeypatch.setattr(variants.Workload, "step", failing)
        with pytest.raises(RuntimeError, match="a bug"):
            compare.run([16], d_model=16, n_heads=2, variants=["plain"])

    def test_budget(self):
        found = compare.run([16, 32, 64], d_model=16, n_heads=2, repeats=3, budget_seconds=0.0, variants=["plain"])
        assert found.lengths == [16]
        assert len(found.rows[0].all_seconds) == 1
        assert found.notes == ["S = 32, 64 left out: the time budget is spent."]
        assert found.notes[0] in compare.sentences(found)

    @pytest.mark.parametrize(
        "bad",
        [
            {"lengths": []},
            {"lengths": [0]},
            {"lengths": [1.5]},
            {"variants": ["attentio"]},
            {"variants": []},
            {"repeats": 0},
            {"n_layers": 0},
            {"batch": 0},
            {"vocab_size": 1},  # whose gradients are all 0
            {"vocab_size": 2.5},
            *({"budget_seconds": value} for value in (-1.0, math.inf, math.nan)),
            *({"seed": value} for value in (-1, 1 << 63, 0.5)),
            {"n_heads": 5},
            {"mlp": "none"},
            {"tile": -1},
            {"dropout": 0.1},
            {"attention_dropout": 0.1},
            {"dtype": torch.int32},
            {"causal": False, "vocab_size": 9},
        ],
        ids=str,
    )
    def test_misuse(self, bad):
        with pytest.raises(ValueError):
            compare.run(**{"lengths": [16], "d_model": 16, "n_heads": 2, **bad})

    def test_what_cannot_be_compared_is_told(self):
        given = {"lengths": [16], "d_model": 16, "n_heads": 2}
        for name in ("dropout", "attention_dropout"):
            with pytest.raises(ValueError, match=rf"{name}=0\.1: each variant would drop other values.*leave it out"):
                compare.run(**given, **{name: 0.1})
        with pytest.raises(ValueError, match="causal=False with vocab_size: a causal LM sees no later tokens"):
            compare.run(**given, causal=False, vocab_size=9)
        for dtype in ("float32", None):
            with pytest.raises(TypeError, match=r"dtype must be a torch\.dtype, as torch\.bfloat16, got"):
                compare.run(**given, dtype=dtype)

    def test_of_causal_models_that_are_told_so(self):
        found = compare.run([16], 16, 2, vocab_size=9, causal=True, dropout=0.0, repeats=1, variants=["attention"])
        assert found.rows[0].error is None

    @pytest.mark.parametrize("vocab_size", [None, 9])
    def test_the_callers_random_numbers_go_on(self, vocab_size):
        before = torch.get_rng_state()
        compare.run([16], d_model=16, n_heads=2, vocab_size=vocab_size, repeats=1)
        assert torch.equal(torch.get_rng_state(), before)


def synthetic(**changes) -> Results:
    """Round figures, to read the words by."""
    figures = {
        "plain": (800, 700, 1.0),
        "checkpoint": (400, 50, 1.4),
        "attention": (200, 70, 1.1),
        "input": (160, 50, 1.3),
    }
    rows = [
        Row(n, v, n * peak * 1024, n * saved * 1024, n * t / 1000, 0.0, (n * t / 1000,) * 3)
        for n in (1000, 2000)
        for v, (peak, saved, t) in figures.items()
    ]
    config = variants.Config(PlainBlock(32, 4, **changes).spec, {}, 2, 1, torch.float32, torch.device("cpu"))
    return Results(config.to_dict(), "a CPU", {"torch": "2"}, rows)


class TestWords:
    def test_sentences(self):
        first, second, third = compare.sentences(synthetic())
        assert first == (
            'At S = 2000, save="attention" needs 4.0x less memory at its peak than plain PyTorch and keeps '
            "10.0x less from forward to backward, in 1.10x its time."
        )
        assert "2.0x less memory at its peak than torch.utils.checkpoint and keeps 1.4x more" in second
        assert "in 0.79x its time" in second
        assert third == (
            "Every 1000 tokens more raise the peak by 781 MiB with plain PyTorch, 391 MiB with "
            'torch.utils.checkpoint, 195 MiB with save="attention" and 156 MiB with save="input".'
        )

    def test_equal_figures_read_well(self):
        found = synthetic()
        found.rows = [dataclasses.replace(r, peak_bytes=1000, saved_bytes=1000) for r in found.rows if r.length == 1000]
        assert "needs about the same memory at its peak as plain" in compare.sentences(found)[0]
        assert "and keeps about as much from forward" in compare.sentences(found)[0]

    def test_streamed_keeps_nothing_on_the_device(self):
        found = synthetic()
        found.rows = [r for r in found.rows if r.variant == "plain"]
        found.rows += [dataclasses.replace(r, saved_bytes=0, variant="streamed") for r in found.rows]
        assert "and keeps nothing on the device from forward to backward" in compare.sentences(found)[0]

    def test_unsteady_machine(self):
        found = synthetic()
        found.rows = [dataclasses.replace(r, iqr_seconds=0.5 * r.seconds) for r in found.rows]
        assert "varied by 50%" in compare.sentences(found)[-1]

    def test_baselines_only(self):
        found = synthetic()
        found.rows = [r for r in found.rows if r.variant in ("plain", "checkpoint")]
        assert "torch.utils.checkpoint needs 2.0x less memory" in compare.sentences(found)[0]
        found.rows = [r for r in found.rows if r.variant == "plain"]
        assert len(compare.sentences(found)) == 1
        found.rows = [r for r in synthetic().rows if r.variant == "input"]
        assert len(compare.sentences(found)) == 1

    @pytest.mark.parametrize("changes", [{}, {"window": 7, "softcap": 3.0, "mlp": "gelu"}], ids=str)
    def test_table_fits_in_80_columns(self, changes):
        console = pytest.importorskip("rich.console").Console(width=80, record=True, file=io.StringIO())
        found = synthetic(**changes)
        found.rows += [Row(131072, v, error="out of memory") for v in ("plain", "attention+mid")]
        found.rows += [Row(131072, "attention+qkv", 99 * 2**30, 99 * 2**30, 99.99, 0.0, (99.99,))]
        compare.show(found, console)
        text = console.export_text()
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= 80
        assert 'save="attention+qkv"' in text and "OOM" in text
        if changes:
            assert "mlp gelu, window (7, 0), softcap 3.0" in " ".join(text.split())


class TestFiles:
    def test_json_and_back(self, results, tmp_path):
        path = results.save_json(tmp_path / "compare.json")
        assert [p.name for p in tmp_path.iterdir()] == ["compare.json"]
        assert Results.load_json(path) == dataclasses.replace(results, config=json.loads(json.dumps(results.config)))
        row = json.loads(path.read_text())["rows"][-1]
        assert row["peak_over_plain"] == pytest.approx(row["peak_bytes"] / results.find(64, "plain").peak_bytes)
        assert {"device", "versions", "config", "notes", "rows"} == json.loads(path.read_text()).keys()

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [{}]}', '{"rows": [{"length": 3}], "config": 1}'])
    def test_other_files(self, tmp_path, text):
        path = tmp_path / "x.json"
        path.write_text(text)
        with pytest.raises(ValueError, match="no results"):
            Results.load_json(path)

    def test_picture(self, results, tmp_path):
        pytest.importorskip("matplotlib")
        path = compare.plot(results, tmp_path / "compare.png")
        assert path.read_bytes().startswith(b"\x89PNG")
        assert [p.name for p in tmp_path.iterdir()] == ["compare.png"]

    def test_picture_of_parts(self, results, tmp_path):
        pytest.importorskip("matplotlib")
        few = dataclasses.replace(results, rows=[r for r in results.rows if r.variant != "plain" and r.length == 32])
        failed = Row(64, "attention", error="out of memory")
        compare.plot(dataclasses.replace(few, rows=[*few.rows, failed]), tmp_path / "few.png")
        with pytest.raises(ValueError, match="nothing to draw"):
            compare.plot(dataclasses.replace(few, rows=[failed]), tmp_path / "none.png")

    def test_labels_are_spread(self):
        assert _spread([0.0, 100.0], 10.0) == [0.0, 100.0]
        assert _spread([0.0, 0.0], 10.0) == [-5.0, 5.0]
        got = _spread([0.0, 1.0, 2.0, 30.0, 31.0], 10.0)
        assert all(b - a >= 10.0 - 1e-9 for a, b in itertools.pairwise(got))
        assert sum(got) == pytest.approx(sum([0.0, 1.0, 2.0, 30.0, 31.0]))


def test_device_and_versions():
    assert "thread" in runner.device_name(torch.device("cpu"))
    assert {"python", "torch"} <= runner.versions().keys()
