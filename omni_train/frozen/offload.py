"""Frozen weights that wait in the host's memory while they are not used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from omni_train import platform


class FrozenModel(Protocol):
    """A model that a network learns with and that does not learn itself."""

    @property
    def modules(self) -> list[torch.nn.Module]:
        """Its parts on this rank."""
        ...


class Resting:
    """Modules whose tensors lie in the host's memory, and on the device only where they are asked for.

    Copies go both ways on the stream that computes, so none is read before it is there: what is saved is memory, and a
    step waits for the transfer.
    """

    def __init__(self) -> None:
        self._host: dict[torch.nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def lay_down(self, modules: Iterable[torch.nn.Module]) -> None:
        """Move frozen modules into the host's memory, pinned where there is a GPU."""
        for module in modules:
            kept = []
            for tensor in (*module.parameters(), *module.buffers()):
                host = tensor.data.detach().cpu()
                host = host.pin_memory() if platform.has_cuda() else host.clone()
                kept.append((tensor, host))
                tensor.data = host
            self._host[module] = kept

    @contextmanager
    def awake(self, modules: Iterable[torch.nn.Module]) -> Iterator[None]:
        """Have those of `modules` that lie in the host's memory on this rank's device meanwhile."""
        moved = [pair for module in modules for pair in self._host.get(module, ())]
        try:
            for tensor, host in moved:
                tensor.data = torch.empty_like(host, device=platform.device()).copy_(host, non_blocking=True)
            yield
        finally:
            for tensor, host in moved:
                tensor.data = host
