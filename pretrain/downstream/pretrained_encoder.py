"""`PretrainedEncoder`: what `pretrain.load` returns, an encoder that takes strings, too."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from typing_extensions import override

from pretrain.corpus.tokenizer import Tokenizer, encode_or_refuse
from pretrain.errors import UserError
from pretrain.model.attention import Layout
from pretrain.model.config import EncoderConfig
from pretrain.model.contacts import ContactRegression
from pretrain.model.encoder import Encoder, check_finite

PACK_TOKENS = {"cpu": 2**12, "cuda": 2**16}
"""Tokens of a forward pass: on a CPU any number from a thousand on is as fast, a GPU needs more to be busy."""


class PretrainedEncoder(Encoder):
    """An `Encoder` together with the tokenizer that it was trained with.

    Everything that an `Encoder` does it does unchanged. On a GPU (``model.to("cuda")``) the methods that take strings
    compute in bfloat16 and return float32.

    Args:
        config: The encoder's shape.
        read_tokenizer: Gives the tokenizer, when it is first needed: an encoder without one is still an encoder.
        max_length: Tokens of the longest crops that the model was trained on, ``<cls>`` and ``<eos>`` included; None
            if that is not known.

    Attributes:
        fine_tuned: Whether it was, so that the masked-LM head, which had no part in that, no longer fits.
        contacts: The model's contact regression, where it brought one (`pretrain contacts --fit` makes one).
        contacts_are_older: Whether that is the one of the model that training began with.
    """

    def __init__(self, config: EncoderConfig, read_tokenizer: Callable[[], Tokenizer], max_length: int | None) -> None:
        super().__init__(config)
        self.max_length = max_length
        self.fine_tuned = False
        self.contacts: ContactRegression | None = None
        self.contacts_are_older = False
        self._read_tokenizer = read_tokenizer

    @override
    def reset_parameters(self) -> None:
        """Nothing: the weights are loaded."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Strings to ids.

        Raises:
            UserError: If none is stored with the model, or one that does not fit it.
        """
        return self._read_tokenizer()

    def embed(
        self,
        sequences: Sequence[str],
        *,
        per: str = "sequence",
        pooling: str = "mean",
        layers: int | Sequence[int] = -1,
        max_length: int | None = None,
        progress: bool = False,
    ) -> Tensor | list[Tensor]:
        """Hidden states of strings, as vectors to work with.

        There is no batch size: the sequences are sorted by length, packed without padding, and come back in the order
        they were given in; a sequence's embedding does not depend on its neighbours beyond rounding.

        Args:
            sequences: Proteins or documents.
            per: ``sequence``: one vector for each; ``residue``: one for each token but ``<cls>``, ``<eos>``.
            pooling: What a sequence's one vector is: the ``mean`` over its tokens, without ``<cls>`` and ``<eos>``, or
                the hidden state of ``cls``.
            layers: Which block's output: 1 is the first, ``num_hidden_layers`` or -1 the last (layer-normed: what the
                head reads), 0 the embedding. Several give one more dimension.
            max_length: Only the first tokens (3 or more, ``<cls>`` counts) of longer sequences are read; by default all
                of them: rotary positions have no end, but beyond ``model.max_length`` nothing was trained.
            progress: Show a progress bar.

        Returns:
            On the CPU, in float32: [N, D], or [N, layers, D] for several layers; per residue, N of [length, D] or
            [length, layers, D].

        Raises:
            UserError: If a sequence is empty or has a symbol that the tokenizer does not know, a layer does not exist
                or is named twice, a setting is none of those above, there is no tokenizer, or the model's outputs are
                not finite.
        """
        chosen = self.resolve_layers([layers] if isinstance(layers, int) else layers)
        check_choices(per, pooling, max_length)
        tokens = [ids[:max_length] for ids in self._encode_all(sequences)]
        with tqdm(total=sum(map(len, tokens)), desc="embedding", unit="token", disable=not progress) as bar:
            values, offsets = self.embed_tokens(tokens, per, pooling, chosen, bar.update)
        result = torch.from_numpy(values[:, 0] if isinstance(layers, int) else values)
        return result if per == "sequence" else list(result.split(np.diff(offsets).tolist()))

    def predict_contacts(
        self, sequences: Sequence[str], regression: ContactRegression | None = None
    ) -> list[Float[Tensor, "L L"]]:
        """The probability of a contact (Cβ closer than 8 Å) between any two residues of each sequence.

        Args:
            sequences: Proteins.
            regression: What reads it from the attention maps; by default the model's own.

        Returns:
            A map for each, on the CPU.

        Raises:
            UserError: If the model has no regression and none is given, or as for `embed`.
        """
        regression = regression or self.contacts
        if regression is None:
            raise UserError("the model has no contact regression; fit one by `pretrain contacts --fit`, or give one")
        regression.check(self.config, "the regression")
        return [regression.predict(self, self.lay_out([ids])[0]).cpu() for ids in self._encode_all(sequences)]

    def encode(self, sequence: str, name: str) -> NDArray[np.unsignedinteger]:
        """A string's ids, ``<cls>`` in front and ``<eos>`` behind; ``name`` is what errors call it.

        Raises:
            UserError: If it is empty, or has a symbol without an id.
        """
        return encode_or_refuse(self.tokenizer, sequence.encode("utf-8", "surrogatepass"), name)

    def _encode_all(self, sequences: Sequence[str]) -> list[NDArray[np.unsignedinteger]]:
        if isinstance(sequences, str):
            raise UserError("a list of strings is expected, this is a single one; put it in brackets")
        return [self.encode(sequence, f"sequence {number}") for number, sequence in enumerate(sequences)]

    def resolve_layers(self, layers: Sequence[int]) -> list[int]:
        """Layers as numbers from 0 (the embedding) on; negative ones count from the last.

        Raises:
            UserError: If one does not exist or is named twice, or none is given.
        """
        deepest = self.config.num_hidden_layers
        if not layers:
            raise UserError("no layer is given; name at least one")
        for layer in layers:
            if not -deepest - 1 <= layer <= deepest:
                raise UserError(f"layer {layer} does not exist; this model has 0 (the embedding) to {deepest}")
        resolved = [layer % (deepest + 1) for layer in layers]
        if twice := [layer for number, layer in enumerate(resolved) if layer in resolved[:number]]:
            raise UserError(f"layer {twice[0]} is named twice (-1 is layer {deepest}); name each once")
        return resolved

    def embed_tokens(
        self,
        tokens: Sequence[NDArray[np.unsignedinteger]],
        per: str,
        pooling: str,
        layers: Sequence[int],
        done: Callable[[int], object],
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """As `embed`, of tokens.

        Args:
            tokens: Ids with ``<cls>`` and, where it was not cut off, ``<eos>``.
            per: As for `embed`.
            pooling: As for `embed`.
            layers: From `resolve_layers`.
            done: Called with the number of tokens after each forward pass.

        Returns:
            Rows of [layers, D], one a sequence or one a residue, sequence by sequence; and where the sequences begin
            among them, with the number of rows last.

        Raises:
            UserError: If a number is not finite.
        """
        ends = [len(ids) - int(ids[-1] == self.tokenizer.eos_token_id) for ids in tokens]
        rows = [1] * len(tokens) if per == "sequence" else [end - 1 for end in ends]
        offsets = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        values = np.empty((offsets[-1], len(layers), self.config.hidden_size), np.float32)
        for pack in self.packs([len(ids) for ids in tokens]):
            input_ids, cu_seqlens = self.lay_out([tokens[i] for i in pack])
            outputs = torch.stack(self.layer_outputs(input_ids, cu_seqlens, layers), dim=1)
            parts = outputs.split([len(tokens[i]) for i in pack])
            if per == "residue":
                pooled = [part[1 : ends[i]] for part, i in zip(parts, pack, strict=True)]
            elif pooling == "cls":
                pooled = [part[:1] for part in parts]
            else:
                pooled = [part[1 : ends[i]].mean(0, keepdim=True) for part, i in zip(parts, pack, strict=True)]
            on_host = check_finite(torch.cat(pooled)).cpu().numpy()
            places = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in pack])
            values[places] = on_host
            done(len(input_ids))
        return values, offsets

    @torch.inference_mode()
    def log_probabilities(
        self, tokens: Sequence[NDArray[np.integer]], positions: Sequence[Sequence[int]]
    ) -> list[NDArray[np.float32]]:
        """What the masked-LM head says, at some places.

        Args:
            tokens: Sequences of ids, ``<cls>`` and ``<eos>`` included, masked or not.
            positions: Of each sequence, the places to predict, ascending.

        Returns:
            Of each sequence, natural logarithms of probabilities over the vocabulary, [places, V].

        Raises:
            UserError: If one is not finite.
        """
        result: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(tokens)
        for pack in self.packs([len(ids) for ids in tokens]):
            input_ids, cu_seqlens = self.lay_out([tokens[i] for i in pack])
            starts = cu_seqlens.tolist()
            rows = [start + place for start, i in zip(starts, pack, strict=False) for place in positions[i]]
            with self.precision():
                hidden = self.hidden_states(input_ids, cu_seqlens, None, torch.tensor(rows, device=input_ids.device))
            # Differences of these numbers are scores: the head does not round them to bfloat16.
            logits = self.head(hidden.to(self.embedding.weight.dtype), self.embedding.weight)
            found = check_finite(logits.float().log_softmax(-1)).cpu().split([len(positions[i]) for i in pack])
            for i, part in zip(pack, found, strict=True):
                result[i] = part.numpy()
        return result

    def packs(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Sequences to compute together, the longest first, so that neighbours are about equally long."""
        budget = PACK_TOKENS["cuda" if self.embedding.weight.is_cuda else "cpu"]
        pack: list[int] = []
        size = 0
        for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
            if pack and size + lengths[i] > budget:
                yield pack
                pack, size = [], 0
            pack.append(i)
            size += lengths[i]
        if pack:
            yield pack

    def lay_out(self, tokens: Sequence[NDArray[np.integer]]) -> tuple[Tensor, Tensor]:
        """Sequences end to end, on the model's device: ``input_ids`` and ``cu_seqlens``."""
        device = self.embedding.weight.device
        bounds = np.cumsum([0, *map(len, tokens)], dtype=np.int32)
        return (
            torch.from_numpy(np.concatenate(tokens).astype(np.int64)).to(device),
            torch.from_numpy(bounds).to(device),
        )

    @torch.inference_mode()
    def layer_outputs(
        self, input_ids: Int[Tensor, " T"], cu_seqlens: Int[Tensor, " bounds"], layers: Sequence[int]
    ) -> list[Float[Tensor, "T D"]]:
        """The hidden states of some layers (see `embed`), in float32, at the speed of training's forward pass.

        transformers' ``hidden_states`` of the same numbers. Blocks behind the last that is asked for are not computed.
        """
        with self.precision():
            layout = Layout.of(cu_seqlens)
            hidden, rotation, _ = self._embed(input_ids, cu_seqlens)
            kept = {0: hidden}
            for number, block in enumerate(self.blocks[: max(layers)], 1):
                hidden = block(hidden, rotation, layout)
                if number in layers:
                    kept[number] = hidden if number < len(self.blocks) else self.norm(hidden)
        return [kept[layer].float() for layer in layers]

    def precision(self) -> torch.autocast:
        """bfloat16 on CUDA, whose attention has no float32; on the CPU the weights' own precision."""
        device = self.embedding.weight.device.type
        return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def check_choices(per: str, pooling: str, max_length: int | None) -> None:
    """Raises `UserError` if one cannot be; see `PretrainedEncoder.embed`."""
    if per not in ("sequence", "residue"):
        raise UserError(f"per is '{per}'; give sequence or residue")
    if pooling not in ("mean", "cls"):
        raise UserError(f"pooling is '{pooling}'; give mean or cls")
    if per == "residue" and pooling == "cls":
        raise UserError("pooling is 'cls', but per residue nothing is pooled; leave one of the two out")
    if max_length is not None and max_length < 3:
        raise UserError(f"max_length is {max_length}; give at least 3 tokens: <cls>, a residue, <eos>")
