"""Swapped models whose sequences processes share, over gloo: the loss and gradients of one process."""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from typing import Any

import pytest
import torch
from blocks import relative_errors
from processes import gradients, mean_of_processes, needs_gloo, run_processes
from swap_models import FAMILIES, MIXTURES, SIZES, VOCAB, InFloat64, known, make_adapted, make_batch, make_model, step

import pyckpt

pytest.importorskip("transformers")

METHODS = ("ring", "all-to-all")
# Cut at their attention: RoPE, positions and masks come from the model's own forward.
CUT = ("DeepseekV3", "GraniteMoe", "Olmo")
OTHERS = ("Cohere2", "Exaone4", "Gemma", "Phi")  # standard blocks
ALLOWED = 1e-9  # of sums in float64, in another order, through a model


def batches() -> dict[str, dict[str, Any]]:
    """Of lengths that no number of processes divides, and of one that they do."""
    found = {kind: make_batch(kind) for kind in ("plain", "padded")}
    even = {n: torch.nn.functional.pad(t, (0, 1)) for n, t in found["padded"].items()}
    ids = torch.randint(1, VOCAB, (2, 20))
    positions = torch.stack([torch.cat([torch.arange(n) for n in cut]) for cut in ((5, 1, 14), (12, 8))])
    packed = {"input_ids": ids, "labels": ids, "position_ids": positions, "use_cache": False}
    odd = {n: t[:, 1:] if n != "use_cache" else t for n, t in packed.items()}
    divided = odd | {"num_items_in_batch": torch.tensor(17), "token_weight": torch.rand(2, 19)}
    weighed = even | {"token_weight": torch.rand(2, 20)}
    return found | {"even": even, "packed": packed, "divided": divided, "weighed": weighed}


def families_worker(rank: int, seed: int, families: tuple[str, ...], streamed: bool = False) -> None:
    draw = random.Random(seed)
    stream = {"stream": pyckpt.Stream(4)} if streamed else {}
    for family in families:
        torch.manual_seed(seed)
        model, given = make_model(family, torch.float64), batches()
        if family in CUT:  # whether packed rows cut their masks is not known of all: those then run again as a whole
            given = {kind: given[kind] for kind in ("plain", "padded", "even")}
        given = {kind: known(model, batch) for kind, batch in given.items()}
        print(f"rank {rank}: {family}", flush=True)
        pyckpt.swap(model, tile=7)
        with InFloat64():
            truth = {kind: step(model, batch) for kind, batch in given.items()}
        pyckpt.unswap(model)
        for method in METHODS:
            context = pyckpt.ContextParallel(method=method)
            report = pyckpt.swap(model, tile=7, context=context, **stream)
            how = f"shared by 2 processes, {method}" + ("; streamed from the token ids on" if streamed else "")
            assert how in report.entries[-1].why
            few = draw.sample(sorted(given), 2) if len(families) > 3 else given  # others in another run
            for kind in few:
                batch = given[kind]
                with InFloat64():
                    errors = relative_errors(mean_of_processes(step(model, batch)), truth[kind])
                allowed = 1e-6 if family in CUT else ALLOWED  # in the backward transformers' norms are in float32
                assert max(errors.values()) < allowed, (family, method, kind, errors)
            pyckpt.unswap(model)


def axes_worker(rank: int, seed: int) -> None:
    """Positions of three axes, of a language model alone: one with images is not shared."""
    import transformers

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
    kinds = ["sliding_attention", "full_attention"]
    options = {"head_dim": 12, "layer_types": kinds, "sliding_window": 7, "rope_parameters": dict.fromkeys(kinds, rope)}
    config = transformers.CohereCompassTextConfig(**SIZES, **options)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = transformers.CohereCompassForCausalLM(config).double()
    ids, positions = torch.randint(1, VOCAB, (2, 19)), torch.randint(0, 60, (3, 2, 19))
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}
    given = [batch | {"position_ids": positions}, batch]
    with InFloat64():
        truth = [step(model, batch) for batch in given]
    for method in METHODS:
        for how in ({}, {"stream": pyckpt.Stream(4)}, {"segments": 2}):
            pyckpt.swap(model, tile=7, context=pyckpt.ContextParallel(method=method), **how)
            for batch, want in zip(given, truth, strict=True):
                with InFloat64():
                    errors = relative_errors(mean_of_processes(step(model, batch)), want)
                assert max(errors.values()) < 1e-6, (method, how, errors)  # the truth has float32's tables of RoPE
            pyckpt.unswap(model)


@needs_gloo
def test_positions_of_three_axes(seed):
    run_processes(2, axes_worker, seed)


@needs_gloo
def test_families(seed):
    run_processes(2, families_worker, seed, ("Llama", "GPT2", "Gemma3"))


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
def test_other_families(streamed, seed):
    """Half of them, others in another run."""
    families = list(dict.fromkeys((*FAMILIES, *MIXTURES, *CUT, *OTHERS)))
    few = random.Random(seed).sample(families, len(families) // 2)
    run_processes(2, families_worker, seed, tuple(few), streamed)


def by_wrapper(kind: str, model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A step of a swapped model under DDP or FSDP2, whose gradients are means over the processes."""
    from torch.distributed.fsdp import fully_shard

    if kind == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    else:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def ways_worker(rank: int, seed: int) -> None:
    """LoRA, segments, DDP and FSDP2, single losses, what runs whole in every process, and what is refused."""
    torch.manual_seed(seed)
    model, batch = make_model("Phi3", torch.float64), make_batch("plain")
    context = pyckpt.ContextParallel()
    with InFloat64():
        truth = step(model, batch)
    truth_of_compiled = {n if n == "loss" else f"_orig_mod.{n}": t for n, t in truth.items()}

    def agrees(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], what: str) -> None:
        errors = relative_errors(got, want)
        assert max(errors.values()) < ALLOWED, (what, errors)

    with InFloat64():
        for options in ({"segments": 2}, {"loss": "recompute", "save": "input"}):
            twin = copy.deepcopy(model)
            pyckpt.swap(twin, context=context, **options)
            agrees(mean_of_processes(step(twin, batch)), truth, str(options))
            losses = pyckpt.token_losses(twin, batch["input_ids"])
            pyckpt.unswap(twin)
            pyckpt.swap(twin)
            torch.testing.assert_close(losses, pyckpt.token_losses(twin, batch["input_ids"]))

        adapted = make_adapted(copy.deepcopy(model), target_modules=["qkv_proj", "down_proj", "lm_head"])
        want = step(adapted, batch)
        pyckpt.swap(adapted, context=context)
        agrees(mean_of_processes(step(adapted, batch)), want, "LoRA")

        twin = copy.deepcopy(model)
        pyckpt.swap(twin, context=context)
        agrees(mean_of_processes(step(copy.deepcopy(twin), batch)), truth, "a copy")
        with pytest.raises(TypeError, match=r"a ContextParallel can't be pickled.*unswap"):
            pickle.dumps(twin)
        agrees(by_wrapper("ddp", twin, batch), truth, "ddp")

        twin = copy.deepcopy(model)
        pyckpt.swap(twin, context=context)
        agrees(mean_of_processes(step(torch.compile(twin, backend="eager"), batch)), truth_of_compiled, "compiled")

        twin = copy.deepcopy(model)
        pyckpt.swap(twin, context=context)
        agrees(by_wrapper("fsdp2", twin, batch), truth, "fsdp2")

        twin = copy.deepcopy(model)
        pyckpt.swap(twin, context=context)
        for kind in ("packed", "padded"):  # single losses of rows that are one while they are shared
            given = make_batch(kind)
            agrees(mean_of_processes(step(twin, given)), step(copy.deepcopy(model), given), kind)
            alone = copy.deepcopy(model)
            pyckpt.swap(alone)
            given = {n: t for n, t in given.items() if n != "use_cache"}
            torch.testing.assert_close(pyckpt.token_losses(twin, **given), pyckpt.token_losses(alone, **given))

        twin = copy.deepcopy(model)
        pyckpt.swap(twin, context=context)
        with pytest.warns(UserWarning, match="there are no labels: such a call runs whole in every process"):
            logits = twin(input_ids=batch["input_ids"], use_cache=False).logits
        torch.testing.assert_close(logits, model(input_ids=batch["input_ids"], use_cache=False).logits)
        both = twin(**batch, output_logits=True)
        torch.testing.assert_close(both.logits, logits)
        torch.testing.assert_close(both.loss, truth["loss"])
        both.loss.backward()  # of all tokens in every process: the mean is right as well
        agrees(
            mean_of_processes({n: p.grad for n, p in twin.named_parameters()}),
            {n: truth[n] for n in truth if n != "loss"},
            "whole",
        )
        with torch.no_grad():
            found = twin.eval()(**batch)
            assert found.logits is None
            torch.testing.assert_close(found.loss, truth["loss"])
        options = {"max_new_tokens": 5, "do_sample": False}
        again = twin.generate(batch["input_ids"], **options)
        assert torch.equal(again, model.eval().generate(batch["input_ids"], **options))

    model.train(), twin.train()
    for name, change in (
        ("hidden states", {"output_hidden_states": True}),
        ("a hook", {}),
    ):
        if name == "a hook":  # it may mix tokens, as NEFTune's noise is scaled by their number
            twin.model.embed_tokens.register_forward_hook(lambda _, __, y: y - y.mean(1, keepdim=True))
            model.model.embed_tokens.register_forward_hook(lambda _, __, y: y - y.mean(1, keepdim=True))
        with pytest.warns(UserWarning, match="such a call runs whole in every process"), InFloat64():
            found, want = twin(**batch, **change), model(**batch, **change)
        torch.testing.assert_close(found.loss, want.loss)
        if change:
            assert [h.shape for h in found.hidden_states] == [h.shape for h in want.hidden_states]
    twin.model.embed_tokens._forward_hooks.clear(), model.model.embed_tokens._forward_hooks.clear()
    # What stands in one process's part alone is an error in all, which would wait for it.
    odd = batch["input_ids"].clone()
    odd[0, 7] = VOCAB
    for given in ({"input_ids": odd, "labels": batch["labels"]}, {"input_ids": batch["input_ids"], "labels": odd}):
        with pytest.raises(ValueError, match=f"{VOCAB} is out of range"):
            twin(**given)
    other = copy.deepcopy(model)
    pyckpt.swap(other, context=pyckpt.ContextParallel())
    with pytest.raises(ValueError, match="not given the same: 1 of this group have other input_ids, labels than 0"):
        other(**{n: (t + rank) % VOCAB for n, t in batch.items()})
    learned = make_model("GPT2")  # with a table of 64 positions, of which one process alone would go beyond
    for stream in (None, pyckpt.Stream(8)):
        pyckpt.swap(learned, context=context, stream=stream)
        ids = torch.randint(1, VOCAB, (1, 70), generator=torch.Generator().manual_seed(0))
        for given in ({"input_ids": ids}, {"input_ids": ids[:, :20], "position_ids": torch.arange(50, 70)[None]}):
            with pytest.raises(ValueError, match="position 69 is out of range: the model has a table of 64 positions"):
                learned(**given, labels=given["input_ids"])
        pyckpt.unswap(learned)
    odd = make_model("Llama", num_attention_heads=3, num_key_value_heads=3, hidden_size=48)
    with pytest.raises(ValueError, match="3 heads can't be dealt out evenly to 2 processes"):
        pyckpt.swap(odd, context=pyckpt.ContextParallel(method="all-to-all"))
    assert "forward" not in odd.__dict__
    with pytest.raises(
        ValueError, match=r"labels have shape \(2, 7\), expected those of the whole sequences, \(2, 19\)"
    ):
        twin(input_ids=batch["input_ids"], labels=batch["labels"][:, :7])
    for family, why in (("Bloom", r"some of its layers.*transformer\.h\.0: "), ("Qwen3Next", "some of its layers")):
        other = make_model(family)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ValueError, match=f"processes can't share the sequences of a {family}.*{why}"):
                pyckpt.swap(other, context=context)
        assert "forward" not in other.__dict__
    with pytest.raises(ValueError, match="context and loss=False don't go together"):
        pyckpt.swap(copy.deepcopy(model), context=context, loss=False)
    with pytest.raises(ValueError, match="context= takes causal language models"):
        pyckpt.swap(copy.deepcopy(model).model, context=context)


@needs_gloo
def test_ways(seed):
    run_processes(2, ways_worker, seed)


def streamed_ways_worker(rank: int, seed: int) -> None:
    """The same of streamed runs."""
    torch.manual_seed(seed)
    model, batch = make_model("Phi3", torch.float64), make_batch("plain")
    shared = {"context": pyckpt.ContextParallel(), "stream": pyckpt.Stream(4)}
    with InFloat64():
        truth = step(model, batch)
        want = {n: t for n, t in truth.items() if n != "loss"}

        def agrees(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], what: str) -> None:
            errors = relative_errors(got, want)
            assert max(errors.values()) < ALLOWED, (what, errors)

        for options in ({"segments": 2}, {"save": "input"}):
            twin = copy.deepcopy(model)
            pyckpt.swap(twin, **shared, **options)
            agrees(mean_of_processes(step(twin, batch)), truth, str(options))
        found = shared["stream"].estimate(twin, 64)  # of one of the processes
        assert found == shared["stream"].estimate(twin, 64, context=shared["context"])
        pyckpt.unswap(twin)
        pyckpt.swap(twin, stream=shared["stream"], save="input")
        assert found.store_bytes == shared["stream"].estimate(twin, 64).store_bytes / 2
        pyckpt.unswap(twin)
        pyckpt.swap(twin, **shared)
        losses = pyckpt.token_losses(twin, batch["input_ids"])
        pyckpt.unswap(twin)
        pyckpt.swap(twin)
        torch.testing.assert_close(losses, pyckpt.token_losses(twin, batch["input_ids"]))

        adapted = make_adapted(copy.deepcopy(model), target_modules=["qkv_proj", "down_proj"])
        of_adapters = step(adapted, batch)
        pyckpt.swap(adapted, **shared)
        agrees(mean_of_processes(step(adapted, batch)), of_adapters, "LoRA")
        adapted = make_adapted(copy.deepcopy(model), target_modules=["qkv_proj", "lm_head"])
        with pytest.raises(ValueError, match=r"can't share the streamed sequences.*LoRA adapters.*Leave stream or"):
            pyckpt.swap(adapted, **shared)

        twin = copy.deepcopy(model)
        pyckpt.swap(twin, **shared)
        agrees(by_wrapper("ddp", twin, batch), truth, "ddp")

        twin = copy.deepcopy(model)
        pyckpt.swap(twin, **shared)
        agrees(by_wrapper("fsdp2", twin, batch), truth, "fsdp2")

        twin = copy.deepcopy(model)
        pyckpt.swap(twin, **shared)
        embedded = {"inputs_embeds": twin.model.embed_tokens(batch["input_ids"]), "labels": batch["labels"]}
        with pytest.warns(UserWarning, match="not what surrounds them, in every process all tokens"):
            loss = twin(**embedded).loss
        loss.backward()
        agrees(mean_of_processes({n: p.grad for n, p in twin.named_parameters()}), want, "embeddings")
        with pytest.warns(UserWarning, match="a call that is not streamed runs whole in every process"):
            loss = twin(**batch, output_attentions=True).loss
        torch.testing.assert_close(loss.detach(), truth["loss"])
        with pytest.raises(ValueError, match="the processes that share a sequence were not given the same"):
            other = copy.deepcopy(model)
            pyckpt.swap(other, context=pyckpt.ContextParallel(), stream=pyckpt.Stream(4))
            other(**{n: (t + rank) % VOCAB for n, t in batch.items()})
        with pytest.raises(ValueError, match="expected those of the whole sequences"):
            twin(input_ids=batch["input_ids"], labels=batch["labels"][:, :7])
        packed, whole = make_batch("packed"), copy.deepcopy(model)  # 30 tokens, which a stream pads
        agrees(mean_of_processes(step(twin, packed)), step(whole, packed), "packed")


@needs_gloo
def test_streamed_ways(seed):
    run_processes(2, streamed_ways_worker, seed)


def trainer_worker(rank: int, shared: bool, folder: str) -> None:
    """Three steps, of two micro-batches each, by a Trainer that hands all processes the same rows."""
    from torch.utils.data import DataLoader, DistributedSampler
    from transformers import Trainer, TrainingArguments

    class SharedTrainer(Trainer):
        def get_train_dataloader(self) -> Any:
            sampler = DistributedSampler(self.train_dataset, num_replicas=1, rank=0, shuffle=False)
            return DataLoader(self.train_dataset, 2, sampler=sampler, collate_fn=self.data_collator)

    torch.manual_seed(0)
    model, ids = make_model("Llama"), torch.randint(1, VOCAB, (8, 18))
    rows = [{"input_ids": row, "labels": row} for row in ids.tolist()]
    options = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    options |= {"max_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    # With Adam's own epsilon a weight whose gradient is nearly all rounding would take a whole step, either way.
    options |= {"learning_rate": 1e-2, "adam_epsilon": 1e-2, "ddp_backend": "gloo"}
    arguments = TrainingArguments(f"{folder}/{rank}", **options)
    pyckpt.swap(model, context=pyckpt.ContextParallel() if shared else None)
    trainer = SharedTrainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    if rank == 0:
        losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
        torch.save((torch.tensor(losses), model.state_dict()), f"{folder}/{shared}.pt")


@needs_gloo
@pytest.mark.slow
def test_under_trainer(tmp_path):
    """Gradients and losses are divided as for one process, though it counts the tokens of both."""
    pytest.importorskip("accelerate")
    run_processes(2, trainer_worker, True, str(tmp_path))
    run_processes(1, trainer_worker, False, str(tmp_path))
    (ours, ours_state), (one, one_state) = (torch.load(tmp_path / f"{shared}.pt") for shared in (True, False))
    assert len(one) == 3
    torch.testing.assert_close(ours, one, rtol=1e-5, atol=0.0)  # float32, summed in another order
    for name, p in one_state.items():
        torch.testing.assert_close(ours_state[name], p, rtol=1e-4, atol=1e-5, msg=name)
