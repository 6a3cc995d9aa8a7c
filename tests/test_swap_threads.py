"""Swapped models whose modules others look at, or run, while a call of them runs."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from swap_models import VOCAB, make_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pyckpt
from pyckpt.swap.apart import apart
from pyckpt.swap.by_thread import ByThread

transformers = pytest.importorskip("transformers")

FAMILIES = ["Mixtral", "Olmo", "Llama"]  # the modules of a family's layers, a class without a table, our kernels


class Looking(TorchDispatchMode):
    """At each product, looks whether the model's parameters and buffers are where they belong."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.products = 0
        self._tensors = [(m, had, dict(had)) for m in model.modules() for had in (m._parameters, m._buffers)]

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.products += 1
            for module, now, then in self._tensors:
                assert now.keys() == then.keys() and all(now[n] is t for n, t in then.items()), type(module).__name__
        return op(*args, **(kwargs or {}))


def adapted(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def gradients(model: Any, ids: Tensor) -> list[Tensor]:
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    leaves = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [loss.detach(), *(torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found, strict=True))]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_models_weights_stay_where_they_are(family, lora):
    """A state dict that another thread asks for is that of the model at any time."""
    model = adapted(make_model(family)) if lora else make_model(family)
    pyckpt.swap(model.train())
    with Looking(model) as looking:
        gradients(model, torch.randint(3, VOCAB, (2, 10)))
    assert looking.products


@pytest.fixture
def in_turns() -> Iterator[None]:
    """Threads give way to each other every 10 microseconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("in_turns")
@pytest.mark.parametrize("family", FAMILIES)
def test_two_threads_run_one_model(family):
    model = make_model(family).train()
    pyckpt.swap(model)
    ids = [torch.randint(3, VOCAB, (2, seq)) for seq in (17, 30)]
    wanted = [gradients(model, i) for i in ids]
    weights = [id(p) for p in model.parameters()]
    failed: list[BaseException] = []

    def work(i: int) -> None:
        try:
            for _ in range(4):
                for a, b in zip(gradients(model, ids[i]), wanted[i], strict=True):
                    torch.testing.assert_close(a, b)  # sums of another order: a product may use other threads
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed[0]
    assert [id(p) for p in model.parameters()] == weights


class _Odd(nn.Module):
    """One inner module in two places, and a method that is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Sequential(self.first, nn.Dropout(0.5))
        self.register_buffer("offset", torch.ones(4))
        self.scale = nn.Parameter(torch.ones(4))
        self.compute = self._compute

    def _compute(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) * self.scale + self.offset

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x)


def test_a_copy_apart_takes_other_weights_alone():
    module, x = _Odd().eval(), torch.randn(3, 4)
    before, state = module(x), dict(module.named_parameters())
    copied = apart(module)
    assert copied(x).equal(before) and dict(copied.named_parameters()) == state
    with Looking(module):
        made = torch.func.functional_call(copied, {n: torch.zeros_like(t) for n, t in state.items()}, (x,))
    assert made.equal(torch.ones(3, 4)) and module(x).equal(before)
    module.train()
    assert not any(m.training for m in copied.modules())


def test_a_copy_reads_what_is_put_in_where_an_attribute_hides_it():
    """FSDP1 has views of its flat weight as attributes too."""
    module, x = nn.Linear(4, 4), torch.randn(3, 4)
    module.__dict__["weight"] = module.weight.detach()
    made = torch.func.functional_call(apart(module), {"weight": torch.zeros(4, 4), "bias": torch.ones(4)}, (x,))
    assert made.equal(torch.ones(3, 4))


def test_what_hangs_on_a_module_finds_it_in_a_copy():
    module, seen = _Odd(), []
    module.first.register_forward_hook(lambda m, *_: seen.append(m))
    module.second[1].forward = lambda x: 2 * x
    copied = apart(module)
    copied(torch.randn(3, 4))
    assert copied is not module and seen == [module.first, module.first]
    assert copied.second is not module.second and copied.second[1] is module.second[1]


def test_each_thread_has_values_of_its_own():
    values, seen = ByThread(), []
    values.x = 1
    thread = threading.Thread(target=lambda: seen.append(values.x))
    thread.start()
    thread.join()
    assert values.x == 1 and seen == [None]
    assert copy.deepcopy(values).x is None and pickle.loads(pickle.dumps(values)).x is None
