"""``omni-train data states``: the Thinker's states of a Talker's contexts, written once, in any layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from omni_train import platform
from omni_train.data.rows.batch import SpeechRow
from omni_train.data.rows.kinds import check_rows
from omni_train.data.rows.packing import aligned
from omni_train.data.rows.stored_states import settings_of
from omni_train.data.samples.tokenizer import Tokenizer, copy_tokenizer
from omni_train.data_pipelines.copying import shards_of
from omni_train.data_pipelines.making import Making
from omni_train.data_pipelines.states import Folder, StateWriter, Work
from omni_train.errors import UserError
from omni_train.frozen.thinker_hash import checkpoint_digest, thinker_hash
from omni_train.networks.base import spec_of
from omni_train.platform import failures
from omni_train.platform.agreement import on_first_rank, wait_on
from omni_train.platform.signals import Watchdog, alive
from omni_train.recipe.compose import load_recipe
from omni_train.recipe.schema import Recipe, States, required
from omni_train.recipe.validate import validate
from omni_train.training.model_group import ModelGroup
from omni_train.training.run_lock import holding


def write_states(out: Path, config_dir: Path | None = None, **words: str) -> None:
    """Copy the shards of a Talker's sources, with the Thinker's states of every sample's context beside it.

    The other words are those of `omni-train train` with which the Talker will be trained: its network, data, Thinker
    and layout. Every source becomes a folder of its name in `out`, and its samples get ``key.states.npy``, (states,
    width), float32 where the recipe is of fp32, else float16. They are trained on with `data.path=OUT
    data.speech.states=stored`, without a Thinker; states of another Thinker or of other settings are refused.

    On several processes (`omni-train launch N data states …`) the data ranks share the shards. Stopped at any moment,
    the same command goes on where it was. Samples that cannot be read are kept without states.

    Args:
        out: folder of the new folders, with the tokenizer beside them.
        config_dir: folder of recipes of one's own, as with `omni-train train --config-dir`.
        words: of the recipe, `key=value`.

    Raises:
        UserError: the recipe cannot work, or is no Talker's; or `out` holds something else.
    """
    states_of(load_recipe([f"{key}={value}" for key, value in words.items()], config_dir), out)


def states_of(recipe: Recipe, out: Path) -> None:
    """Write the states of a recipe's sources on this rank, with whatever ranks the launcher started; see
    :func:`write_states`.
    """
    if recipe.network != "talker":
        raise UserError(f"network={recipe.network}: only network=talker reads states of a Thinker; name its stage=")
    live = replace(recipe.data.speech, states=States.live)
    recipe = replace(recipe, data=replace(recipe.data, speech=live))
    validate(recipe, platform.world_size())
    check_rows(recipe)
    with ExitStack() as locks:
        with _joined(recipe):
            platform.parallel.initialize(recipe.parallel, recipe.seed)
            folders = make(recipe, out, locks)
        if platform.rank() == 0:  # the others have left: indexing takes longer than a collective may
            finish(recipe, out, folders)


def make(recipe: Recipe, out: Path, locks: ExitStack) -> list[Folder]:
    """Make the shards that are left; returns the folders to :func:`finish`. Process groups must exist; collective.

    Args:
        recipe: of live states.
        out: folder of the new folders.
        locks: gets the locks of these folders.
    """
    folders = on_first_rank(lambda: _claimed(recipe, out))
    locks.enter_context(holding(*(one.making.notes for one in folders), remedy="name another folder"))
    _run(recipe, folders)
    return folders


def finish(recipe: Recipe, out: Path, folders: list[Folder]) -> None:
    """Complete the folders whose shards are made, on one rank."""
    copy_tokenizer(Path(recipe.data.tokenizer), out / "tokenizer")
    for folder in folders:
        folder.finish()


@contextmanager
def _joined(recipe: Recipe) -> Iterator[None]:
    """Context in which the ranks work together, and none waits for one that has failed."""
    watchdog = Watchdog(recipe.safety.hang_seconds)
    platform.init_distributed(timeout_seconds=recipe.safety.hang_seconds)
    failures.listen()
    try:
        with failures.told():
            yield
    finally:
        platform.parallel.destroy()
        platform.leave_distributed()
        watchdog.stop()


def _claimed(recipe: Recipe, out: Path) -> list[Folder]:
    """Folders that are written, with a note in each of how."""
    sources = {Path(source.path).name: Path(source.path) for source in recipe.data.sources}
    for source in recipe.data.sources:
        if "://" in source.path or not Path(source.path).is_dir():
            raise UserError(f"data.sources: no folder {source.path}; states are written of shards in a local folder")
        if sources[Path(source.path).name] != Path(source.path):
            raise UserError(
                f"data.sources: {source.path} and {sources[Path(source.path).name]} would both become "
                f"{out / Path(source.path).name}; write their states one after the other, or rename one"
            )
        if (out / Path(source.path).name).resolve() == Path(source.path).resolve():
            raise UserError(f"out={out}: holds {source.path} itself, whose shards stay as they are; name another")
    Tokenizer(recipe.data.tokenizer)
    settings = settings_of(recipe)

    def reading() -> None:
        alive()
        wait_on()

    checkpoint = str(recipe.talker_training.thinker)
    thinker = thinker_hash(checkpoint, required(recipe.model.talker).accept_hidden_layer, reading)
    digest = checkpoint_digest(checkpoint)
    folders = [
        Folder(path, Making(out / name, "stored"), thinker, digest, settings, shards_of(path))
        for name, path in sources.items()
    ]
    for folder in folders:
        folder.claim()
    return folders


def _run(recipe: Recipe, folders: list[Folder]) -> None:
    """Run the Thinker over the shards that are left, each data rank over its share. Collective.

    The data ranks go in step, one without rows with blank ones, as they may share experts.
    """
    from omni_train.training.engines.microbatches import Microbatches

    left = on_first_rank(lambda: [(folder, shard) for folder in folders for shard in folder.making.left(folder.shards)])
    world, rank, group = platform.parallel.data_world_size(), platform.parallel.data_rank(), ModelGroup()
    writer = StateWriter(recipe, recipe.schedule.global_batch // world)
    thinker = spec_of(recipe.network).frozen(recipe)["thinker"]
    microbatches = Microbatches(recipe.data.row_tokens)
    work, found = writer.write(left[rank::world]), None
    while True:
        rows = group.share_rows(partial(_next, work, found))
        count = _most(len(rows))
        if not count:
            break
        if recipe.parallel.virtual_pipeline > 1:  # whose schedule takes so many at a time
            count = aligned(count, recipe.parallel.pipeline)
        states = thinker.states(microbatches, [*rows, *(writer.row() for _ in range(count - len(rows)))])
        found = [one.float().cpu().numpy() for one in states[: len(rows)]]
        alive()


def _next(work: Work, found: list[np.ndarray] | None) -> list[SpeechRow]:
    """The next rows, after the states of those before were taken; none at the end."""
    try:
        return work.send(found)
    except StopIteration:
        return []


def _most(count: int) -> int:
    """The largest count of a rank. Collective."""
    counts = torch.tensor(count, device=platform.device())
    torch.distributed.all_reduce(counts, op=torch.distributed.ReduceOp.MAX)
    return int(counts)
