"""Writing of a rank's part of Megatron's sharded checkpoint: staged on the host, then written by a thread.

Megatron 0.19.2 writes in a process that it forks from this one, whose threads (CUDA, gloo, NCCL) do not survive a fork,
and gets the outcome through a manager process. Here it plans the files, as ever, and a thread of this process writes
them. :class:`Write` uses no process group; what the ranks have to say to each other is for the main thread.
"""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageWriterTransforms, _write_item
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from omni_train import platform
from omni_train.checkpoint.integrity import Digests, HashedFile


@dataclass
class Plan:
    """Plan of a checkpoint: the buckets that this rank writes, and on the first rank the metadata of the whole."""

    buckets: list  # a file each: its path, its name in the metadata, and its items with their objects and tensors
    metadata: Metadata | None
    writer: filesystem_async.FileSystemWriterAsync
    finalize_fns: list = field(default_factory=list)  # to which Megatron adds how it would end the write


class _PlanOnly(TorchDistSaveShardedStrategy):
    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: tuple, async_strategy: str) -> Plan:
        return Plan(writer.write_buckets, save_state_dict_ret[1], writer)


def plan(state: dict, folder: Path, check: bool) -> Plan:
    """Plan which rank writes which part of a sharded state. Collective; writes nothing.

    Args:
        state: sharded state of this rank.
        folder: folder to write to.
        check: whether to check that every part of every tensor is there once.
    """
    filesystem_async._results_queue = queue.Queue()  # else Megatron starts a process for one
    return dist_checkpointing.save(
        state,
        str(folder),
        sharded_strategy=_PlanOnly(),
        async_sharded_save=True,
        async_strategy="mcore",
        validate_access_integrity=check,
    )


def staged(buckets: list) -> list:
    """Copies of the buckets with their tensors on the host, which later steps do not change."""
    copies = [
        (path, name, [*objects, *((item, _staged(item, tensor)) for item, tensor in tensors)])
        for path, name, (objects, tensors) in buckets
    ]
    torch.cuda.synchronize()  # the copies do not block
    return copies


def _staged(item: WriteItem, tensor: torch.Tensor) -> torch.Tensor:
    # Optimizer states that Megatron has gathered on a host beside a GPU are copies already, and the largest part.
    if platform.has_cuda() and tensor.is_cpu and item.index.fqn.startswith("optimizer."):
        return tensor
    return tensor.to("cpu", non_blocking=True, copy=True)


def seal(plan: Plan, folder: Path, results: list[list[WriteResult]]) -> None:
    """Write the metadata of a checkpoint, by which Megatron knows it to be whole; on the first rank.

    Args:
        plan: plan of the checkpoint.
        folder: folder of the checkpoint.
        results: what each rank has written.

    Raises:
        OSError: a file cannot be written.
    """
    plan.writer.finish(plan.metadata, results)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


class Write(threading.Thread):
    """Thread that writes a rank's files; afterwards there is an `error`, or `results` and `digests`.

    Args:
        buckets: staged buckets, from :func:`staged`.
    """

    def __init__(self, buckets: list) -> None:
        super().__init__(name="checkpoint-writer", daemon=True)
        self._buckets = buckets
        self._cancelled = threading.Event()
        self.error: BaseException | None = None
        self.results: list[WriteResult] = []
        self.digests: Digests = {}

    def run(self) -> None:
        try:
            for path, name, items in self._buckets:
                with HashedFile(Path(path), self._cancelled) as file:
                    stream: Any = file  # torch asks for a whole IOBase, and calls `write`, `tell` and `flush`
                    for item, data in items:
                        self.results.append(
                            _write_item(
                                _StorageWriterTransforms(), stream, data, item, name, SerializationFormat.TORCH_SAVE
                            )
                        )
                self.digests[name] = file.digest
        except BaseException as error:
            self.error = error
        finally:
            self._buckets = []  # the host's memory is needed again

    def cancel(self) -> None:
        """Stop writing soon, and wait for the end of the thread."""
        self._cancelled.set()
        self.join()
