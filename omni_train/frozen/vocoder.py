"""The decoder of a trained codec, from codes to sound: how the Talker is heard while it learns."""

from __future__ import annotations

import numpy as np
import torch

from omni_train import platform
from omni_train.data.samples.lengths import codec_sampling_rate
from omni_train.errors import UserError
from omni_train.frozen.codec import OpenCodec, code2wav_of, codec_hash, read_codec
from omni_train.models.code2wav import Code2Wav
from omni_train.nn.waveform import StreamingState
from omni_train.recipe.schema import Recipe, required

PIECE = 300
"""Frames that are decoded at a time: memory does not grow with the length of the speech."""


class Vocoder:
    """A trained Code2Wav that makes codes sound.

    Args:
        network: in evaluation mode, in fp32, on its device.
    """

    def __init__(self, network: Code2Wav) -> None:
        self.network = network

    @torch.no_grad()
    def __call__(self, codes: np.ndarray) -> np.ndarray:
        """Waveform (n,) float32 of codes (Q, M), as decoding them whole gives; of no frames, no samples."""
        device, state = self.network.embedding.weight.device, StreamingState()
        pieces = [np.zeros(0, np.float32)]
        for start in range(0, codes.shape[1], PIECE):
            piece_1QM = torch.from_numpy(codes[None, :, start : start + PIECE].astype(np.int64)).to(device)
            pieces.append(self.network(piece_1QM, state)[0].cpu().numpy())
        return np.concatenate(pieces)


def open_vocoder(path: str, recipe: Recipe) -> Vocoder:
    """The decoder of a checkpoint of network=codec or code2wav, or of a run's latest, averaged where it has averages.

    Args:
        path: `evaluation.codec`.
        recipe: recipe of the Talker; its codes must be those that the decoder knows.

    Raises:
        UserError: there is no checkpoint, or it is damaged, holds another network, or does not fit the codes.
    """
    model, tensors = read_codec(path, "evaluation.codec")
    sizes, named = model.code2wav, f"evaluation.codec={path}"
    if sizes is None:
        raise UserError(f"{named}: no decoder of speech in this checkpoint; give one of network=codec or code2wav")
    talker = required(recipe.model.talker)
    theirs, ours = (sizes.num_quantizers, sizes.codebook_size), (talker.num_code_groups, talker.codebook_size)
    if theirs != ours:
        raise UserError(
            f"{named}: has {theirs[0]} codebooks of {theirs[1]} codewords, the Talker {ours[0]} of {ours[1]}; give the "
            "codec that made the codes"
        )
    if (rate := codec_sampling_rate(model)) != codec_sampling_rate(recipe.model):
        raise UserError(
            f"{named}: makes {rate} samples a second, the recipe's model says {codec_sampling_rate(recipe.model)}; "
            "give the codec that made the codes"
        )
    network, opened = code2wav_of(model, tensors)
    if opened is not None:
        _check_hash(named, opened, recipe)
    return Vocoder(network.eval().requires_grad_(False).to(platform.device()))


def _check_hash(named: str, opened: OpenCodec, recipe: Recipe) -> None:
    """Refuse a codec other than the one that made the codes, where the recipe names that."""
    made_by = recipe.data.codec
    if made_by is not None and codec_hash(made_by) != opened.content_hash:
        raise UserError(f"{named}: another codec than data.codec={made_by}, which made the codes; give that one")
