"""FSDP2: weights, gradients and optimizer state divided among the processes, and so in a checkpoint."""

import errno
import os
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
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from pretrain.errors import UserError
from pretrain.model.encoder import Block, Encoder
from pretrain.train.checkpoint import read_checkpoint
from pretrain.train.divided import PARTS, DividedTensor, OwnRows, part_name, parts_of, take_out, write_part

SAME_DIRECTORY = "put the run where all machines see the same directory"


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2 over all processes, with checkpoints that continue under any other strategy.

    Each process writes its part of the tensors, as safetensors, and takes only its part, of however many processes
    wrote them; the optimizer's state is numbered as torch numbers it. (Lightning's own class numbers it by the order of
    the module's parameters, which is another as soon as there are two parameter groups, lets the optimizer's
    hyper-parameters of the checkpoint win over those configured, and divides checkpoints into pickled files.)

    Args:
        timeout: How long a process waits for the others before it gives up.
    """

    def __init__(self, timeout: timedelta = timedelta(minutes=30)) -> None:
        super().__init__(timeout=timeout)

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()
        # Checkpoints may be written by threads, which cannot share a group with the training that goes on beside them.
        self._writers = torch.distributed.new_group(backend="gloo", timeout=self._timeout)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.model is not None
        return own_rows(self.model.state_dict())

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return own_rows((optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).state_dict())

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint, all processes together. A process that fails raises, and so does rank 0.

        Raises:
            OSError: If a part cannot be written: this process's, or on rank 0 anybody's.
            UserError: On rank 0, if it does not see what the others write.
        """
        path, (content, own) = Path(filepath), take_out(checkpoint)
        parts = [path.with_name(part_name(path, process, self.world_size)) for process in range(self.world_size)]
        mine, error, digest = parts[self.global_rank], 0, bytes(32)
        try:
            digest = write_part(mine, own)
        except BaseException as problem:
            error = (problem.errno if isinstance(problem, OSError) else None) or errno.EIO
            raise
        finally:
            outcomes = self._exchange(error, digest)
            failed = [(number, part) for (number, _), part in zip(outcomes, parts, strict=True) if number]
            if failed:  # there will be no checkpoint; nothing of it takes up room
                mine.unlink(missing_ok=True)
        if not self.is_global_zero:
            return
        if failed:
            raise OSError(failed[0][0], os.strerror(failed[0][0]), str(failed[0][1]))
        if missing := [part for part in parts if not part.exists()]:
            mine.unlink()
            raise UserError(f"{missing[0]}: was written by another machine, and is not seen here; {SAME_DIRECTORY}")
        content[PARTS] = {part.name: digest for part, (_, digest) in zip(parts, outcomes, strict=True)}
        try:
            super(ModelParallelStrategy, self).save_checkpoint(content, path, storage_options)
        except OSError:
            for part in parts:
                part.unlink(missing_ok=True)
            raise
        for part in parts_of(path):
            if part not in parts:  # of a checkpoint that this one takes the place of
                part.unlink()

    def _exchange(self, error: int, digest: bytes) -> list[tuple[int, str]]:
        """Tell all processes how writing went; each one's error number, or 0, and checksum."""
        mine = torch.tensor([error, *digest])
        told = [torch.empty_like(mine) for _ in range(self.world_size)]
        torch.distributed.all_gather(told, mine, group=self._writers)
        return [(number, bytes(digest).hex()) for number, *digest in (one.tolist() for one in told)]

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(checkpoint_path))  # mapped: a process reads what it needs, when it needs it

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.model is not None
        own = self.model.state_dict()
        saved = checkpoint["state_dict"].items()
        self.model.load_state_dict({k: _divided_as(own[k], v) if k in own else v for k, v in saved}, strict=strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
            numbers = chain.from_iterable(group["params"] for group in saved["param_groups"])
            parameter_of = dict(zip(numbers, parameters, strict=True))
            state = {
                number: {name: _divided_as(parameter_of[number], value) for name, value in values.items()}
                for number, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def own_rows(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of the state on the CPU that no further step changes; of what is divided, this process's rows."""

    def copy(tensor: Tensor) -> Tensor | OwnRows:
        if isinstance(tensor, DTensor):
            return OwnRows(tensor.shape, tensor.to_local().detach().to("cpu", copy=True).contiguous())
        return tensor.detach().to("cpu", copy=True)

    copied: dict[str, Any] = tree_map_only(Tensor, copy, state)
    return copied


def _divided_as(model: Tensor, saved: Any) -> Any:
    """This process's rows of a saved tensor, divided as ``model`` is; anything of another shape whole, as it was."""
    if not isinstance(saved, Tensor | DividedTensor):
        return saved
    if not isinstance(model, DTensor) or saved.shape != model.shape:
        return saved[:] if isinstance(saved, DividedTensor) else saved
    # As torch.chunk divides rows, and FSDP2 with it. A copy: a view would keep the whole in memory.
    mesh, count = model.device_mesh, -(-saved.shape[0] // model.device_mesh.size())
    rows = saved[mesh.get_local_rank() * count : (mesh.get_local_rank() + 1) * count].to(model.device, copy=True)
    return DTensor.from_local(rows, mesh, model.placements, run_check=False, shape=model.shape, stride=model.stride())


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
        UserError: If the mesh asks for tensor parallelism, which the encoder does not support.
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
