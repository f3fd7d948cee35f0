"""Contacts between residues, read from attention maps by a logistic regression.

Rao et al., "Transformer protein language models are unsupervised structure learners", ICLR 2021; the function is that
of transformers' ``EsmContactPredictionHead`` (and of facebookresearch/esm, ``ContactPredictionHead``).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pretrain.errors import UserError
from pretrain.model.config import EncoderConfig
from pretrain.model.encoder import Encoder, check_finite


@dataclass(frozen=True)
class ContactRegression:
    """A weight for each attention map of an encoder, the first block's heads first, and a bias.

    Attributes:
        weight: Shape [layers · heads].
        bias: A number.
    """

    weight: Float[Tensor, " maps"]
    bias: Float[Tensor, ""]

    def check(self, config: EncoderConfig, source: str) -> None:
        """Refuse an encoder with another number of attention maps; ``source`` is what errors call the regression.

        Raises:
            UserError: If it has another number.
        """
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        if len(self.weight) != layers * heads:
            raise UserError(
                f"{source}: a contact regression over {len(self.weight)} attention maps, the model has "
                f"{layers * heads} ({layers} layers of {heads} heads); give one that was fitted on this model"
            )

    @torch.inference_mode()
    def predict(self, encoder: Encoder, input_ids: Int[Tensor, " T"]) -> Float[Tensor, "L L"]:
        """The probability of a contact between any two residues of one sequence.

        One block's attention maps are in memory at a time.

        Args:
            encoder: Whose attention the regression reads.
            input_ids: The sequence between its ``<cls>`` and ``<eos>``, so L = T - 2.

        Raises:
            UserError: If a probability is NaN, as of a model that went astray.
        """
        weights = self.weight.to(input_ids.device).view(encoder.config.num_hidden_layers, -1)
        logits = self.bias.to(input_ids.device)
        for weight, maps in zip(weights, corrected_maps(encoder, input_ids), strict=True):
            logits = logits + torch.einsum("h,hij->ij", weight, maps)
        return check_finite(logits.sigmoid())


def corrected_maps(encoder: Encoder, input_ids: Int[Tensor, " T"]) -> Iterator[Float[Tensor, "H L L"]]:
    """Block by block, what the regression reads: attention between residues, symmetrised, without its background.

    The background of a pair is the product of both residues' sums over the sum of all: the average product correction
    of Dunn et al. 2008.
    """
    for maps in encoder.attention_maps(input_ids):
        between = maps[:, 1:-1, 1:-1].float()
        symmetric = between + between.transpose(1, 2)
        sums = symmetric.sum(-1)
        yield symmetric - sums[:, :, None] * sums[:, None, :] / sums.sum(-1)[:, None, None]


@torch.inference_mode()
def pair_features(
    encoder: Encoder, input_ids: Int[Tensor, " T"], first: Int[Tensor, " pairs"], second: Int[Tensor, " pairs"]
) -> Float[Tensor, "pairs maps"]:
    """What the regression reads of some pairs of residues, on the CPU.

    Args:
        encoder: Whose attention it is.
        input_ids: As for `ContactRegression.predict`.
        first: One residue of each pair, from 0.
        second: The other.
    """
    return torch.cat([maps[:, first, second].T.cpu() for maps in corrected_maps(encoder, input_ids)], dim=1)
