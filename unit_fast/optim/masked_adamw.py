"""AdamW that knows which parameters took part in a step, with clipping inside (SPEC 3).

UniT draws one data set a step, so every step uses another subset of the parameters. ``MaskedAdamW`` keeps a step count
per parameter and moves the subset; what happens to the others is the policy ``unused``. The arithmetic is
``ops.adamw``.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unit_fast import ops
from unit_fast.config import OptimConfig
from unit_fast.errors import UserError, nearest
from unit_fast.ops import Tables, adamw_step


class StepStats(NamedTuple):
    """What a step found, on the device of the parameters; reading it is the caller's decision."""

    grad_norm: Tensor
    """Scalar: L2 norm over the gradients that took part, before clipping (and divided by ``grad_scale``)."""
    nonfinite: Tensor
    """int32 scalar: 1 if that norm was not finite or ``found_inf`` was set; the step then changed nothing."""


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
    ``clip_grad_norm_``; with ``clip_gradients_in_place=False`` it holds whatever is cheapest, the raw gradient or the
    clipped one (on a card one write of every gradient less). With a norm that is not finite nothing changes at all,
    gradients and step counts included.

    ``shadow``: bfloat16 copies of some parameters, by parameter, written whenever it moves (and filled here).
    ``averages``: float32 averages of some parameters, by parameter; whenever it moves, average <- average_decay average
    + (1 - average_decay) parameter, and while it does not move its average keeps every bit: an average over the
    parameter's own updates. A run's ``ema_decay`` is another one, over all updates of the run (``setup_model.Ema``).

    Implementations with one meaning, chosen as for every operator (``ops.adamw``, ``unit_fast.kernels(...)``):
    ``reference`` (plain PyTorch, any device), ``cpu`` (torch's fused AdamW) and ``fused`` (three Triton launches for
    all parameters). The first and the last read nothing on the host if ``used`` is None or on the device of the
    parameters, and that is not a CPU.

    DDP: the mask and the clipping work on gradients after their reduction and ``used`` is the same on every rank, so
    all ranks take the same step. Mixed precision: a ``GradScaler`` hands over ``grad_scale`` and ``found_inf`` and
    leaves unscaling to the step.

    ``state[p]`` has ``exp_avg``, ``exp_avg_sq`` and ``step``, an int32 scalar in the memory of ``step_counts()``;
    ``state_dict`` has the keys and dtypes of ``torch.optim.AdamW`` and each loads the other's. ``ValueError`` on a
    hyperparameter out of range.
    """

    _OWN = ("rule", "unused", "max_norm", "clip_gradients_in_place", "shadow", "averages", "average_decay", "_counts")
    _step_supports_amp_scaling = True
    """Tells ``torch.amp.GradScaler`` to hand over ``grad_scale`` and ``found_inf``."""

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
        clip_gradients_in_place: bool = True,
        shadow: Mapping[Tensor, Tensor] | None = None,
        averages: Mapping[Tensor, Tensor] | None = None,
        average_decay: float = 0.999,
    ):
        for name, value, known in (("rule", rule, adamw_step.RULES), ("unused", unused, adamw_step.POLICIES)):
            if value not in known:
                raise ValueError(f"MaskedAdamW: {name} is {value!r}; {nearest(value, known)}")
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"MaskedAdamW: max_norm is {max_norm}; give a positive number, or None not to clip")
        if not 0 <= average_decay < 1:
            raise ValueError(f"MaskedAdamW: average_decay is {average_decay}; it must be in [0, 1)")
        self.rule, self.unused, self.max_norm = rule, unused, max_norm
        self.clip_gradients_in_place, self.average_decay = clip_gradients_in_place, average_decay
        self.shadow, self.averages = dict(shadow or {}), dict(averages or {})
        self._counts: Tensor | None = None
        self._forget()
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self._check_followers()
        self.refresh_shadow()

    def _forget(self) -> None:
        """Drop what is made anew when it is needed."""
        self._tables: Tables | None = None
        self._device_lr: Tensor | None = None
        self._written: list[float] = []

    def add_param_group(self, group: dict) -> None:
        super().add_param_group(group)
        self._forget()
        group = self.param_groups[-1]
        if isinstance(group["lr"], Tensor):
            raise ValueError("MaskedAdamW: lr is a tensor; give a number, and write rates of the device to device_lr")
        for name in ("lr", "eps", "weight_decay"):
            if not group[name] >= 0:
                raise ValueError(f"MaskedAdamW: {name} is {group[name]}; it must not be negative")
        if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"MaskedAdamW: betas are {group['betas']}; both must be in [0, 1)")
        for p in group["params"]:
            if not p.is_floating_point():
                raise ValueError(f"MaskedAdamW: a parameter of shape {tuple(p.shape)} is {p.dtype}, not floating point")

    def _check_followers(self) -> None:
        members = {p for p, _ in self._members()}
        for name, tensors, dtype in (
            ("shadow", self.shadow, torch.bfloat16),
            ("averages", self.averages, torch.float32),
        ):
            for p, t in tensors.items():
                if p not in members:
                    raise ValueError(f"MaskedAdamW: {name} has a tensor that is not one of the parameters")
                if t.shape != p.shape or t.dtype != dtype or t.device != p.device or not adamw_step.same_layout(t, p):
                    raise ValueError(
                        f"MaskedAdamW: {name} of a parameter {list(p.shape)} on {p.device} is {t.dtype} "
                        f"{list(t.shape)} on {t.device}; it must be {dtype}, of its shape, device and strides"
                    )

    def __getstate__(self) -> dict:
        return super().__getstate__() | {name: getattr(self, name) for name in self._OWN}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._forget()
        self._bind_steps()

    # ---------------------------------------------------------------------------------------------------- stepping

    @torch.no_grad()
    def step(
        self, used: Tensor | None = None, *, grad_scale: Tensor | None = None, found_inf: Tensor | None = None
    ) -> StepStats:
        """One update. ``used`` uint8 or bool [n], in the order of the parameters over all groups; None: has a gradient.

        ``grad_scale``, one number: what the gradients were multiplied with; they count, and are left, divided by it.
        ``found_inf``, one number: not zero changes nothing. Both are taken from the attributes of these names, which a
        ``GradScaler`` sets, where they are not given. ``ValueError`` on another shape or dtype and on sparse gradients.
        """
        members = self._members()
        if used is not None and (used.dtype not in (torch.uint8, torch.bool) or used.shape != (len(members),)):
            raise ValueError(
                f"MaskedAdamW: used is {used.dtype} {list(used.shape)}; it must be uint8 or bool [{len(members)}]"
            )
        step = self._step_of(used, grad_scale, found_inf)
        return StepStats(*ops.adamw(step, lambda: self._tables_for(step)))

    def _step_of(
        self, used: Tensor | None, grad_scale: Tensor | None = None, found_inf: Tensor | None = None
    ) -> adamw_step.Step:
        """What a step works on."""
        members = self._members()
        if not members:
            raise ValueError("MaskedAdamW: no parameters to update")
        params = [p for p, _ in members]
        grads = [p.grad for p in params]
        if any(g is not None and g.layout != torch.strided for g in grads):
            raise ValueError("MaskedAdamW: sparse gradients are not supported; build embeddings with sparse=False")
        counts = self.step_counts()
        self._write_rates()
        return adamw_step.Step(
            params=params,
            grads=grads,
            moments=lambda i: self._moments(params[i], counts[i]),
            counts=counts,
            used=used,
            possible=self._possible(params, grads, used),
            groups=[i for i, group in enumerate(self.param_groups) for _ in group["params"]],
            lr=[g["lr"] for g in self.param_groups] if self._device_lr is None else self._device_lr,
            hyper=[(*g["betas"], g["eps"], g["weight_decay"]) for g in self.param_groups],
            rule=self.rule,
            unused=self.unused,
            max_norm=self.max_norm,
            grad_scale=getattr(self, "grad_scale", None) if grad_scale is None else grad_scale,
            found_inf=getattr(self, "found_inf", None) if found_inf is None else found_inf,
            in_place=self.clip_gradients_in_place,
            copies=[self.shadow.get(p) for p in params] if self.shadow else (),
            averages=[self.averages.get(p) for p in params] if self.averages else (),
            decay=self.average_decay,
        )

    def _possible(self, params, grads, used: Tensor | None) -> list[int] | None:
        """What may move as far as the host knows, so that the rest costs nothing; None: anything."""
        if used is None:
            known = [g is not None for g in grads]
        elif used.device.type == "cpu" and ops.mode() != "fused":
            known = used.tolist()
        else:
            return None
        earlier = self.unused == "update_all"
        return [i for i, p in enumerate(params) if known[i] or (earlier and p in self.state)]

    def _tables_for(self, step: adamw_step.Step) -> Tables:
        """What the kernels know of the parameters, made once; and the step's rates as a tensor on their device."""
        device = step.counts.device
        if self._tables is None or self._tables.device != device:
            self._tables = Tables([p.numel() for p in step.params], step.groups, device)
        step.lr = self.device_lr
        return self._tables

    @torch.no_grad()
    def prepare(self) -> None:
        """Make everything that steps keep: moments of all parameters, step counts, rates, and the kernels' tables.

        Call it before steps that are captured into a CUDA graph, or that run eagerly in a graph's memory pool: what is
        made there would be overwritten by replays. Within a capture whatever is missing raises. A graph holds the
        addresses of parameters and state, so capture again after ``load_state_dict``.
        """
        step = self._step_of(None)
        fused = ops.prepare_adamw(step, lambda: self._tables_for(step))
        if fused or step.counts.device.type == "cuda":
            self._rates()
            for i in range(len(step.params)):
                step.moments(i)

    def refresh_shadow(self) -> None:
        """Copy the parameters into ``shadow``, after something other than ``step`` has written them."""
        for p, copy in self.shadow.items():
            copy.copy_(p.detach())

    # ---------------------------------------------------------------------------------------------------- the rates

    @property
    def device_lr(self) -> Tensor:
        """float64 [groups] on the device of the parameters: the learning rates that steps take, from the first time it
        is asked for. A group's ``lr`` is copied here when it changes; what is written here changes no group's ``lr``,
        and holds until that changes. A captured step follows it."""
        return self._rates()

    def _rates(self) -> Tensor:
        if self._device_lr is None:
            self._written = [group["lr"] for group in self.param_groups]
            self._device_lr = adamw_step.upload(self._written, torch.float64, self._members()[0][0].device)
        return self._device_lr

    def scale_lr(self, multiplier: float | Tensor) -> None:
        """Make every group's learning rate ``multiplier`` times its ``initial_lr`` (the ``lr`` before the first call).

        A number changes the groups' ``lr``. A tensor (a scalar on the device) is not read: it changes ``device_lr``
        only, and the groups' ``lr`` are no longer what steps take.
        """
        for group in self.param_groups:
            group.setdefault("initial_lr", group["lr"])
        if isinstance(multiplier, Tensor):
            rates = self.device_lr
            for i, group in enumerate(self.param_groups):
                rates[i].copy_(multiplier * group["initial_lr"])
            return
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
        self._written = [math.nan] * len(self.param_groups)  # a tensor may have changed them since
        self._write_rates()

    def _write_rates(self) -> None:
        """Copy rates that were changed in the groups to ``device_lr``, if there is one; by launches, not by copies."""
        if self._device_lr is None:
            return
        for i, group in enumerate(self.param_groups):
            if group["lr"] != self._written[i]:
                adamw_step.refuse(self._device_lr.device, f"the learning rate of group {i}, a number, would be written")
                self._written[i] = group["lr"]
                self._device_lr[i].fill_(group["lr"])

    # ---------------------------------------------------------------------------------------------------- the state

    def step_counts(self) -> Tensor:
        """int32 [n]: updates each parameter has had, in the order of the parameters over all groups (not a copy)."""
        members = self._members()
        device = members[0][0].device
        if self._counts is None:
            adamw_step.refuse(device, "MaskedAdamW's step counts would be made")
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
            adamw_step.refuse(p.device, "the moments of a parameter would be made")
            state |= {"step": count, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        elif state["exp_avg"].stride() != p.stride():  # the parameter was laid out anew: so must they be
            adamw_step.refuse(p.device, "the moments of a parameter would be laid out anew")
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.empty_like(p).copy_(state[name])
        return state["exp_avg"], state["exp_avg_sq"]

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
            group["lr"] = float(group["lr"])  # torch's may be a tensor
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
        clip_gradients_in_place=False,  # nothing looks at the gradients afterwards
    )
