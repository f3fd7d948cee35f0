"""Rotary position embedding, with a backward pass of its own."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotate(
    parts: Float[Tensor, "T P H d"], rotation: tuple[Float[Tensor, "T half"], Float[Tensor, "T half"]], count: int
) -> tuple[Float[Tensor, "T H d"], ...]:
    """The P parts of a projection, the first ``count`` of them (queries, keys) with rotary position embedding.

    Su et al. 2021, pairing dimension i with i + d/2 as ESM does.

    Args:
        parts: What the projection gave.
        rotation: Cosines and sines of each token's angles.
        count: How many parts to rotate.
    """
    cos, sin = (part[:, None, None] for part in rotation)
    if torch.compiler.is_compiling():  # the compiler fuses the plain formula
        first, second = parts[:, :count].chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(parts.dtype)
        return *turned.unbind(1), *parts[:, count:].unbind(1)
    rotated: tuple[Tensor, ...] = _Rotation.apply(parts, cos, sin, count)  # type: ignore[no-untyped-call]
    return rotated


class _Rotation(torch.autograd.Function):
    """Rotates in place and gathers the parts' gradients in one tensor, where autograd would copy each several times.

    Under autocast the parts are bfloat16 and the angles float32: computed in the latter and rounded once.
    """

    @staticmethod
    def forward(ctx: Any, parts: Tensor, cos: Tensor, sin: Tensor, count: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.count = count
        rotated = torch.empty_like(parts[:, :count], dtype=cos.dtype)
        _rotate(parts[:, :count], cos, sin, out=rotated)
        return *rotated.to(parts.dtype).unbind(1), *parts[:, count:].unbind(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        length, *heads = gradients[0].shape
        gathered = cos.new_empty(length, len(gradients), *heads)
        for i, gradient in enumerate(gradients):
            if i < ctx.count:  # the gradient of a rotation is the opposite rotation
                _rotate(gradient, cos[:, 0], -sin[:, 0], out=gathered[:, i])
            else:
                gathered[:, i] = gradient
        return gathered.to(gradients[0].dtype), None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    half = x.shape[-1] // 2
    torch.mul(x, torch.cat((cos, cos), dim=-1), out=out)
    out[..., :half].addcmul_(x[..., half:], sin, value=-1)
    out[..., half:].addcmul_(x[..., :half], sin)
