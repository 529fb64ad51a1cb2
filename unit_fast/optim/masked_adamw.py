"""AdamW that knows which parameters took part in a step, with clipping inside (SPEC 3).

UniT draws one data set a step, so every step uses another subset of the parameters. ``MaskedAdamW`` keeps a step count
per parameter and moves the subset; what happens to the others is the policy ``unused``. The arithmetic is
``ops.adamw``.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from unit_fast import ops
from unit_fast.ops import Tables, adamw_step
from unit_fast.optim.rates import Rates
from unit_fast.optim.settings import check_group, check_settings, check_shadow
from unit_fast.optim.state_dict import as_torch_saves, check_state_dict, complete_groups, copy_moments, moments_of


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

    _OWN = ("rule", "unused", "max_norm", "clip_gradients_in_place", "shadow", "_counts")
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
    ):
        check_settings(rule, unused, max_norm)
        self.rule, self.unused, self.max_norm = rule, unused, max_norm
        self.clip_gradients_in_place, self.shadow = clip_gradients_in_place, dict(shadow or {})
        self._counts: Tensor | None = None
        self._forget()
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        check_shadow(self.shadow, self._params())
        self.refresh_shadow()

    def _forget(self) -> None:
        """Drop what is made anew when it is needed."""
        self._tables: Tables | None = None
        self._rates = Rates()

    def add_param_group(self, group: dict) -> None:
        super().add_param_group(group)
        self._forget()
        check_group(self.param_groups[-1])

    def __getstate__(self) -> dict:
        return super().__getstate__() | {name: getattr(self, name) for name in self._OWN}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._forget()
        self._bind_steps()

    # ---------------------------------------------------------------------------------------------------- stepping

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Tensor] | None = None,
        used: Tensor | None = None,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ):
        """One update; ``StepStats``, or with a ``closure`` its loss, as ``torch.optim``'s optimisers.

        ``closure`` computes the gradients first (with gradients enabled) and returns the loss. ``used`` uint8 or bool
        [n], in the order of the parameters over all groups; None: has a gradient. It may stand first too.
        ``grad_scale``, one number: what the gradients were multiplied with; they count, and are left, divided by it.
        ``found_inf``, one number: not zero changes nothing. Both are taken from the attributes of these names, which a
        ``GradScaler`` sets, where they are not given. ``ValueError`` on another type, shape or dtype and on sparse
        gradients.
        """
        if isinstance(closure, Tensor) and used is None:
            closure, used = None, closure
        if closure is not None and not callable(closure):
            raise ValueError(f"MaskedAdamW: closure is of type {type(closure).__name__}; give a function, or used=")
        count = len(self._params())
        if used is not None and not isinstance(used, Tensor):
            raise ValueError(
                f"MaskedAdamW: used is of type {type(used).__name__}; give a uint8 or bool tensor [{count}]"
            )
        if used is not None and (used.dtype not in (torch.uint8, torch.bool) or used.shape != (count,)):
            raise ValueError(
                f"MaskedAdamW: used is {used.dtype} {list(used.shape)}; it must be uint8 or bool [{count}]"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        step = self._step_of(used, grad_scale, found_inf)
        stats = StepStats(*ops.adamw(step, lambda: self._tables_for(step)))
        return stats if closure is None else loss

    def __repr__(self) -> str:
        groups = [
            f"{group.get('name', i)}: {len(group['params'])} parameters at lr {group['lr']:g}"
            for i, group in enumerate(self.param_groups)
        ]
        settings = f"rule={self.rule!r}, unused={self.unused!r}, max_norm={self.max_norm}"
        return f"MaskedAdamW({settings}; {'; '.join(groups)})"

    def _step_of(
        self, used: Tensor | None, grad_scale: Tensor | None = None, found_inf: Tensor | None = None
    ) -> adamw_step.Step:
        """What a step works on."""
        params = self._params()
        if not params:
            raise ValueError("MaskedAdamW: no parameters to update")
        grads = [p.grad for p in params]
        if any(g is not None and g.layout != torch.strided for g in grads):
            raise ValueError("MaskedAdamW: sparse gradients are not supported; build embeddings with sparse=False")
        counts = self.step_counts()
        self._rates.follow(self.param_groups)
        return adamw_step.Step(
            params=params,
            grads=grads,
            moments=lambda i: moments_of(self.state[params[i]], params[i], counts[i]),
            counts=counts,
            used=used,
            possible=self._possible(params, grads, used),
            groups=[i for i, group in enumerate(self.param_groups) for _ in group["params"]],
            lr=[g["lr"] for g in self.param_groups] if self._rates.tensor is None else self._rates.tensor,
            hyper=[(*g["betas"], g["eps"], g["weight_decay"]) for g in self.param_groups],
            rule=self.rule,
            unused=self.unused,
            max_norm=self.max_norm,
            grad_scale=getattr(self, "grad_scale", None) if grad_scale is None else grad_scale,
            found_inf=getattr(self, "found_inf", None) if found_inf is None else found_inf,
            in_place=self.clip_gradients_in_place,
            copies=[self.shadow.get(p) for p in params] if self.shadow else (),
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
            self._rates.on_device(self.param_groups)
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
        return self._rates.on_device(self.param_groups)

    def scale_lr(self, multiplier: float | Tensor) -> None:
        """Make every group's learning rate ``multiplier`` times its ``initial_lr`` (the ``lr`` before the first call).

        A number changes the groups' ``lr``. A tensor (a scalar on the device) is not read: it changes ``device_lr``
        only, and the groups' ``lr`` are no longer what steps take.
        """
        self._rates.scale(self.param_groups, multiplier)

    # ---------------------------------------------------------------------------------------------------- the state

    def step_counts(self) -> Tensor:
        """int32 [n]: updates each parameter has had, in the order of the parameters over all groups (not a copy)."""
        params = self._params()
        device = params[0].device
        if self._counts is None:
            adamw_step.refuse(device, "MaskedAdamW's step counts would be made")
            self._counts = torch.zeros(len(params), dtype=torch.int32, device=device)
        elif len(self._counts) < len(params) or self._counts.device != device:
            more = torch.zeros(len(params) - len(self._counts), dtype=torch.int32, device=device)
            self._counts = torch.cat((self._counts.to(device), more))
            self._bind_steps()
        return self._counts

    def _bind_steps(self) -> None:
        """Make every ``state[p]["step"]`` a view of its count."""
        for i, p in enumerate(self._params()):
            if self._counts is not None and self.state.get(p):
                self.state[p]["step"] = self._counts[i]

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def state_dict(self) -> dict:
        """As ``torch.optim.AdamW``'s: ``exp_avg``, ``exp_avg_sq`` and ``step`` (0-d float32) by parameter index."""
        return as_torch_saves(super().state_dict(), self.step_counts())

    def load_state_dict(self, state_dict: dict) -> None:
        """Load what this class or ``torch.optim.AdamW`` saved, by copying. ``UserError`` where it does not fit."""
        params = self._params()
        check_state_dict(state_dict, [tuple(p.shape) for p in params], len(self.param_groups))
        before = [dict(group) for group in self.param_groups]
        self._counts = None  # or the saved step counts would be replaced by views of the present ones while loading
        super().load_state_dict(state_dict)
        complete_groups(self.param_groups, before)
        counts = copy_moments(self.state, params)
        self.step_counts().copy_(torch.tensor(counts, dtype=torch.int32))
        self._bind_steps()
