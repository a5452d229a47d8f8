"""DeepSpeed around one model, with weights and optimizer state in a form that knows neither ranks nor ZeRO stages.

The state of a run is, by parameter name, the float32 weights and AdamW's two moments, whole. Every rank takes its part
of it when an engine is made, so a run may be resumed on another number of ranks, under another stage or in another
precision. Under half precision the model computes in it and DeepSpeed keeps float32 master weights.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..errors import MomoError
from ..extras import require
from ..models import MaskedAutoencoder
from ..models.cpu import lay_out_for_training
from .config import PretrainConfig
from .masters import MasterAdamW
from .optimisation import parameter_groups

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OptimizerState:
    """AdamW's state of a whole model.

    Attributes:
        moments: `exp_avg/<parameter>` and `exp_avg_sq/<parameter>` to float32 tensors on the CPU.
        steps: Optimizer steps taken; AdamW's bias correction needs it.
        loss_scale: Numbers of the dynamic loss scale under fp16, else empty.
    """

    moments: dict[str, torch.Tensor]
    steps: int
    loss_scale: dict[str, float]


class Engine:
    """One rank's part of training one model.

    Args:
        model: The autoencoder on its device, with the weights to start from in float32; it is taken over.
        config: The job; `config.ranks` is the number of ranks of the process group.
        settings: DeepSpeed's configuration, see `momo.pretrain.setup.engine_config`.
        state: Optimizer state to go on from; None at the start of a run. It may be whole on rank 0 alone.
    """

    def __init__(
        self,
        model: MaskedAutoencoder,
        config: PretrainConfig,
        settings: dict[str, Any],
        state: OptimizerState | None = None,
    ) -> None:
        deepspeed = require("deepspeed", "pretrain")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        options = config.train
        self.model, self.half = model, options.precision != "fp32"
        self.stage = int(settings["zero_optimization"]["stage"])
        # DeepSpeed rounds the weights to half precision before it copies its masters from them.
        masters = {name: p.detach().clone() for name, p in model.named_parameters()} if self.half else {}
        groups, betas = parameter_groups(model, options.weight_decay), (options.beta1, options.beta2)
        self._own: MasterAdamW | None = None
        optimizer: torch.optim.Optimizer
        if self.half and self.stage == 0:
            by_weight = {p: masters[name] for name, p in model.named_parameters()}
            model.to(torch.bfloat16)
            optimizer = self._own = MasterAdamW(groups, by_weight, betas=betas)
        else:
            optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
        # Its bf16 optimizer prints the machine's memory, four lines a parameter group.
        with contextlib.redirect_stdout(io.StringIO()):
            self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        if self.stage == 0 and config.world == 1:
            # On one rank it would flatten all gradients and copy them back: a tenth of a ViT-B step on a CPU.
            self.deepspeed.enable_backward_allreduce = False
        if self._own is not None:
            lay_out_for_training(model)  # only now: DeepSpeed wants rows
            self._own.follow_layout()
        self._clip = options.clip_grad
        self._trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._create_moments()
        if self.half and self._own is None:
            self._set_masters(masters)
        if state is not None:
            self._set_state(state)

    # --- steps ----------------------------------------------------------------------------------------------------

    def micro_step(
        self,
        image_BCHW: torch.Tensor,
        valid_BHW: torch.Tensor,
        noise_BN: torch.Tensor,
        *,
        last: bool,
        enter: Callable[[str], None] = lambda phase: None,
    ) -> torch.Tensor:
        """Computes a micro-batch and adds its gradients to the step's.

        Args:
            image_BCHW: See `MaskedAutoencoder.forward`.
            valid_BHW: The same.
            noise_BN: The same.
            last: True for the last micro-batch of a step, after which `finish_step` is called.
            enter: Told when a phase begins, see `momo.pretrain.telemetry.PHASES`.

        Returns:
            The loss of each sample, float32 (B,), detached.
        """
        self.deepspeed.set_gradient_accumulation_boundary(last)
        enter("forward")
        loss_B = self.deepspeed(image_BCHW, valid_BHW, noise_BN)
        enter("backward")
        self.deepspeed.backward(loss_B.mean())
        enter("other")
        if not last:
            self.deepspeed.step()
        return loss_B.detach()

    def finish_step(self, rate: float) -> float:
        """Clips the gradients and updates the weights.

        Args:
            rate: Learning rate.

        Returns:
            The gradients' norm before clipping; not finite when the step was left out for it.

        Raises:
            MomoError: The loss scale of fp16 is at its floor and gradients still overflow.
        """
        for group in self._base_optimizer.param_groups:
            group["lr"] = rate
        if self.stage == 0:
            norm = self._whole_norm()
            if not math.isfinite(norm):
                self._drop_gradients()
                return norm
        try:
            self.deepspeed.step()
        except Exception as error:
            if "minimum" not in str(error):
                raise
            raise MomoError(
                "fp16 gradients overflow at the smallest loss scale",
                seen=str(error).split(".")[0],
                rule="gradients are finite at a loss scale of 1 or more",
                fix="go on with train.precision=bf16 or fp32: the run continues from its last checkpoint",
            ) from None
        if self.stage == 0:
            return norm
        if not self.deepspeed.was_step_applied():
            return math.inf
        norm = float(self.deepspeed.get_global_grad_norm())
        return norm if norm >= 0 else math.nan

    def _whole_norm(self) -> float:
        """Stage 0: every rank has all gradients."""
        if self._own is not None:
            return self._own.gather(self._clip)
        return float(torch.nn.utils.get_total_norm([p.grad for p in self._trainable.values() if p.grad is not None]))

    def discard_step(self) -> None:
        """Throws the gradients of a step away instead of updating the weights; all ranks call it."""
        if self.stage == 0:
            self._drop_gradients()
            return
        # The other stages throw a step away when a gradient is no number, and have no other way to be told to.
        name, parameter = next(iter(self._trainable.items()))
        if (flat := getattr(self.deepspeed.optimizer, "fp32_groups_gradients_flat", None)) is not None:
            flat[0].fill_(math.nan)
        else:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            nothing = torch.full(shape, math.nan, dtype=torch.float32, device=self.deepspeed.device)
            require("deepspeed.utils", "pretrain").safe_set_full_grad(parameter, nothing)
        scale = self.loss_scale
        if scale:
            # Above its floor, where DeepSpeed would give up; the scale is not to blame and comes back below.
            self._set_loss_scale(scale | {"cur_scale": 4 * scale["cur_scale"]})
        norm = self.finish_step(0.0)
        self._set_loss_scale(scale)
        if math.isfinite(norm):
            raise MomoError(
                "DeepSpeed took a step it was to leave out",
                seen=f"gradient of {name}, ZeRO stage {self.stage}",
                rule="a gradient that is no number leaves the weights as they are",
                fix="start again with the same command: the run continues from its last state; use ZeRO stage 0",
            )

    def _drop_gradients(self) -> None:
        self.deepspeed.zero_grad()
        self.deepspeed.micro_steps += 1

    def gradient_squares(self) -> dict[str, float]:
        """Returns the sum of squares of each parameter's gradient; all ranks call it, before `finish_step`."""
        safe_get_full_grad = require("deepspeed.utils", "pretrain").safe_get_full_grad
        found: dict[str, torch.Tensor] = {}
        for name, parameter in self._trainable.items():
            gradient = parameter.grad if self.stage == 0 else safe_get_full_grad(parameter)
            if gradient is not None:
                found[name] = gradient.detach().double().square().sum()
        scale = self.loss_scale.get("cur_scale", 1.0) ** 2
        return {name: value / scale for name, value in zip(found, torch.stack([*found.values()]).tolist(), strict=True)}

    # --- state ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def copy_weights(self, target: MaskedAutoencoder) -> None:
        """Copies the float32 weights into a model of the same shapes; all ranks call it.

        Weights that are not trained are left as they are in `target`.
        """
        get = require("deepspeed.utils", "pretrain").safe_get_full_fp32_param
        wanted = dict(target.named_parameters())
        for name, parameter in self._trainable.items():
            wanted[name].copy_(self._stepped(parameter) if self.stage == 0 else get(parameter))

    @torch.no_grad()
    def optimizer_state(self, *, keep: bool) -> OptimizerState | None:
        """Gathers the optimizer's state; all ranks call it.

        Args:
            keep: True on the rank that wants it; the others get None and hold one tensor at a time.
        """
        get = require("deepspeed.utils", "pretrain").safe_get_full_optimizer_state
        moments: dict[str, torch.Tensor] = {}
        for name, parameter in self._trainable.items():
            for moment in MOMENTS:
                whole = self._moment(parameter, moment) if self.stage == 0 else get(parameter, moment)
                if keep:
                    moments[f"{moment}/{name}"] = (
                        whole.detach().float().cpu().clone(memory_format=torch.contiguous_format)
                    )
        return OptimizerState(moments, self._steps(), self.loss_scale) if keep else None

    @property
    def loss_scale(self) -> dict[str, float]:
        """Numbers of the dynamic loss scale under fp16; empty otherwise."""
        scaler = getattr(self.deepspeed.optimizer, "loss_scaler", None)
        if scaler is None or not getattr(scaler, "dynamic", False):
            return {}
        return {name: getattr(scaler, name) for name in _SCALER_FIELDS}

    def _set_loss_scale(self, numbers: dict[str, float]) -> None:
        for field, value in numbers.items():
            setattr(self.deepspeed.optimizer.loss_scaler, field, value)

    @property
    def _base_optimizer(self) -> torch.optim.Optimizer:
        if self._own is not None:
            return self._own.inner
        return self.deepspeed.optimizer if self.stage == 0 else self.deepspeed.optimizer.optimizer

    def _stepped(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """Stage 0: what the optimizer steps for a parameter, itself or its master."""
        return parameter if self._own is None else self._own.masters[parameter]

    def _moment(self, parameter: torch.nn.Parameter, moment: str) -> torch.Tensor:
        found: torch.Tensor = self._base_optimizer.state[self._stepped(parameter)][moment]
        return found

    def _partitions(self) -> list[torch.Tensor]:
        """What the optimizer steps on this rank: parameters, or flat float32 parts of them."""
        if self.stage == 0:
            return [self._stepped(parameter) for parameter in self._trainable.values()]
        optimizer = self.deepspeed.optimizer
        names = ("fp32_groups_flat_partition", "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
        return next(list(getattr(optimizer, name)) for name in names if hasattr(optimizer, name))

    def _create_moments(self) -> None:
        # AdamW would make them in its first step; they must be there before to be filled.
        for partition in self._partitions():
            self._base_optimizer.state[partition] = {
                "step": torch.zeros((), dtype=torch.float32, device=partition.device),
                **{moment: torch.zeros_like(partition, requires_grad=False) for moment in MOMENTS},
            }
        if self.stage in (1, 2):
            self.deepspeed.optimizer._lazy_init_hp_params_optimizer_state()

    def _steps(self) -> int:
        return int(self._base_optimizer.state[self._partitions()[0]]["step"])

    @torch.no_grad()
    def _set_masters(self, masters: dict[str, torch.Tensor]) -> None:
        set_full = require("deepspeed.utils", "pretrain").safe_set_full_fp32_param
        for name, parameter in self._trainable.items():
            set_full(parameter, masters[name])

    @torch.no_grad()
    def _set_state(self, state: OptimizerState) -> None:
        set_full = require("deepspeed.utils", "pretrain").safe_set_full_optimizer_state
        for name, moment, parameter, shape in self._moments():
            whole = _from_rank_0(state.moments.get(f"{moment}/{name}"), shape, self.deepspeed.device)
            if self.stage == 0:
                self._moment(parameter, moment).copy_(whole)
            else:
                set_full(parameter, whole, moment)
        for partition in self._partitions():
            self._base_optimizer.state[partition]["step"].fill_(float(state.steps))
        if self.loss_scale:
            self._set_loss_scale(state.loss_scale)

    def _moments(self) -> Iterator[tuple[str, str, torch.nn.Parameter, torch.Size]]:
        for name, parameter in self._trainable.items():
            for moment in MOMENTS:
                # Under stage 3 the tensor itself is empty on this rank.
                yield name, moment, parameter, getattr(parameter, "ds_shape", parameter.shape)

    def close(self) -> None:
        """Takes DeepSpeed's hooks off the model, so that another engine can be made in this process."""
        self.deepspeed.destroy()


_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _from_rank_0(tensor: torch.Tensor | None, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """Sends a tensor that rank 0 has to every rank."""
    whole = torch.empty(shape, dtype=torch.float32, device=device)
    if dist.get_rank() == 0:
        assert tensor is not None
        whole.copy_(tensor)
    if dist.get_world_size() > 1:
        dist.broadcast(whole, 0)
    return whole
