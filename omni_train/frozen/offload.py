"""Offloading of frozen weights to the host's memory while they are not used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from omni_train import platform


class FrozenModel(Protocol):
    """A model that a network is trained with and that is not trained itself."""

    @property
    def modules(self) -> list[torch.nn.Module]:
        """Modules of the model on this rank."""
        ...


class Offload:
    """Frozen modules whose tensors are in the host's memory, and on the device only while they are used.

    Copies are made on the stream that computes, so none is read before it is complete: memory is saved, and a step
    waits for the transfer.
    """

    def __init__(self) -> None:
        self._host: dict[torch.nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def to_host(self, modules: Iterable[torch.nn.Module]) -> None:
        """Move frozen modules to the host's memory, pinned where there is a GPU."""
        for module in modules:
            kept = []
            for tensor in (*module.parameters(), *module.buffers()):
                host = tensor.data.detach().cpu()
                host = host.pin_memory() if platform.has_cuda() else host.clone()
                kept.append((tensor, host))
                tensor.data = host
            self._host[module] = kept

    @contextmanager
    def on_device(self, modules: Iterable[torch.nn.Module]) -> Iterator[None]:
        """Context in which those of `modules` that were moved to the host are on this rank's device."""
        moved = [pair for module in modules for pair in self._host.get(module, ())]
        try:
            for tensor, host in moved:
                tensor.data = torch.empty_like(host, device=platform.device()).copy_(host, non_blocking=True)
            yield
        finally:
            for tensor, host in moved:
                tensor.data = host
