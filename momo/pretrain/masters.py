"""AdamW for weights in bfloat16 that keeps float32 masters of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.adamw import adamw

_BUCKET = 2**20  # gradients converted at once: 4 MB, which stay in the cache while they are used


@dataclass(frozen=True)
class _Bucket:
    """Weights of one parameter group that are stepped together.

    Attributes:
        group: Parameter group of the inner optimizer.
        weights: In bfloat16.
        masters: Their float32 values.
        size: Number of elements.
    """

    group: dict[str, Any]
    weights: list[torch.nn.Parameter]
    masters: list[torch.Tensor]
    size: int


class MasterAdamW(torch.optim.Optimizer):
    """Steps float32 masters and rounds them into the weights (mixed precision, Micikevicius et al. 2018, 1710.03740).

    What DeepSpeed does from ZeRO stage 1 on, for the case without partitions and without sums of micro-batches.
    Gradients are converted, stepped and rounded in buckets that fit the cache, so no float32 gradients are kept and
    the memory is passed over less often (figures in docs/performance.md).

    Args:
        groups: Parameter groups of bfloat16 weights, see `momo.pretrain.optimisation.parameter_groups`.
        masters: float32 values to start from, by parameter.
        betas: Of AdamW.

    Attributes:
        masters: The same tensors, stepped.
        inner: Holder of the moments, by master, and of the groups' rates and decays.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        masters: Mapping[torch.nn.Parameter, torch.Tensor],
        *,
        betas: tuple[float, float],
    ) -> None:
        super().__init__(groups, {"lr": 0.0})
        self.masters = {weight: masters[weight] for group in groups for weight in group["params"]}
        own = [group | {"params": [self.masters[weight] for weight in group["params"]]} for group in groups]
        self.inner = torch.optim.AdamW(own, lr=0.0, betas=betas, fused=True)
        self._buckets = [
            bucket
            for group, inner in zip(groups, self.inner.param_groups, strict=True)
            for bucket in self._split(group["params"], inner)
        ]
        device = next(iter(self.masters.values())).device
        self._scratch = torch.empty(max(bucket.size for bucket in self._buckets), device=device)
        self._divisor: torch.Tensor | None = None

    def _split(self, weights: list[torch.nn.Parameter], group: dict[str, Any]) -> Iterator[_Bucket]:
        part: list[torch.nn.Parameter] = []
        for weight in [*weights, None]:
            size = sum(known.numel() for known in part)
            if part and (weight is None or size + weight.numel() > _BUCKET):
                yield _Bucket(group, part, [self.masters[known] for known in part], size)
                part = []
            if weight is not None:
                part.append(weight)

    @torch.no_grad()
    def follow_layout(self) -> None:
        """Lays the masters out in memory like their weights; call it after the weights' layout changed."""
        for weight, master in self.masters.items():
            master.data = torch.empty_like(weight, dtype=torch.float32).copy_(master)

    @torch.no_grad()
    def gather(self, clip: float) -> float:
        """Measures the gradients of the weights, before `step`.

        Args:
            clip: Largest norm that `step` lets through; 0 does not clip.

        Returns:
            Their norm before clipping, summed in float32.
        """
        if any(weight.grad is None for weight in self.masters):
            raise RuntimeError("a weight has no gradient")
        squares = []
        for bucket in self._buckets:
            self._convert(bucket)
            flat = self._scratch[: bucket.size]
            squares.append(torch.dot(flat, flat))
        norm = float(torch.stack(squares).sum().sqrt())
        self._divisor = torch.full_like(squares[0], (norm + 1e-6) / clip) if clip > 0 and norm > clip else None
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates masters and weights from the weights' gradients, clipped as `gather` found."""
        for bucket in self._buckets:
            states = [self.inner.state[master] for master in bucket.masters]
            masters = [_flat(master) for master in bucket.masters]
            beta1, beta2 = bucket.group["betas"]
            adamw(
                masters,
                self._convert(bucket),
                [_flat(state["exp_avg"]) for state in states],
                [_flat(state["exp_avg_sq"]) for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                grad_scale=self._divisor,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=bucket.group["lr"],
                weight_decay=bucket.group["weight_decay"],
                eps=bucket.group["eps"],
                maximize=False,
            )
            torch._foreach_copy_([_flat(weight) for weight in bucket.weights], masters)

    def _convert(self, bucket: _Bucket) -> list[torch.Tensor]:
        """Writes a bucket's gradients to the scratch, flat, each in the order of its weight in memory."""
        parts = list(self._scratch[: bucket.size].split([weight.numel() for weight in bucket.weights]))
        for part, weight in zip(parts, bucket.weights, strict=True):
            assert weight.grad is not None
            part.as_strided(weight.shape, weight.stride()).copy_(weight.grad)
        return parts


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the elements of a dense tensor as they lie in memory; the fused kernel wants them so."""
    return tensor.as_strided((tensor.numel(),), (1,))
