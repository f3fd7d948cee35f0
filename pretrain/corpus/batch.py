"""From a pack's description to its tensors: all that a loader worker does."""

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from pretrain.corpus.masking import Crops, Masking
from pretrain.corpus.packing import Pack
from pretrain.corpus.store import Corpus


@dataclass
class Batch:
    """One pack as tensors: T tokens of N sequences laid end to end, M of them targets.

    Attributes:
        input_ids: The corrupted tokens.
        cu_seqlens: Where the sequences begin, and T last.
        target_positions: Places of the targets in the pack, ascending.
        targets: The original tokens there.
        max_seqlen: Length of the longest sequence.
        pack: The description that this was made from, with the number of targets that each sequence has now.
    """

    input_ids: Int[Tensor, " T"]
    cu_seqlens: Int[Tensor, " bounds"]
    target_positions: Int[Tensor, " M"]
    targets: Int[Tensor, " M"]
    max_seqlen: int
    pack: Pack

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> Self:
        """The same batch on another device.

        Args:
            device: Where to.
            non_blocking: Go on before it has arrived, as is safe on the way to a GPU and not from it. By default so:
                Lightning asks for it with tensors only, and would wait for the GPU at every batch.
        """
        if non_blocking is None:
            non_blocking = torch.device(device).type == "cuda"
        return replace(self, **{k: v.to(device, non_blocking=non_blocking) for k, v in self._tensors().items()})

    def pin_memory(self) -> Self:
        """The same batch in page-locked memory, as ``DataLoader(pin_memory=True)`` asks for."""
        return replace(self, **{k: v.pin_memory() for k, v in self._tensors().items()})

    def __getstate__(self) -> dict[str, Any]:
        # Loader workers send arrays through their pipe, not tensors, which torch would put into /dev/shm: that is small
        # in containers, and where it is full a batch is lost and training waits for it for ever.
        return {**vars(self), **{name: tensor.numpy() for name, tensor in self._tensors().items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        arrays = {name: value for name, value in state.items() if isinstance(value, np.ndarray)}
        vars(self).update(state, **{name: torch.from_numpy(array) for name, array in arrays.items()})

    def _tensors(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


class PackDataset(Dataset[Batch]):
    """A pure function from a pack's description to its batch.

    Args:
        corpus: Where the tokens are.
        masking: How they are masked.
    """

    def __init__(self, corpus: Corpus, masking: Masking) -> None:
        self.corpus, self.masking = corpus, masking

    def __getitem__(self, pack: Pack) -> Batch:
        ends = (pack.starts + pack.lengths).tolist()
        crops = list(zip(pack.indices.tolist(), pack.starts.tolist(), ends, strict=True))
        tokens = np.concatenate([self.corpus.tokens(index)[start:end] for index, start, end in crops])
        word_starts = None
        if self.masking.unit == "word":
            word_starts = np.concatenate([self.corpus.word_starts(index)[start:end] for index, start, end in crops])
        cu_seqlens = np.concatenate([[0], np.cumsum(pack.lengths)])
        first = cu_seqlens[:-1] + (pack.starts == 0)
        inputs, positions, targets = self.masking.apply(
            tokens, Crops(first, pack.maskable, pack.targets, pack.epochs, pack.indices), word_starts
        )
        return Batch(
            input_ids=torch.from_numpy(inputs),
            cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
            target_positions=torch.from_numpy(positions),
            targets=torch.from_numpy(targets),
            max_seqlen=int(pack.lengths.max()),
            pack=replace(pack, targets=np.diff(np.searchsorted(positions, cu_seqlens))),
        )
