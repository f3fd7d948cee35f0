"""FSDP2: weights, gradients and optimizer state divided among the processes, and whole again in a checkpoint."""

from collections.abc import Mapping
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from pretrain.errors import UserError
from pretrain.model.encoder import Block, Encoder
from pretrain.train.checkpoint import read_checkpoint


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2 over all processes, with checkpoints like those of any other strategy.

    A checkpoint is one file of whole tensors, the optimizer's state numbered as torch numbers it, so that it continues
    under any strategy on any number of processes. Lightning's own class numbers it by the order of the module's
    parameters, which is another as soon as there are two parameter groups, and lets the optimizer's hyper-parameters
    of the checkpoint win over those configured.

    Args:
        timeout: How long a process waits for the others before it gives up.
    """

    def __init__(self, timeout: timedelta = timedelta(minutes=30)) -> None:
        super().__init__(save_distributed_checkpoint=False, timeout=timeout)

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.model is not None
        return self._whole(self.model.state_dict())

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return self._whole(plain.state_dict())

    def _whole(self, state: dict[str, Any]) -> dict[str, Any]:
        """A copy of the state with whole tensors on the CPU, on the first process; one at a time, by all together."""

        def gather(tensor: Tensor) -> Tensor | None:
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            return tensor.detach().to("cpu", copy=True) if self.is_global_zero else None

        state = tree_map_only(Tensor, gather, state)
        return state if self.is_global_zero else {}

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(checkpoint_path))  # mapped: a process reads what it needs, when it needs it

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.model is not None
        own = self.model.state_dict()
        whole = checkpoint["state_dict"].items()
        self.model.load_state_dict({k: _divided_as(own[k], v) if k in own else v for k, v in whole}, strict=strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, whole in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
            numbers = chain.from_iterable(group["params"] for group in whole["param_groups"])
            parameter_of = dict(zip(numbers, parameters, strict=True))
            state = {
                number: {name: _divided_as(parameter_of[number], value) for name, value in values.items()}
                for number, values in whole["state"].items()
            }
            optimizer.load_state_dict({**whole, "state": state})


def _divided_as(model: Tensor, whole: Any) -> Any:
    """This process's part of a whole tensor, divided as ``model`` is; anything of another shape as it was."""
    if not isinstance(model, DTensor) or not isinstance(whole, Tensor) or whole.shape != model.shape:
        return whole
    # Every process holds the whole, so nothing is sent; a copy, since a part would keep the whole in memory.
    return distribute_tensor(whole, model.device_mesh, model.placements, src_data_rank=None).clone()


def shard(encoder: Encoder, mesh: DeviceMesh, precision: str) -> None:
    """Divide an encoder's parameters among the data-parallel processes, block by block (FSDP2).

    The embedding, tied with the head, forms one group with the final norm and the head: it is whole from the first
    layer of the forward pass to the last of the backward pass. Nothing happens to an encoder that is divided already.

    Under ``bf16-mixed`` the matrices are gathered as bfloat16, which is what autocast would round them to anyway, and
    their gradients summed in float32. Layer norms, the embedding and the head are gathered as float32, and inputs left
    alone: so the numbers are those of autocast without FSDP2, the residual stream and the rotary angles in float32.

    Args:
        encoder: On the CPU or on its device, with the same values in every process.
        mesh: What Lightning gives: dimensions ``data_parallel`` and ``tensor_parallel``.
        precision: The Trainer's.

    Raises:
        UserError: If the mesh asks for tensor parallelism, which the encoder has not.
    """
    if isinstance(encoder, FSDPModule):
        return
    if (size := mesh["tensor_parallel"].size()) > 1:
        raise UserError(
            f"the strategy's tensor_parallel_size is {size}, the encoder is divided by data-parallel processes only: "
            "use pretrain.train.sharding.FullyShardedStrategy, or give tensor_parallel_size 1"
        )
    mesh = mesh["data_parallel"]
    policy = MixedPrecisionPolicy()
    if precision == "bf16-mixed":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in encoder.blocks:
        assert isinstance(block, Block)
        if precision == "bf16-mixed":
            fully_shard([block.attention_norm, block.ffn_norm], mesh=mesh, reshard_after_forward=False)
        # The last block is wanted again as soon as the backward pass begins.
        again = block is not encoder.blocks[-1]
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=again)
    fully_shard(encoder, mesh=mesh)
    for method in ("loss", "score"):
        register_fsdp_forward_method(encoder, method)  # gathers as a call of the encoder does
