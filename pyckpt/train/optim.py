"""AdamW with fp32 weights, the learning rate over the steps, and clipping."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pyckpt.train.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of step number `step` (the first is 1): linear warm-up, then a cosine down to min_lr * lr."""
    warmup = config.warmup_steps
    if step <= warmup:
        return config.lr * step / warmup
    done = (step - warmup) / max(config.steps - warmup, 1)
    low = config.lr * config.min_lr
    return low + (config.lr - low) * 0.5 * (1 + math.cos(math.pi * done))


class Optimizer:
    """AdamW over a model's parameters, or over fp32 copies of them where they are of a lower precision.

    In bf16 an update smaller than 1/256 of a weight would be lost, so the exact weights are kept here.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.config = config
        self.parameters = dict(model.named_parameters())
        self.weights = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for name, p in self.parameters.items()
        }
        matrices = [w for w in self.weights.values() if w.ndim >= 2]
        others = [w for w in self.weights.values() if w.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=(0.9, 0.95), fused=True)

    def collect(self) -> None:
        """Take the gradients of a backward; several backwards add up in fp32."""
        for name, parameter in self.parameters.items():
            weight = self.weights[name]
            if weight is parameter or parameter.grad is None:
                continue
            if weight.grad is None:
                weight.grad = parameter.grad.float()
            else:
                weight.grad.add_(parameter.grad)
            parameter.grad = None

    def step(self, number: int) -> tuple[float, float]:
        """Take optimiser step `number` (the first is 1) and drop the gradients.

        Gives (learning rate, gradient norm before clipping). The weights stay as they are where it is not finite.
        """
        rate = learning_rate(self.config, number)
        norm = float(nn.utils.clip_grad_norm_(self.weights.values(), self.config.clip or math.inf))
        if math.isfinite(norm):
            for group in self.adam.param_groups:
                group["lr"] = rate
            self.adam.step()
            self._publish()
        self.zero_grad()
        return rate, norm

    def zero_grad(self) -> None:
        for tensor in (*self.weights.values(), *self.parameters.values()):
            tensor.grad = None

    def state(self) -> dict[str, Any]:
        return self.adam.state_dict()

    def load(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Take over a checkpoint's weights and optimiser state; the caller has checked names and shapes."""
        self.adam.load_state_dict(state)
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(weights[name])
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        for name, parameter in self.parameters.items():
            if self.weights[name] is not parameter:
                parameter.copy_(self.weights[name])
