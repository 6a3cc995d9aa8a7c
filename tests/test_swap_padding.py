"""What padding gives in a swapped model: what it gives in transformers, since labels may be the padded input_ids."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import pytest
import torch
from blocks import assert_same_bits
from helpers import assert_exact
from swap_models import InFloat64, assert_step_as_good, make_batch, make_model, step
from torch import Tensor

import pyckpt
from pyckpt.swap import masks
from pyckpt.swap.masks import Sight
from pyckpt.swap.modules import UnsupportedCallError

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("no_fallback")
SEQ = 13
ROWS = {"left": (4, SEQ), "right": (0, 8), "both": (3, 9), "one token": (6, 7), "nothing": (0, 0), "none": (0, SEQ)}


def mask_of(*rows: str) -> Tensor:
    mask = torch.zeros(len(rows), SEQ, dtype=torch.long)
    for row, name in zip(mask, rows, strict=True):
        row[slice(*ROWS[name])] = 1
    return mask


def visible(cu: Tensor, causal: bool) -> Tensor:
    """(T, T) bool of a layout whose keys have starts of their own, sequence by sequence."""
    seen = torch.zeros(int(cu[0, -1]), int(cu[1, -1]), dtype=torch.bool)
    for (a, b), (c, d) in zip(*(itertools.pairwise(starts.tolist()) for starts in cu), strict=True):
        part = torch.ones(b - a, d - c, dtype=torch.bool)
        seen[a:b, c:d] = part.tril() if causal else part
    return seen


@pytest.mark.parametrize("tokens", ["before", "all", "none"])
def test_the_layout_is_the_mask(tokens):
    mask = mask_of(*ROWS)
    cu = masks.packed(mask, None, len(mask), SEQ, Sight(tokens))
    assert cu.dtype == torch.int32 and tuple(cu.shape) == (2, 5 * len(mask) + 1)
    assert bool((cu.diff() >= 0).all()) and cu[:, -1].tolist() == [mask.numel()] * 2
    want = mask.bool()[:, None].expand(-1, SEQ, -1)
    if tokens != "all":
        want = want & torch.ones(SEQ, SEQ, dtype=torch.bool).tril()
    if tokens == "none":
        want = want & mask.bool()[:, :, None]
    assert torch.equal(visible(cu, tokens != "all"), torch.block_diag(*want).bool())


def test_padding_that_nobody_reads_sees_nothing():
    mask = mask_of("left", "right", "both")
    read = mask.bool()
    hidden, shown = (masks.packed(mask, None, 3, SEQ, Sight(t, None, read)) for t in ("none", "before"))
    assert torch.equal(hidden, shown)
    read = read.clone()
    read[1, -1] = True  # the last label of a row of padded input_ids
    read[0, 3] = True  # what comes before the tokens sees nothing in any case
    shown = masks.packed(mask, None, 3, SEQ, Sight("before", None, read))
    assert torch.equal(shown, masks.packed(mask, None, 3, SEQ, Sight("before")))


@pytest.mark.parametrize(
    ("row", "token", "reach", "blind"),
    [("left", 3, 2**40, True), ("left", 4, 3, False), ("right", 12, 4, True), ("right", 12, 5, False)],
)
def test_padding_that_sees_nothing_is_found(row, token, reach, blind):
    mask, read = mask_of(row), torch.zeros(1, SEQ, dtype=torch.bool)
    read[0, token] = True
    if not blind:
        assert masks.packed(mask, None, 1, SEQ, Sight("before", reach, read)) is not None
        return
    with pytest.raises(UnsupportedCallError, match="padding that sees no token, and is read"):
        masks.packed(mask, None, 1, SEQ, Sight("before", reach, read))


WINDOWED = {"Mistral": {"sliding_window": 5}, "Qwen3": {}, "Olmo": {}, "GptOss": {"attn_implementation": "eager"}}


@pytest.mark.parametrize("family", WINDOWED)
def test_logits_of_every_token(family):
    """On the standard path, the generic one, and that of unknown classes; with a window that padding looks out of."""
    model = make_model(family, torch.float64, **WINDOWED[family]).double()
    mask = mask_of("left", "right", "both", "one token", "none")
    ids = torch.randint(1, 20, mask.shape)
    with InFloat64():
        before = model(ids, attention_mask=mask).logits
        assert not pyckpt.swap(model, tile=10).left
        assert_exact(model(ids, attention_mask=mask).logits, before, terms=float(before.abs().max()))


def test_hidden_states_of_padding_that_the_loss_does_not_read():
    model, batch = make_model("Llama", torch.float64).double(), make_batch("padded")
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    with InFloat64():
        before = model(**batch, output_hidden_states=True).hidden_states
        pyckpt.swap(model)
        after = model(**batch, output_hidden_states=True).hidden_states
    for ours, truth in zip(after, before, strict=True):
        assert_exact(ours, truth)


def test_rows_of_padding_alone_do_no_harm():
    model = make_model("Llama")
    mask = mask_of("nothing", "right")
    ids = torch.randint(1, 20, mask.shape)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    alone = step(model, {n: t[1:] for n, t in batch.items()})
    pyckpt.swap(model, tile=10)
    for name, t in step(model, batch).items():
        torch.testing.assert_close(t, alone[name])


def eager(mask: Tensor, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    ids = torch.randint(1, 20, mask.shape)
    model = make_model("Mistral", attn_implementation="eager", **options)
    return model, {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}


@pytest.mark.parametrize(("row", "window"), [("left", 50), ("right", 3)])
def test_what_eager_attention_gives_padding_that_sees_nothing(row, window):
    """The same share of every token of the row: the layers run again as a whole, where that is read."""
    model, batch = eager(mask_of(row, "none"), sliding_window=window)
    before = step(model, batch)
    pyckpt.swap(model, loss=False)
    with pytest.warns(UserWarning, match=r"padding that sees no token.* under eager attention.* again as a whole"):
        after = step(model, batch)
    assert all(torch.equal(t, before[n]) for n, t in after.items())


def test_eager_attention_with_padding_that_sees_something_or_is_not_read():
    model, batch = eager(mask_of("right", "both"), sliding_window=50)
    batch["labels"][1, :4] = -100
    exact = copy.deepcopy(model).double()
    with InFloat64():
        truth = step(exact, batch)
    plain = step(model, batch)
    pyckpt.swap(model, tile=10)
    assert_step_as_good(step(model, batch), plain, truth, torch.float32)


def test_flash_attention_is_handed_no_padding():
    """It gives zeros there, of which the layers make what they do of nothing else."""
    model, mask = make_model("Llama"), mask_of("left", "right", "both")
    pyckpt.swap(model)
    model.config._attn_implementation = "flash_attention_2"
    decoder = model.model.__dict__["forward"]
    call = decoder.prepare({"input_ids": mask, "attention_mask": mask, "use_cache": False}, None)
    assert torch.equal(call.cu_seqlens, masks.packed(mask, None, 3, SEQ, Sight("none")))


def toy_flash(module, q, k, v, mask, scaling=None, position_ids=None, cu_seq_lens_q=None, max_length_q=None, **_):
    """Causal attention that is cut where transformers cuts flash attention."""
    from transformers import modeling_flash_attention_utils as flash

    batch, _, seq, _ = q.shape
    assert mask is None
    starts = torch.arange(0, batch * seq + 1, seq)
    if cu_seq_lens_q is not None and max_length_q is not None:
        starts = cu_seq_lens_q
    elif flash._is_packed_sequence(position_ids, batch):
        starts = flash.prepare_fa_kwargs_from_position_ids(position_ids)[0][0]
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    q, k, v = (t.transpose(0, 1).flatten(1, 2) for t in (q, k, v))
    token = torch.arange(batch * seq)
    row = torch.bucketize(token, starts.long(), right=True)
    seen = (row[:, None] == row) & (token[:, None] >= token)
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scaling)
    return o.unflatten(1, (batch, seq)).permute(1, 2, 0, 3), None


ROW = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3]])
FLASH = {
    "a cache by default": {"position_ids": ROW},
    "a mask of ones": {"position_ids": ROW, "attention_mask": torch.ones_like(ROW)},
    "positions with gaps": {"position_ids": ROW.sort().values * 3},
    "two rows": {"position_ids": ROW.expand(2, -1)},
    "lengths alone": {"lengths": [0, 5, 12]},
    "lengths of two rows": {"position_ids": ROW.expand(2, -1), "lengths": [0, 5, 12, 14, 24]},
}


@pytest.mark.parametrize("family", ["Llama", "Glm"])
@pytest.mark.parametrize("what", FLASH)
def test_what_cuts_flash_attention(what, family, monkeypatch):
    from transformers import masking_utils, modeling_utils

    monkeypatch.setitem(modeling_utils.ALL_ATTENTION_FUNCTIONS._local_mapping, "toy_flash", toy_flash)
    flash_mask = masking_utils.flash_attention_mask
    monkeypatch.setitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._local_mapping, "toy_flash", flash_mask)
    model, batch = make_model(family), dict(FLASH[what])
    model.config._attn_implementation = "toy_flash"
    rows = 2 if "two rows" in what else 1
    batch["input_ids"] = batch["labels"] = torch.randint(1, 61, (rows, 12))
    if (lengths := batch.pop("lengths", None)) is not None:
        starts = torch.tensor(lengths, dtype=torch.int32)
        longest = int(starts.diff().max())
        batch |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
    plain = step(copy.deepcopy(model), batch)
    pyckpt.swap(model, tile=10)
    found = step(model, batch)
    for name, value in plain.items():  # float32's roundings, against another mask's tenths
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keys", [[0, 3, 11], [0, 4, 12]])
def test_lengths_that_are_not_one_layout_are_refused(keys):
    lengths = {"cu_seq_lens_q": torch.tensor([0, 3, keys[-1]]), "cu_seq_lens_k": torch.tensor(keys)}
    with pytest.raises(UnsupportedCallError, match="differ, or leave out"):
        masks.given_lengths(lengths, 12)


def test_a_graph_says_what_it_cannot_do():
    model, batch = eager(mask_of("left", "right"))
    pyckpt.swap(model)
    with pytest.raises(RuntimeError, match=r"padding that sees no token.* came to a compiled model.*pyckpt\.unswap"):
        torch.compile(model, backend="eager", fullgraph=True)(**batch)


def test_the_losss_padding_costs_no_attention():
    """With labels of -100 there, queries of padding meet no key."""
    seen: list[Any] = []
    batch = make_batch("padded")
    model = make_model("Llama")
    pyckpt.swap(model)
    decoder = model.model.__dict__["forward"]
    prepare = decoder.prepare
    decoder.prepare = lambda *args: seen.append(prepare(*args)) or seen[-1]
    step(model, batch)
    step(model, batch | {"labels": batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)})
    pairs = [int(visible(call.cu_seqlens, True).sum()) for call in seen]
    lengths = batch["attention_mask"].sum(1)
    assert pairs[1] == int((lengths * (lengths + 1) // 2).sum()) < pairs[0]


# --- masks (B, 1, S, S) ----------------------------------------------------------------------------------------------


def dense(mask: Tensor, window: int = -1, number: float | None = None) -> Tensor:
    """(B, 1, S, S) of a mask (B, S): bool, or what is added to scores, with this number where a key is hidden."""
    token = torch.arange(mask.shape[1])
    distance = token[:, None] - token
    seen = (distance >= 0) & ((distance <= window) | (window < 0))
    allowed = (seen & mask.bool()[:, None])[:, None]
    return allowed if number is None else torch.zeros(allowed.shape).masked_fill(~allowed, number)


def assert_runs_the_original(model: Any, batch: dict[str, Any], said: str) -> None:
    before = step(model, batch)
    pyckpt.swap(model, loss=False)
    with pytest.warns(UserWarning, match=said):
        after = step(model, batch)
    assert_same_bits(after, before)


@pytest.mark.parametrize("number", [None, float("-inf"), torch.finfo(torch.float32).min, -1e9])
@pytest.mark.parametrize("kind", ["plain", "padded"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_whole_mask_that_is_causal(kind, number, implementation):
    """Is what its rows of tokens and padding are, and is not read again."""
    if implementation == "sdpa" and kind == "padded" and number == float("-inf"):
        number = -1e30  # what sees nothing is not a number in either
    if implementation == "eager" and number is None:
        pytest.skip("transformers' eager attention adds bools to the scores as numbers")
    model, batch = make_model("Llama", attn_implementation=implementation), make_batch(kind)
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    if kind == "padded":
        mask = mask.clone()
        mask[:, 0] = 1  # under eager attention what sees nothing attends to all alike
        mask = mask.cummin(1).values
        batch["labels"] = batch["input_ids"].masked_fill(mask == 0, -100)
    batch["attention_mask"] = dense(mask, number=number)
    with InFloat64():
        truth = step(
            copy.deepcopy(model).double(), {n: t.double() if t.is_floating_point() else t for n, t in batch.items()}
        )
    plain = step(model, batch)
    pyckpt.swap(model)
    assert model(**batch).logits is None
    assert_step_as_good(step(model, batch), plain, truth, torch.float32)


@pytest.mark.parametrize("read", [False, True], ids=["not read", "read"])
def test_numbers_that_hide_all_that_a_query_sees(read):
    """Are one number for all keys, so that it attends to all alike, under sdpa too: nothing that a block computes."""
    model, batch = make_model("Llama", attn_implementation="sdpa"), make_batch("plain")
    mask = torch.ones_like(batch["input_ids"])
    mask[:, :3] = 0
    batch["attention_mask"] = dense(mask, number=-1e30)
    first = torch.arange(mask.shape[1]) < 4  # of a label the token before is read
    batch["labels"] = batch["input_ids"] if read else batch["input_ids"].masked_fill(first, -100)
    before = step(model, batch)
    pyckpt.swap(model)
    if read:
        with pytest.warns(UserWarning, match="padding that sees no token, and is read"):
            after = step(model, batch)
    else:
        after = step(model, batch)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("what", ["sees ahead", "window", "hole", "numbers", "packed", "shape"])
def test_any_other_whole_mask_runs_the_original(what):
    model, batch = make_model("Llama"), make_batch("plain")
    seq = batch["input_ids"].shape[1]
    mask = dense(torch.ones(2, seq))
    if what == "sees ahead":
        mask[1, 0, 3, 4] = True
    elif what == "window":
        mask = dense(torch.ones(2, seq), window=5)
    elif what == "hole":
        mask[0, 0, 7, 2] = False
    elif what == "numbers":
        mask = dense(torch.ones(2, seq), number=-1e9)
        mask[0, 0, 7, 2] = -0.5
    elif what == "packed":
        mask[:, :, 8:, :8] = False
    else:
        mask = mask.expand(2, 4, seq, seq)
    batch["attention_mask"] = mask
    assert_runs_the_original(model, batch, "an attention_mask .* again as a whole in the backward")


def test_bools_that_eager_attention_adds_to_the_scores_are_no_mask():
    model, batch = make_model("Llama", attn_implementation="eager"), make_batch("plain")
    batch["attention_mask"] = dense(torch.ones_like(batch["input_ids"]))
    assert_runs_the_original(model, batch, "an attention_mask of bools, which eager attention adds")


def test_masks_by_the_layers_types():
    """As models that see hand them to their text models: each layer's own has to be causal, with its window."""
    model, batch = make_model("Gemma2"), make_batch("padded")
    seq, types = batch["input_ids"].shape[1], model.config.layer_types
    assert len(set(types)) == 2
    tokens = torch.ones(2, seq)
    tokens[0, seq - 4 :] = 0
    reach = model.config.sliding_window - 1
    whole = {"full_attention": dense(tokens), "sliding_attention": dense(tokens, reach)}
    batch = {"input_ids": batch["input_ids"], "labels": batch["input_ids"].masked_fill(tokens == 0, -100)}
    before = step(model, {**batch, "attention_mask": tokens.long()})
    inner = {**batch, "attention_mask": {kind: torch.where(t, 0.0, -1e30) for kind, t in whole.items()}}
    plain = step(model, inner)
    pyckpt.swap(model)
    for name, value in step(model, inner).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(value, before[name], rtol=1e-4, atol=1e-5)
    pyckpt.unswap(model)
    pyckpt.swap(model, loss=False)
    other = {
        **inner,
        "attention_mask": {**inner["attention_mask"], "sliding_attention": inner["attention_mask"]["full_attention"]},
    }
    with pytest.warns(UserWarning, match="that is not the causal one"):
        step(model, other)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_no_mask_for_some_types_of_layers(implementation):
    """Is causal without a window under sdpa, and no mask at all under eager attention."""
    model, batch = make_model("Gemma3", attn_implementation=implementation, sliding_window=4), make_batch("plain")
    batch["attention_mask"] = {"full_attention": None, "sliding_attention": None}
    assert_runs_the_original(model, batch, "an attention_mask that is None for layers of some type")


# --- packed sequences and caches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Gemma3", "Mixtral", "StableLm"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_packed_sequences_under_checkpointing_that_makes_no_cache(family, when):
    """transformers leaves the cache out where its checkpointing is on, and then looks at positions."""
    model, ids = make_model(family), torch.randint(1, 61, (2, 19))
    positions = torch.cat([torch.arange(8), torch.arange(11)]).expand(2, 19)
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
    plain = copy.deepcopy(model)
    for m in (model, plain):
        if when == "before":
            m.gradient_checkpointing_enable()
    whole = step(plain, batch)["loss"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pyckpt.swap(model, tile=7)
        for m in (model, plain):
            m.gradient_checkpointing_enable()
        found, truth = step(model, batch), step(plain, batch)
        if when == "after":
            assert not torch.allclose(whole, truth["loss"])  # sequences saw each other
        for name, value in truth.items():
            torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-4)
        with torch.no_grad():
            a, b = (m(**batch).loss for m in (model, plain))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
