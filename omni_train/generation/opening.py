"""The models that generate, from checkpoints, each whole in this process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from omni_train import platform
from omni_train.checkpoint.integrity import require_intact
from omni_train.checkpoint.sharded import load_model
from omni_train.checkpoint.store import resolve
from omni_train.data.rows.codes import is_hash
from omni_train.errors import UserError
from omni_train.frozen.codec import OpenCodec, codec_hash, open_code2wav
from omni_train.models.code2wav import Code2Wav
from omni_train.models.talker import Talker, build_chunks
from omni_train.models.thinker import Thinker
from omni_train.recipe.compose import read_recipe
from omni_train.recipe.networks import held
from omni_train.recipe.schema import ParallelConfig, Recipe, Recompute, TextEmbedding, required


def open_recipe(checkpoint: Path, file: Path | None, tokenizer: Path | None) -> Recipe:
    """Recipe of the run that wrote a checkpoint, in the layout of one process.

    Args:
        checkpoint: directory of the checkpoint.
        file: recipe to take in its place.
        tokenizer: folder to take in the place of the recipe's.

    Raises:
        UserError: there is no recipe, or it is of a network that writes and speaks nothing.
    """
    path = file or checkpoint.parent.parent / "recipe.yaml"
    if file is None and not path.exists():
        raise UserError(
            f"checkpoint={checkpoint}: no recipe.yaml of a run above it; give recipe= one, such as what "
            "`omni-train train … --cfg job` prints"
        )
    recipe = read_recipe(path)
    if recipe.network not in ("talker", "thinker"):
        raise UserError(
            f"checkpoint={checkpoint}: network={recipe.network} writes no text; give a Talker's or Thinker's"
        )
    model, data = recipe.model, recipe.data
    if recipe.network == "talker":
        talker = required(model.talker)
        model = replace(model, talker=replace(talker, pattern=talker.pattern.replace("|", "")))
    else:
        model = replace(model, talker=None)
    if tokenizer is not None:
        data = replace(data, tokenizer=str(tokenizer))
    return replace(recipe, model=model, data=data, parallel=ParallelConfig(), recompute=Recompute.none)


def open_talker(checkpoint: Path, recipe: Recipe) -> Talker:
    """The Talker of a checkpoint. Collective.

    Raises:
        UserError: the checkpoint is damaged, or of another architecture than the recipe.
    """
    require_intact(checkpoint, recipe.checkpoint.verify)
    (talker,) = build_chunks(recipe)
    load_model([talker], checkpoint, held(recipe))
    return talker.eval().requires_grad_(False)


def check_table(recipe: Recipe, talker: Talker, thinker: Thinker, path: str) -> None:
    """Refuse another Thinker than the Talker's, by the table of text that both have.

    Raises:
        UserError: the tables differ.
    """
    reads_it = required(recipe.model.talker).text_embedding is TextEmbedding.thinker
    mine, theirs = (model.embedding.word_embeddings.weight for model in (talker, thinker))
    if reads_it and not torch.equal(mine, theirs):
        raise UserError(
            f"thinker={path}: its table of text is not the one that the Talker reads; give the Thinker that it was "
            "trained above"
        )


def open_sound(codec: str | None, recipe: Recipe) -> tuple[Code2Wav, OpenCodec | None]:
    """Code2Wav that makes sound of the Talker's codes, and the codec where it is one's, on this device.

    Args:
        codec: checkpoint of network=codec or code2wav; None for the one that the recipe names.
        recipe: recipe of the Talker.

    Raises:
        UserError: there is none, or its codes are not the Talker's.
    """
    talker, trained = required(recipe.model.talker), recipe.data.codec
    if codec is None and (trained is None or is_hash(trained)):
        raise UserError(
            "codec= is missing; give the checkpoint of the codec, or Code2Wav, that the Talker's codes are of"
        )
    path = codec or str(trained)
    code2wav, encoder = open_code2wav(path)
    sizes = code2wav.config
    if (sizes.num_quantizers, sizes.codebook_size) != (talker.num_code_groups, talker.codebook_size):
        raise UserError(
            f"codec={path}: {sizes.num_quantizers} codebooks of {sizes.codebook_size}, the Talker's are "
            f"{talker.num_code_groups} of {talker.codebook_size}; give the codec whose codes it was trained on"
        )
    known = _hash_of(trained) if encoder is not None and codec is not None else None
    if encoder is not None and known not in (None, encoder.content_hash):
        raise UserError(
            f"codec={path}: is {encoder.content_hash[:12]}…, the Talker was trained on codes of {str(known)[:12]}… "
            "(data.codec); give that one"
        )
    if encoder is not None:
        encoder.codec.to(platform.device())
    return code2wav.to(platform.device()), encoder


def _hash_of(codec: str | None) -> str | None:
    """Content hash of the codec that a recipe names; None where it is not known any more."""
    try:
        return codec and codec_hash(codec)
    except UserError:  # its checkpoint is not where it was
        return None


def thinker_of(recipe: Recipe, checkpoint: Path, thinker: str | None) -> str:
    """Checkpoint of the Thinker that writes.

    Raises:
        UserError: it is a Talker's, and names none.
    """
    if recipe.network == "thinker":
        if thinker is not None:
            raise UserError(f"thinker={thinker}: checkpoint={checkpoint} is a Thinker's itself; leave one of them out")
        return str(checkpoint)
    path = thinker or recipe.talker_training.thinker
    if path is None:
        raise UserError("thinker= is missing: the Talker's recipe names none; give the Thinker's checkpoint")
    return str(resolve(path))
