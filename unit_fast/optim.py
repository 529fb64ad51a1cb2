"""AdamW that knows which parameters took part in a step, with clipping inside, and the learning-rate schedule (SPEC 3).

UniT draws one data set a step, so every step uses another subset of the parameters. ``MaskedAdamW`` keeps a step count
per parameter and moves the subset; what happens to the others is the policy ``unused``.
"""

import logging
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unit_fast import ops
from unit_fast.config import OptimConfig
from unit_fast.errors import UserError, nearest

RULES = ("hf", "torch")
POLICIES = ("skip", "graph", "update_all")
CLIP_EPS = 1e-6
"""Added to the norm in the clip factor, as ``torch.nn.utils.clip_grad_norm_`` does."""

NORM_ROW = 16384
"""Numbers of a gradient whose squares are added up one after the other."""

_log = logging.getLogger("unit_fast.optim")


class StepStats(NamedTuple):
    """What a step found, on the device of the parameters; reading it is the caller's decision."""

    grad_norm: Tensor
    """Scalar: L2 norm over the gradients that took part, before clipping."""
    nonfinite: Tensor
    """int32 scalar: 1 if that norm was not finite; the step then changed nothing."""


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW with per-parameter step counts and a mask of the parameters a step used.

    ``rule``: ``hf`` adds eps before the bias correction and decays after the update, as the authors' optimiser does
    (SPEC 3.1); ``torch`` is ``torch.optim.AdamW``.

    ``unused`` (SPEC 3.5), for a parameter with the flag ``used`` and the gradient g after clipping:

    ============== =====================================================================================
    ``skip``       moves if used and max|g| > 0
    ``graph``      moves if used
    ``update_all`` moves if used now or ever before; while it is not used its gradient counts as zero
    ============== =====================================================================================

    A parameter that does not move keeps its value, both moments and its step count bit for bit. A used parameter
    without a gradient tensor has gradient zero; an unused one that has a gradient tensor is left out of the norm too.

    ``max_norm`` clips inside ``step``: gradients are scaled by min(1, max_norm / (norm + 1e-6)), the norm being taken
    over the used parameters that have a gradient. After the step their ``.grad`` holds the clipped gradient, as after
    ``clip_grad_norm_``. With a norm that is not finite nothing changes at all, gradients and step counts included.

    Two implementations with one meaning: ``reference`` (plain PyTorch, any device, reads nothing on the host) and one
    for the CPU on torch's fused AdamW. ``unit_fast.kernels("reference")`` forces the first; which runs is logged once.

    ``state[p]`` has ``exp_avg``, ``exp_avg_sq`` and ``step``, an int32 scalar in the memory of ``step_counts()``;
    ``state_dict`` has the keys and dtypes of ``torch.optim.AdamW`` and each loads the other's. ``ValueError`` on a
    hyperparameter out of range.
    """

    def __init__(
        self,
        params,
        lr: float = 5e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-4,
        *,
        rule: str = "hf",
        unused: str = "skip",
        max_norm: float | None = None,
    ):
        for name, value, known in (("rule", rule, RULES), ("unused", unused, POLICIES)):
            if value not in known:
                raise ValueError(f"MaskedAdamW: {name} is {value!r}; {nearest(value, known)}")
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"MaskedAdamW: max_norm is {max_norm}; give a positive number, or None not to clip")
        self.rule, self.unused, self.max_norm = rule, unused, max_norm
        self._counts: Tensor | None = None
        self._zeros: Tensor | None = None
        self._logged: set[str] = set()
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, group: dict) -> None:
        super().add_param_group(group)
        group = self.param_groups[-1]
        for name in ("lr", "eps", "weight_decay"):
            if not group[name] >= 0:
                raise ValueError(f"MaskedAdamW: {name} is {group[name]}; it must not be negative")
        if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"MaskedAdamW: betas are {group['betas']}; both must be in [0, 1)")
        for p in group["params"]:
            if not p.is_floating_point():
                raise ValueError(f"MaskedAdamW: a parameter of shape {tuple(p.shape)} is {p.dtype}, not floating point")

    def __getstate__(self) -> dict:
        own = ("rule", "unused", "max_norm", "_counts", "_zeros", "_logged")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._bind_steps()

    # ---------------------------------------------------------------------------------------------------- stepping

    @torch.no_grad()
    def step(self, used: Tensor | None = None) -> StepStats:
        """One update. ``used`` uint8 or bool [n], in the order of the parameters over all groups; None: has a gradient.

        ``ValueError`` on another shape or dtype and on sparse gradients.
        """
        members = self._members()
        if not members:
            raise ValueError("MaskedAdamW: no parameters to update")
        if used is not None and (used.dtype not in (torch.uint8, torch.bool) or used.shape != (len(members),)):
            raise ValueError(
                f"MaskedAdamW: used is {used.dtype} {list(used.shape)}; it must be uint8 or bool [{len(members)}]"
            )
        if any(p.grad is not None and p.grad.layout != torch.strided for p, _ in members):
            raise ValueError("MaskedAdamW: sparse gradients are not supported; build embeddings with sparse=False")
        why = self._why_reference(members)
        self._log_once("the reference: " + why if why else "torch's fused AdamW")
        return self._step_reference(members, used) if why else self._step_fused(members, used)

    def scale_lr(self, multiplier: float) -> None:
        """Set every group's ``lr`` to ``multiplier`` times its ``initial_lr`` (the ``lr`` before the first call)."""
        for group in self.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * multiplier

    def step_counts(self) -> Tensor:
        """int32 [n]: updates each parameter has had, in the order of the parameters over all groups (not a copy)."""
        members = self._members()
        device = members[0][0].device
        if self._counts is None:
            self._counts = torch.zeros(len(members), dtype=torch.int32, device=device)
        elif len(self._counts) < len(members) or self._counts.device != device:
            more = torch.zeros(len(members) - len(self._counts), dtype=torch.int32, device=device)
            self._counts = torch.cat((self._counts.to(device), more))
            self._bind_steps()
        return self._counts

    def _bind_steps(self) -> None:
        """Make every ``state[p]["step"]`` a view of its count."""
        for i, (p, _) in enumerate(self._members()):
            if self._counts is not None and self.state.get(p):
                self.state[p]["step"] = self._counts[i]

    def _members(self) -> list[tuple[Tensor, dict]]:
        return [(p, group) for group in self.param_groups for p in group["params"]]

    def _moments(self, p: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """exp_avg and exp_avg_sq of p, zeros at first; ``count`` is its element of the step counts."""
        state = self.state[p]
        if not state:
            state |= {"step": count, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        return state["exp_avg"], state["exp_avg_sq"]

    def _why_reference(self, members) -> str | None:
        """Why the fused implementation cannot take this step, or None if it can."""
        dtype = members[0][0].dtype
        if ops.mode() == "reference":
            return "asked for"
        if not hasattr(torch, "_fused_adamw_"):
            return "this torch has no fused AdamW"
        if any(p.device.type != "cpu" for p, _ in members):
            return "parameters are not all on the CPU"
        if dtype not in (torch.float32, torch.float64) or any(p.dtype != dtype for p, _ in members):
            return "parameters are not all float32, or all float64"
        if not all(_is_dense(p) for p, _ in members):
            return "a parameter is not contiguous in memory"
        if self.rule == "hf" and any(group["lr"] * group["weight_decay"] >= 1 for group in self.param_groups):
            return "lr times weight_decay is 1 or more"
        return None

    def _log_once(self, what: str) -> None:
        if what not in self._logged:
            self._logged.add(what)
            _log.info("MaskedAdamW(rule=%s, unused=%s) runs as %s", self.rule, self.unused, what)

    # --------------------------------------------------------------------------------------------------- reference

    def _step_reference(self, members, used: Tensor | None) -> StepStats:
        """The specification: SPEC 3.1's operations in its order. Reads nothing on the host unless ``used`` is there."""
        counts = self.step_counts()
        flags = _flags(members, used)
        if used is not None and used.device.type == "cpu":
            # Known on the host: parameters that cannot move cost nothing.
            known = used.tolist()
            possible = [i for i in range(len(members)) if known[i] or self._was_used(members[i][0])]
        elif used is None:
            possible = [i for i, (p, _) in enumerate(members) if p.grad is not None or self._was_used(p)]
        else:
            possible = list(range(len(members)))

        norms = []
        for i in possible:
            p = members[i][0]
            if p.grad is not None:
                norms.append(_norm(p.grad).masked_fill(~flags[i], 0.0))
        norm = _joint(norms, like=members[0][0])
        finite = norm.isfinite()
        factor = torch.ones_like(norm)
        if self.max_norm is not None:
            factor = torch.where(finite, (self.max_norm / (norm + CLIP_EPS)).clamp(max=1.0), factor)

        for i in possible:
            p, group = members[i]
            grad = torch.zeros_like(p)
            if p.grad is not None:
                p.grad.mul_(torch.where(flags[i], factor, 1.0))
                grad = torch.where(flags[i], p.grad, grad)
            moves = finite & flags[i]
            if self.unused == "skip":
                moves = moves & (grad != 0).any()
            elif self.unused == "update_all":
                moves = finite & (flags[i] | (counts[i] > 0))
            self._update_reference(p, grad, group, counts[i], moves)
            counts[i] += moves
        return StepStats(norm, (~finite).int())

    def _was_used(self, p: Tensor) -> bool:
        return self.unused == "update_all" and p in self.state

    def _update_reference(self, p: Tensor, grad: Tensor, group: dict, count: Tensor, moves: Tensor) -> None:
        """One parameter; ``count`` is its step count before the update, ``moves`` a bool scalar."""
        m, v = self._moments(p, count)
        lr, eps, decay, (beta1, beta2) = group["lr"], group["eps"], group["weight_decay"], group["betas"]
        t = (count + 1).double()
        correction1, correction2 = 1 - beta1**t, 1 - beta2**t
        new_m = beta1 * m + (1 - beta1) * grad
        new_v = beta2 * v + (1 - beta2) * grad**2
        if self.rule == "hf":
            new_p = p - lr * (correction2.sqrt() / correction1) * new_m / (new_v.sqrt() + eps)
            new_p = new_p - lr * decay * new_p
        else:
            new_p = p - lr * decay * p
            new_p = new_p - lr / correction1 * new_m / (new_v.sqrt() / correction2.sqrt() + eps)
        for old, new in ((m, new_m), (v, new_v), (p, new_p)):
            old.copy_(torch.where(moves, new.to(old.dtype), old))

    # ------------------------------------------------------------------------------------- torch's fused AdamW (CPU)

    def _step_fused(self, members, used: Tensor | None) -> StepStats:
        """The same on the CPU: one pass for the norms, one for the update; clipping is folded into the update."""
        flags = _flags(members, used).tolist()
        counts = self.step_counts()
        before = counts.tolist()
        grads = [p.grad if flag else None for (p, _), flag in zip(members, flags, strict=True)]
        norms = [None if g is None else _norm(g) for g in grads]
        norm = _joint([n for n in norms if n is not None], like=members[0][0])
        value = norm.item()
        if not math.isfinite(value):
            return StepStats(norm, torch.ones((), dtype=torch.int32))
        factor = 1.0 if self.max_norm is None else min(1.0, self.max_norm / (value + CLIP_EPS))

        moves = [False] * len(members)
        calls: dict[tuple, tuple[list, ...]] = {}
        for i, (p, group) in enumerate(members):
            grad = grads[i]
            if self.unused == "skip":
                moves[i] = grad is not None and _any_nonzero(grad, norms[i].item(), factor)
            else:
                moves[i] = bool(flags[i]) or (self.unused == "update_all" and before[i] > 0)
            if not moves[i]:
                continue
            scaled = grad is None or factor == 1.0
            if grad is None:
                grad = self._zero_gradient(p)
            elif p.dtype != torch.float32 or not _same_layout(p, grad):
                # The kernel's scale is a float32, and it pairs elements by their place in memory.
                scaled = True
                grad.mul_(factor)
                if not _same_layout(p, grad):
                    grad = torch.empty_like(p).copy_(grad)
            lists = calls.setdefault((id(group), before[i] + 1, scaled), (group, [], [], [], []))
            for into, tensor in zip(lists[1:], (p, grad, *self._moments(p, counts[i])), strict=True):
                into.append(tensor)

        scale = torch.tensor(1.0 / factor, dtype=torch.float32)
        for (_, t, scaled), (group, *lists) in calls.items():
            beta1, beta2 = group["betas"]
            lr, decay, eps = float(group["lr"]), group["weight_decay"], group["eps"]
            if self.rule == "hf":
                # The Hugging Face form in terms of torch's: same m and v, decay after the step, eps before correction.
                lr, decay = lr * (1 - lr * decay), decay / (1 - lr * decay)
                eps = eps / math.sqrt(1 - beta2**t)
            torch._fused_adamw_(
                *lists, [], [torch.tensor(float(t))] * len(lists[0]), amsgrad=False, lr=lr, beta1=beta1, beta2=beta2,
                weight_decay=decay, eps=eps, maximize=False, grad_scale=None if scaled else scale,
            )  # fmt: skip
        counts.add_(torch.tensor(moves, dtype=torch.int32))
        return StepStats(norm, torch.zeros((), dtype=torch.int32))

    def _zero_gradient(self, p: Tensor) -> Tensor:
        """Zeros in the layout of p: a view of one buffer shared by all parameters without a gradient."""
        if self._zeros is None or self._zeros.numel() < p.numel() or self._zeros.dtype != p.dtype:
            self._zeros = torch.zeros(max(q.numel() for q, _ in self._members()), dtype=p.dtype)
        return self._zeros.as_strided(p.shape, p.stride())

    # -------------------------------------------------------------------------------------------------- state dict

    def state_dict(self) -> dict:
        """As ``torch.optim.AdamW``'s: ``exp_avg``, ``exp_avg_sq`` and ``step`` (0-d float32) by parameter index."""
        out = super().state_dict()
        counts = self.step_counts().tolist()
        # The reference makes moments before it knows whether the parameter moves; torch lists those that have moved.
        moved = {i: state for i, state in out["state"].items() if counts[i] > 0}
        out["state"] = {i: state | {"step": torch.tensor(float(counts[i]))} for i, state in moved.items()}
        return out

    def load_state_dict(self, state_dict: dict) -> None:
        """Load what this class or ``torch.optim.AdamW`` saved, by copying. ``UserError`` where it does not fit."""
        shapes = [tuple(p.shape) for p, _ in self._members()]
        saved = sum(len(group["params"]) for group in state_dict["param_groups"])
        if saved != len(shapes) or len(state_dict["param_groups"]) != len(self.param_groups):
            raise UserError(
                f"optimiser state: saved for {saved} parameters in {len(state_dict['param_groups'])} groups, but there "
                f"are {len(shapes)} in {len(self.param_groups)}; build the optimiser for the model it was saved with"
            )
        for group in state_dict["param_groups"]:
            for name in ("amsgrad", "maximize"):
                if group.get(name):
                    raise UserError(f"optimiser state: saved with {name}=True, which MaskedAdamW does not have")
        for i, state in state_dict["state"].items():
            for name in ("step", "exp_avg", "exp_avg_sq"):
                if name not in state:
                    raise UserError(f"optimiser state: parameter {i} has no {name!r}; it is not the state of an AdamW")
                if name != "step" and tuple(state[name].shape) != shapes[i]:
                    raise UserError(
                        f"optimiser state: {name} of parameter {i} is {list(state[name].shape)}, the parameter "
                        f"{list(shapes[i])}; build the optimiser for the model it was saved with"
                    )
        before = [dict(group) for group in self.param_groups]
        self._counts = None  # or the saved step counts would be replaced by views of the present ones while loading
        super().load_state_dict(state_dict)
        for group, old in zip(self.param_groups, before, strict=True):
            for name, value in old.items():
                group.setdefault(name, value)
        counts = [0] * len(shapes)
        for i, (p, _) in enumerate(self._members()):
            if p not in self.state:
                continue
            state = self.state[p]
            counts[i] = int(state["step"])
            # Copies: the saved tensors may be shared, read-only, or laid out in memory unlike the parameter.
            self.state[p] = {name: torch.empty_like(p).copy_(state[name]) for name in ("exp_avg", "exp_avg_sq")}
        self.step_counts().copy_(torch.tensor(counts, dtype=torch.int32))
        self._bind_steps()


def _flags(members, used: Tensor | None) -> Tensor:
    """bool [n] on the device of the parameters."""
    device = members[0][0].device
    if used is None:
        return torch.tensor([p.grad is not None for p, _ in members], device=device)
    return used.to(device).bool()


def _norm(grad: Tensor) -> Tensor:
    """L2 norm of a gradient, a scalar of at least float32.

    In rows: torch adds up float32 squares one after the other on a CPU, which leaves an error of 1e-3 in the norm of
    the word embedding (23 M numbers) and uses one thread. Rows make it 1e-7, and independent of the number of threads.
    """
    wide = torch.promote_types(grad.dtype, torch.float32)
    size, rows = grad.numel(), grad.numel() // NORM_ROW
    if rows < 2:
        return torch.linalg.vector_norm(grad, dtype=wide)
    flat = grad.as_strided((size,), (1,)) if _is_dense(grad) else grad.reshape(-1)
    body = rows * NORM_ROW
    norm = torch.linalg.vector_norm(torch.linalg.vector_norm(flat[:body].view(rows, NORM_ROW), dim=1, dtype=wide))
    return norm if body == size else torch.hypot(norm, torch.linalg.vector_norm(flat[body:], dtype=wide))


def _joint(norms: list[Tensor], like: Tensor) -> Tensor:
    """L2 norm of L2 norms, a scalar of at least float32; 0 without any."""
    wide = torch.promote_types(like.dtype, torch.float32)
    for n in norms:
        wide = torch.promote_types(wide, n.dtype)
    if not norms:
        return torch.zeros((), dtype=wide, device=like.device)
    return torch.linalg.vector_norm(torch.stack([n.to(wide) for n in norms]))


def _any_nonzero(grad: Tensor, norm: float, factor: float) -> bool:
    """Whether max|grad * factor| > 0. Its norm answers that unless squares or products may have underflowed."""
    # max|g| >= norm / sqrt(n)
    if norm * factor > 2 * math.sqrt(grad.numel()) * torch.finfo(grad.dtype).tiny:
        return True
    if grad.numel() == 0:
        return False
    low, high = torch.aminmax(grad)
    return bool((torch.maximum(high, -low) * factor).item() > 0)


def _is_dense(p: Tensor) -> bool:
    if p.is_contiguous():
        return True
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return p.dim() in formats and p.is_contiguous(memory_format=formats[p.dim()])


def _same_layout(a: Tensor, b: Tensor) -> bool:
    """Same strides, but for dimensions of size one, whose stride means nothing."""
    return a.stride() == b.stride() or all(
        size == 1 or s == t for size, s, t in zip(a.shape, a.stride(), b.stride(), strict=True)
    )


# ---------------------------------------------------------------------------------------------------------- schedule


def lr_multiplier(step: int, warmup_steps: int, total_steps: int) -> float:
    """Factor on the base learning rates of update ``step`` (0-based): linear warm-up from 0, then half a cosine to 0.

    step / warmup for step < warmup, else (1 + cos(pi (step - warmup) / (total - warmup))) / 2, SPEC 3.2. Update 0 of a
    warm-up has factor 0. At and after ``total_steps`` it is 0, except that the first update after the warm-up always
    has 1 (total = warmup). A run shorter than its warm-up never leaves it. ``ValueError`` on negative numbers.
    """
    if min(step, warmup_steps, total_steps) < 0:
        raise ValueError(
            f"lr_multiplier: step {step}, warmup {warmup_steps}, total {total_steps}; none may be negative"
        )
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))))


def make_optimizer(model: nn.Module, config: OptimConfig) -> MaskedAdamW:
    """The optimiser of a run: ``model.parameter_groups(lr, lr_backbone)`` with the settings of ``config``.

    Groups without parameters (a frozen backbone) are left out.
    """
    groups = [group for group in model.parameter_groups(config.lr, config.lr_backbone) if len(group["params"])]
    return MaskedAdamW(
        groups,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        rule=config.rule,
        unused=config.unused,
        max_norm=config.max_norm,
    )
