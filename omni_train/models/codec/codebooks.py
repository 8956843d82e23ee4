"""Codebooks learned by moving averages, with k-means initialisation and revival of dead codewords.

A codeword is the ratio of two moving averages (van den Oord et al. 2017, appendix A.1): of the sum of the inputs that
were nearest to it, and of their number. The buffers are Mimi's.

Axis letters: B batch, T frames, D dimension, N codebooks, K codewords, M samples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from omni_train.errors import UserError

KMEANS_ITERATIONS = 10
SAMPLES = {"start": 16, "revival": 1}
"""About the most inputs of the global batch, for each codeword, that k-means and revival sample."""
_SMALLEST_USAGE = 1e-5


class Usage(NamedTuple):
    """Use of each codebook by a step's global batch."""

    used: Tensor
    """(N,) fraction of the codewords that were used at all."""
    perplexity: Tensor
    """(N,) exp of the entropy of the codes in nats: the number of codewords in use, were all used alike."""
    revived: Tensor
    """(N,) number of dead codewords that were revived."""


class _Derived(NamedTuple):
    """Tensors derived from the buffers, computed once after each change."""

    codewords: Tensor
    """(N, K, D)."""
    tables: Tensor
    """(N, K, D + 2), for :func:`_nearest`."""
    ready: bool


def usage_of(counts: Tensor) -> tuple[Tensor, Tensor]:
    """`used` and `perplexity` of :class:`Usage`, (N,) each, from counts of each codeword, (N, K)."""
    share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return (counts > 0).float().mean(-1), torch.special.entr(share).sum(-1).exp()


class Codebooks(torch.nn.Module):
    """N residual codebooks of K codewords each.

    The buffers stay in fp32 when the network is converted to bf16, in which a moving average would stand still.

    Args:
        count: N.
        size: K.
        dim: D.
    """

    def __init__(self, count: int, size: int, dim: int) -> None:
        super().__init__()
        self.count, self.size, self.dim = count, size, dim
        self.register_buffer("initialized", torch.zeros(count))
        self.register_buffer("cluster_usage", torch.ones(count, size))
        self.register_buffer("embed_sum", torch.randn(count, size, dim))
        self._derived: _Derived | None = None
        self.forget()

    @property
    def codewords(self) -> Tensor:
        """Codewords of all codebooks, (N, K, D) fp32."""
        return self._derive().codewords

    @property
    def ready(self) -> bool:
        """Whether all codebooks have been initialised, by k-means or from a checkpoint."""
        return self._derive().ready

    def lookup(self, codes: Tensor) -> Tensor:
        """Sum of the codewords of codes, (B, n, T) of the first n codebooks -> (B, T, D)."""
        offsets = torch.arange(codes.shape[1], device=codes.device) * self.size
        return F.embedding(codes + offsets[:, None], self.codewords.flatten(0, 1)).sum(1)

    @torch.no_grad()
    def quantize(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Nearest codewords, each codebook quantising the residual of those before it.

        Args:
            x: (M, D) fp32.
            count: n, the number of codebooks to use, from the first.

        Returns:
            (n, M) int64 codes, and (n, M, D) the sums of the first 1 to n codewords.
        """
        residual, codes, sums = x, [], []
        for codebook, table in zip(self.codewords[:count], self._derive().tables, strict=False):
            code = _nearest(residual, table)
            codeword = F.embedding(code, codebook)
            residual = residual - codeword
            codes.append(code)
            sums.append(sums[-1] + codeword if sums else codeword)
        return torch.stack(codes), torch.stack(sums)

    def sample(self, x: Tensor, priority_BT: Tensor) -> None:
        """Keep inputs of the first codebook, from which :meth:`update` samples.

        Args:
            x: (B, T, D).
            priority_BT: in [0, 1); frames with the lowest priorities of the global batch are its samples.
        """
        self._samples.append((priority_BT.flatten(), x.float().flatten(0, 1)))

    @torch.no_grad()
    def accumulate(self, x: Tensor, sums: Tensor, codes: Tensor, count_B: Tensor) -> None:
        """Add a row to the counts and to the sums of the inputs of each codeword.

        Args:
            x: (B, T, D) input of the first codebook.
            sums: (N, B, T, D) from :meth:`quantize`.
            codes: (N, B, T) from :meth:`quantize`.
            count_B: number of codebooks that each sequence uses.
        """
        if self._counts is None:
            self._counts, self._sums = torch.zeros_like(self.cluster_usage), torch.zeros_like(self.embed_sum)
        residual = x - torch.cat([torch.zeros_like(sums[:1]), sums[:-1]])
        numbers = torch.arange(self.count, device=x.device)
        rows = (codes + numbers[:, None, None] * self.size).flatten()
        used = (numbers[:, None] < count_B)[:, :, None].expand_as(codes).flatten().float()
        self._counts.view(-1).index_add_(0, rows, used)
        self._sums.view(-1, self.dim).index_add_(0, rows, residual.flatten(0, 2) * used[:, None])

    @torch.no_grad()
    def update(self, generator: torch.Generator, decay: float, dead_usage: float, frozen: bool = False) -> Usage:
        """Update the codebooks, as :meth:`omni_train.models.codec.quantizer.SplitQuantizer.update` says. Collective.

        Args:
            generator: on the CPU, seeded alike on all ranks.
            decay: of the moving averages.
            dead_usage: codewords used less than this fraction of their codebook's mean are dead.
            frozen: whether only to measure the use.

        Raises:
            UserError: frozen codebooks that have never been initialised.
        """
        counts = torch.zeros_like(self.cluster_usage) if self._counts is None else self._counts
        sums = torch.zeros_like(self.embed_sum) if self._sums is None else self._sums
        revived = counts.new_zeros(self.count)
        if frozen and not self.ready:
            raise UserError(
                "trainable: must include generator.quantizer until it has codebooks; train it too, or give init_from a "
                "trained codec"
            )
        if frozen:
            _all_reduce(counts)
        elif self.ready:
            _all_reduce(counts)
            _all_reduce(sums)
            self.cluster_usage.lerp_(counts, 1 - decay)
            self.embed_sum.lerp_(sums, 1 - decay)
            self._derived = None
            mean = self.cluster_usage.mean(-1, keepdim=True)
            dead = self.cluster_usage < dead_usage * mean
            if bool(dead.any()):
                revived = self._revive(dead, mean, self._gather("revival")[0], generator)
        else:
            self._start(*self._gather("start"))
        self._derived = None
        self.forget()
        return Usage(*usage_of(counts), revived)

    def forget(self) -> None:
        """Discard samples and counts."""
        self._samples: list[tuple[Tensor, Tensor]] = []
        self._counts: Tensor | None = None
        self._sums: Tensor | None = None

    def _start(self, samples: Tensor, total: int) -> None:
        """Initialise the codebooks by k-means, one after the other; the first samples, in random order, are centres."""
        if not len(samples):
            return
        residual = samples
        for number in range(self.count):
            centres = residual[torch.arange(self.size, device=residual.device) % len(residual)]
            for _ in range(KMEANS_ITERATIONS):
                nearest = torch.cdist(residual, centres).argmin(-1)
                counts = torch.bincount(nearest, minlength=self.size).to(centres)
                sums = torch.zeros_like(centres).index_add_(0, nearest, residual)
                centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
            # Counts of a whole step, as in the moving average; a centre without inputs is soon dead.
            usage = (counts * (total / len(residual))).clamp(min=1e-3)
            self.cluster_usage[number] = usage
            self.embed_sum[number] = centres * usage[:, None]
            residual = residual - centres[torch.cdist(residual, centres).argmin(-1)]
        self.initialized.fill_(1)
        for buffer in (self.cluster_usage, self.embed_sum):
            _broadcast(buffer)  # on a GPU sums differ in the last bit

    def _revive(self, dead: Tensor, mean: Tensor, samples: Tensor, generator: torch.Generator) -> Tensor:
        """Move dead codewords (N, K) each to an input of its codebook, with the mean usage; how many of each, (N,)."""
        revived = dead.new_zeros(self.count, dtype=torch.float32)
        residual = samples
        for number, codebook in enumerate(self.codewords):
            chosen = torch.randperm(len(samples), generator=generator).to(samples.device)
            rows = dead[number].nonzero().squeeze(1)[: len(chosen)]
            self.cluster_usage[number, rows] = mean[number]
            self.embed_sum[number, rows] = residual[chosen[: len(rows)]] * mean[number]
            revived[number] = len(rows)
            if len(residual):
                residual = residual - codebook[torch.cdist(residual, codebook).argmin(-1)]
        return revived

    def _gather(self, purpose: str) -> tuple[Tensor, int]:
        """Samples of the global batch's inputs, the same in every layout.

        Returns:
            (M, D) in random order, and the number of inputs they were drawn from.
        """
        empty = self.embed_sum.new_zeros(0)
        priority = torch.cat([empty, *(priority for priority, _ in self._samples)])
        x = torch.cat([empty.view(0, self.dim), *(x for _, x in self._samples)])
        total = torch.tensor(float(len(x)), dtype=torch.float64, device=x.device)
        _all_reduce(total)
        wanted = SAMPLES[purpose] * self.size
        kept = priority < wanted / max(float(total), 1.0)
        table = _all_gather(torch.cat([priority[:, None], x], dim=1)[kept])
        return table[table[:, 0].argsort(stable=True), 1:], int(total)

    def _derive(self) -> _Derived:
        if self._derived is None:
            codewords = self.embed_sum / self.cluster_usage.clamp(min=_SMALLEST_USAGE)[..., None]
            norms = codewords.square().sum(-1, keepdim=True)
            tables = torch.cat([codewords, torch.ones_like(norms), norms], dim=-1)
            self._derived = _Derived(codewords, tables, bool(self.initialized.all()))
        return self._derived

    def _apply(self, fn, recurse: bool = True):
        self._derived = None

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._derived = None


def _nearest(x: Tensor, table: Tensor) -> Tensor:
    """Indices (M,) of the codewords nearest to x (M, D), by distances |x|² − 2·x·c + |c|² as one matrix product.

    It is what ``torch.cdist``, and so transformers, computes to the last bit, which matters as a nearly equal distance
    decides all codes after it; but the codewords' factor, (c, 1, |c|²), is kept between calls.

    Args:
        table: (K, D + 2) that factor.
    """
    norms = x.square().sum(-1, keepdim=True)
    left = torch.cat([-2 * x, norms, torch.ones_like(norms)], dim=-1)
    return (left[None] @ table.mT[None])[0].clamp_min_(0).sqrt_().argmin(-1)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _all_reduce(tensor: Tensor) -> None:
    if _world_size() > 1:
        dist.all_reduce(tensor)


def _broadcast(tensor: Tensor) -> None:
    if _world_size() > 1:
        dist.broadcast(tensor, 0)


def _all_gather(table: Tensor) -> Tensor:
    """Rows of all ranks concatenated; ranks may have different numbers of them."""
    if _world_size() == 1:
        return table
    lengths = [torch.zeros(1, dtype=torch.long, device=table.device) for _ in range(_world_size())]
    dist.all_gather(lengths, torch.tensor([len(table)], device=table.device))
    longest = max(int(length) for length in lengths)
    tables = [table.new_empty(longest, table.shape[1]) for _ in lengths]
    dist.all_gather(tables, F.pad(table, (0, 0, 0, longest - len(table))).contiguous())
    return torch.cat([table[: int(length)] for table, length in zip(tables, lengths, strict=True)])
