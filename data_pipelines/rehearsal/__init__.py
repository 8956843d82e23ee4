"""The rehearsal: a small data set made on the spot, so that the whole pipeline runs where nothing was fetched."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from data_pipelines.rehearsal import text, tokenizer
from data_pipelines.shards import index_shards, write_shards
from omni_train.data.tokenizer import CONTROL_TOKENS
from omni_train.errors import UserError

SHARDS = {"train": 8, "val": 1}  # of each kind; a ninth of the samples is held out


def build(out: Path | str, vocab_size: int = 4096) -> bool:
    """Make the data set in ``out``: ``tokenizer/``, ``text/`` (documents) and ``chat/``, in train and val shards.

    The same Python gives the same bytes. ``out`` appears only when it is complete; False when it was there already.
    Raises UserError when ``out`` is something else, or ``vocab_size`` (control tokens included) leaves no room for
    bytes.
    """
    out = Path(out)
    parts = ("tokenizer/tokenizer.json", "text/.nv-meta/dataset.yaml", "chat/.nv-meta/dataset.yaml")
    if all((out / part).is_file() for part in parts):
        print(f"{out} already holds the rehearsal data set")
        return False
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out} exists and is not a rehearsal data set; name another folder, or remove it")
    if vocab_size < 256 + len(CONTROL_TOKENS):
        raise UserError(
            f"vocab_size={vocab_size} must be at least {256 + len(CONTROL_TOKENS)}: bytes and control tokens"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        documents, chats = text.read()
        documents = text.usable(documents)
        answers = (message["content"] for chat in chats for message in chat["messages"] if message["role"] != "system")
        tokenizer.train((*(document["text"] for document in documents), *answers), building / "tokenizer", vocab_size)
        for kind, samples in (("text", documents), ("chat", chats)):
            named = [(f"{kind}-{number:06d}", sample) for number, sample in enumerate(samples)]
            held_out = len(named) // sum(SHARDS.values())
            write_shards(building / kind, "train", named[held_out:], SHARDS["train"])
            write_shards(building / kind, "val", named[:held_out], SHARDS["val"])
            index_shards(building / kind)
        building.chmod(0o755)
        building.replace(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    print(f"{out}: {len(documents):,} documents, {len(chats):,} chats, a tokenizer of {vocab_size:,} tokens")
    return True
