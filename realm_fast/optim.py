"""AdamW as BERT trains with it: parameter groups, warm-up and linear decay, clipping that notices NaN.

    optimizer = build_optimizer({"reader": (reader, 3e-5), "embedder": (embedder, 3e-5)}, weight_decay=0.01)
    for step in range(1, steps + 1):
        rates = set_learning_rates(optimizer, step, warmup_steps=warmup, total_steps=steps)
        loss = ...
        check_loss(loss, step, optimizer)
        loss.backward()
        grad_norm = clip_gradients(optimizer, 1.0, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

Steps count from 1: step s is the s-th update. The learning rate is a pure function of the step, so a resumed
run needs no scheduler state.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from realm_fast.errors import TrainingDivergedError

# BERT's and REALM's released optimizer; torch's default epsilon of 1e-8 lets rarely seen words jump.
ADAMW_BETAS = (0.9, 0.999)
ADAMW_EPSILON = 1e-6


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """The seed of everything torch draws in one step (dropout); step 0: of the making of new layers."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def parameter_groups(modules: Mapping[str, tuple[nn.Module, float]], *, weight_decay: float) -> list[dict]:
    """Groups of AdamW: one with weight decay and one without (biases, normalisation layers) a module.

    Args:
        modules: name -> (module, peak learning rate). A parameter that several modules share belongs to
            the first of them; a parameter with requires_grad=False belongs to none.
        weight_decay: AdamW's decoupled decay, >= 0.

    Returns:
        Non-empty groups {"name": "reader.decay", "module": "reader", "params": [(full name, parameter)],
        "lr", "peak_lr", "weight_decay"} in the order of `modules`, decay before no_decay.
    """
    groups: list[dict] = []
    seen: set[int] = set()
    for module_name, (module, peak_lr) in modules.items():
        undecayed = _undecayed_parameter_ids(module)
        members: dict[str, list[tuple[str, nn.Parameter]]] = {"decay": [], "no_decay": []}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            kind = "no_decay" if id(parameter) in undecayed else "decay"
            members[kind].append((f"{module_name}.{name}", parameter))
        for kind, named in members.items():
            if named:
                groups.append(
                    {
                        "name": f"{module_name}.{kind}",
                        "module": module_name,
                        "params": named,
                        "lr": peak_lr,
                        "peak_lr": peak_lr,
                        "weight_decay": weight_decay if kind == "decay" else 0.0,
                    }
                )
    return groups


def build_optimizer(
    modules: Mapping[str, tuple[nn.Module, float]], *, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over `parameter_groups(modules, ...)`. Raises ValueError where nothing is trainable."""
    groups = parameter_groups(modules, weight_decay=weight_decay)
    if not groups:
        raise ValueError(
            f"modules: none of {', '.join(modules) or '(none)'} has a parameter that requires grad"
        )
    # fused: one pass over the parameters instead of about ten, on CPU as on CUDA
    fusable = all(p.device.type in ("cpu", "cuda") for group in groups for _, p in group["params"])
    return torch.optim.AdamW(groups, betas=ADAMW_BETAS, eps=ADAMW_EPSILON, fused=fusable)


def pretrain_warmup_steps(setting: int, steps: int) -> int:
    """`setting`, or for -1 the published min(10000, max(100, steps/10)), at most half of the steps."""
    return setting if setting >= 0 else min(10_000, max(100, steps // 10), steps // 2)


def finetune_warmup_steps(setting: int, steps: int) -> int:
    """`setting`, or for -1 a tenth of the steps."""
    return setting if setting >= 0 else steps // 10


def learning_rate_factor(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """The share of the peak rate at `step`: linear up to 1 at `warmup_steps`, linear down to 0 past the end.

        step / warmup                                     for step <= warmup
        (total + 1 - step) / (total + 1 - warmup)         after it (first step without warm-up: 1)

    No step of 1..total_steps has rate 0, so none is wasted; past the end it is 0.
    """
    if step < 1:
        raise ValueError(f"step: expected >= 1 (steps count from 1), got {step}")
    if step <= warmup_steps:
        return step / warmup_steps
    start = max(warmup_steps, 1)  # without warm-up the peak is at step 1
    return max(0.0, (total_steps + 1 - step) / (total_steps + 1 - start))


def set_learning_rates(
    optimizer: torch.optim.Optimizer, step: int, *, warmup_steps: int, total_steps: int
) -> dict[str, float]:
    """Sets every group's rate for `step`; returns module name -> rate (for metrics.jsonl)."""
    factor = learning_rate_factor(step, warmup_steps=warmup_steps, total_steps=total_steps)
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
        rates[group["module"]] = group["lr"]
    return rates


def check_loss(loss: torch.Tensor, step: int, optimizer: torch.optim.Optimizer | None = None) -> float:
    """The loss as a float; raises TrainingDivergedError where it is not finite, saying what else is not."""
    value = float(loss.detach())
    if math.isfinite(value):
        return value
    cause = "the configuration's precision and learning rates are the usual suspects"
    if optimizer is not None:
        bad = _first_non_finite(optimizer, gradients=False)
        cause = f"first non-finite weights: {bad}" if bad else f"every weight is finite; {cause}"
    raise TrainingDivergedError(f"step {step}: the loss is {value} ({cause}). {_WAY_OUT}")


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float, step: int) -> float:
    """Scales gradients to a global L2 norm of at most `max_norm` (0: leaves them); returns the norm before.

    Raises:
        TrainingDivergedError: the norm is NaN or infinite; names the step and the first parameter group
            (in the optimizer's order) and parameter whose gradient is not finite. Nothing is scaled then.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not gradients:
        return 0.0
    device = gradients[0].device
    norms = [norm.to(device, torch.float32) for norm in torch._foreach_norm(gradients)]
    total = float(torch.linalg.vector_norm(torch.stack(norms)))  # one synchronisation with the device
    if not math.isfinite(total):
        # Every gradient can be finite and the sum of squares still overflow: then no group is to be named.
        bad = _first_non_finite(optimizer, gradients=True)
        where = (
            f"first non-finite gradient: {bad}" if bad else "every gradient is finite, their norm overflows"
        )
        raise TrainingDivergedError(f"step {step}: the gradient norm is {total} ({where}). {_WAY_OUT}")
    if max_norm > 0 and total > max_norm:
        torch._foreach_mul_(gradients, max_norm / (total + 1e-6))
    return total


_WAY_OUT = (
    "No update was made; resume from the last checkpoint with a lower learning rate or precision=float32."
)


def _first_non_finite(optimizer: torch.optim.Optimizer, *, gradients: bool) -> str | None:
    for group in optimizer.param_groups:
        names = group.get("param_names", [f"parameter {i}" for i in range(len(group["params"]))])
        for name, parameter in zip(names, group["params"], strict=True):
            tensor = parameter.grad if gradients else parameter.detach()
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                return f"group {group.get('name', '?')}, parameter {name}"
    return None


def _undecayed_parameter_ids(module: nn.Module) -> set[int]:
    undecayed = {id(p) for name, p in module.named_parameters() if name.rsplit(".", 1)[-1].endswith("bias")}
    for part in module.modules():
        if "Norm" in type(part).__name__:  # LayerNorm, RMSNorm and the trunks' own variants
            undecayed |= {id(p) for p in part.parameters(recurse=False)}
    return undecayed
