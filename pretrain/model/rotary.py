"""Rotary position embedding, with a backward pass of its own."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.model.cpu_kernels import takes


def rotate(
    parts: Float[Tensor, "T P H d"],
    rotation: tuple[Float[Tensor, "T half"], Float[Tensor, "T half"]],
    count: int,
    llvm: bool = False,
) -> tuple[Float[Tensor, "T H d"], ...]:
    """The P parts of a projection, the first ``count`` of them (queries, keys) with rotary position embedding.

    Su et al. 2021, pairing dimension i with i + d/2 as ESM does.

    Args:
        parts: What the projection gave.
        rotation: Cosines and sines of each token's angles.
        count: How many parts to rotate.
        llvm: Let the project's own kernel compute it where it can: see `takes`.
    """
    cos, sin = rotation
    if torch.compiler.is_compiling():  # the compiler fuses the plain formula
        cos, sin = cos[:, None, None], sin[:, None, None]
        first, second = parts[:, :count].chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(parts.dtype)
        return *turned.unbind(1), *parts[:, count:].unbind(1)
    rotated: tuple[Tensor, ...] = _Rotation.apply(parts, cos, sin, count, llvm)  # type: ignore[no-untyped-call]
    return rotated


class _Rotation(torch.autograd.Function):
    """Gathers the gradients of all parts in one tensor, where autograd would copy each several times.

    Under autocast the parts are bfloat16 and the angles float32: computed in the latter and rounded once.
    """

    @staticmethod
    def forward(ctx: Any, parts: Tensor, cos: Tensor, sin: Tensor, count: int, llvm: bool) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.count, ctx.llvm = count, llvm
        rotated = cos.new_empty(parts[:, :count].shape)
        _rotate(parts[:, :count], cos, sin, rotated, llvm)
        return *rotated.to(parts.dtype).unbind(1), *parts[:, count:].unbind(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        cos, sin = ctx.saved_tensors
        length, *heads = gradients[0].shape
        gathered = cos.new_empty(length, len(gradients), *heads)
        for i, gradient in enumerate(gradients):
            if i < ctx.count:  # the gradient of a rotation is the opposite rotation
                _rotate(gradient, cos, -sin, gathered[:, i], ctx.llvm)
            else:
                gathered[:, i] = gradient
        return gathered.to(gradients[0].dtype), None, None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, llvm: bool) -> None:
    if llvm and takes(x, cos, sin, out):
        from pretrain.model.cpu_rotary import cpu_rotate

        cpu_rotate(x, cos, sin, out)
        return
    cos, sin = (part.view(len(part), *[1] * (x.dim() - 2), part.shape[-1]) for part in (cos, sin))
    half = x.shape[-1] // 2
    torch.mul(x, torch.cat((cos, cos), dim=-1), out=out)
    out[..., :half].addcmul_(x[..., half:], sin, value=-1)
    out[..., half:].addcmul_(x[..., :half], sin)
