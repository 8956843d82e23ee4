"""Runs of a tiny Thinker, Talkers above it and their codec, of random weights, for ``omni-train generate``."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

from omni_train.data_pipelines.rehearsal.tokenizer import train
from omni_train.recipe.compose import write_recipe
from omni_train.recipe.networks import held
from omni_train.recipe.schema import CheckpointConfig, ScheduleKind, SpeechScheduleConfig, TalkerStyle
from tests.support import codec
from tests.support.speech import randomized
from tests.support.talker import CODEBOOKS, CODEWORDS, small_talker
from tests.support.tiny_runs import WORDS

VOCAB = 320
TEXT = "kalan moper risto, tevin zuqua kadel!"
SIZES = dict(num_quantizers=CODEBOOKS, codebook_size=CODEWORDS)


def recipe_of(folder: Path, style: str = "interleaved"):
    """Recipe of a Talker whose Thinker, codec and tokenizer are in a folder."""
    recipe = small_talker(vocab_size=VOCAB, style=TalkerStyle(style))
    recipe.model.codec = replace(codec.CODEC, **SIZES)
    recipe.model.code2wav = replace(codec.CODE2WAV, **SIZES)
    recipe.data.tokenizer = str(folder / "tokenizer")
    recipe.data.row_tokens, recipe.data.media.image_min_pixels = 400, 1024
    recipe.data.codec = str(folder / "codec")
    recipe.data.speech.schedules = [SpeechScheduleConfig(ScheduleKind.turns, text=2, frames=3)]
    recipe.talker_training.thinker = str(folder / "thinker")
    return recipe


def write_runs(rank, world_size, folder: Path) -> None:
    """Write ``tokenizer``, and runs ``thinker``, ``interleaved``, ``dual_track`` and ``codec`` into a folder.

    A ``stranger`` is another Thinker, ``other`` another codec, ``wider`` one of more codebooks.
    """
    import torch

    from omni_train import platform
    from omni_train.checkpoint.sharded import CheckpointStore
    from omni_train.models import talker, thinker
    from omni_train.models.codec import SpeechCodec

    train([" ".join(WORDS[n:] + WORDS[:n]) for n in range(20)], folder / "tokenizer", VOCAB)
    recipe = recipe_of(folder)
    platform.parallel.initialize(recipe.parallel, 3)

    def save(recipe, chunks, name):
        store = CheckpointStore(folder / name / "checkpoints", CheckpointConfig(asynchronous=False), held(recipe))
        store.save(1, chunks, None, {}, None)
        store.close()
        write_recipe(recipe, folder / name / "recipe.yaml")

    below = replace(recipe, network="thinker", data=replace(recipe.data, rows="chats"))
    for name in ("stranger", "thinker"):
        (model,) = thinker.build_chunks(below)
        save(below, [model], name)
    table = model.embedding.word_embeddings.weight
    for style in ("interleaved", "dual_track"):
        recipe = recipe_of(folder, style)
        (model,) = talker.build_chunks(recipe)
        with torch.no_grad():
            model.embedding.word_embeddings.weight.copy_(table)
            for parameter in (model.codec_head.weight, model.code_predictor.heads):
                parameter.mul_(30)  # so that no two codes are nearly as likely
        save(recipe, [model], style)
    platform.parallel.destroy()
    for name, seed, codebooks in (("codec", 5, CODEBOOKS), ("other", 6, CODEBOOKS), ("wider", 5, 6)):
        for part in (recipe.model.codec, recipe.model.code2wav):
            part.num_quantizers = codebooks
        network = SpeechCodec(recipe.model.codec, recipe.model.code2wav)  # whose encoder tells sounds apart
        for part in (network.quantizer, network.bridge, network.decoder):
            randomized(part, seed)
        with torch.no_grad():
            for part in (network.quantizer.semantic, network.quantizer.acoustic):
                part.input.weight.mul_(10)
        write_codec(folder / name, recipe, network)


def write_codec(run: Path, recipe, network) -> None:
    """Write a checkpoint of a codec, or of a Code2Wav."""
    from omni_train.checkpoint.integrity import write_digests
    from omni_train.checkpoint.plain import write_networks
    from omni_train.checkpoint.state_files import write_state

    checkpoint = run / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    write_networks(checkpoint, {"generator": network.state_dict()})
    parts = {name: asdict(getattr(recipe.model, name)) for name in ("codec", "code2wav")}
    write_state(checkpoint / "model.pt", {"name": "codec", "vocab_size": VOCAB, **parts})
    (checkpoint / "metadata.json").write_text(json.dumps({}))
    write_digests(checkpoint)


def run_generate(rank, world_size, *words) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``omni-train generate``."""
    import contextlib
    import io

    from omni_train.cli import main

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(["generate", *words])
    return code, out.getvalue(), err.getvalue()
