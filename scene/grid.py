"""Features of places, interpolated in a hash grid.

    grid = HashGrid(levels=8, size=2 ** 15, coarsest=16, finest=512)
    features = grid(x)                             # [2L,N] at x [3,N] in [0,1], differentiable in grid.table
"""
import numpy as np
import torch


class HashGrid(torch.nn.Module):
    """Trilinear features at several resolutions from one flat table (Mueller et al., eq. 1 to 4).

    A level with at most `size` corners has an entry for each; a finer level hashes its corners to `size` entries.
    Arrays are level-major with the N points contiguous, so each operation is one long vector operation. The two
    features of an entry form one complex number: one gather, one scatter.
    """
    # Entry = x + P1 y + P2 z mod size. Instant NGP combines the three by XOR. With a sum the eight corners differ by
    # eight constants, neighbours in x share a cache line, and dense levels use the same formula with other strides.
    STRIDES = (1, -1640531535, 805459861)

    def __init__(self, levels, size, coarsest, finest):
        """levels; size: entries per level, a power of two; coarsest, finest: cells per side of these levels."""
        super().__init__()
        if size & (size - 1) or levels < 1 or coarsest < 1:
            raise ValueError(f"the table size must be a power of two, got {size}")
        growth = (finest / coarsest) ** (1 / max(levels - 1, 1))
        self.cells = [round(coarsest * growth ** level) for level in range(levels)]
        self.size, self.dense = size, [(n + 1) ** 3 <= size for n in self.cells]
        entries = [(n + 1) ** 3 if dense else size for n, dense in zip(self.cells, self.dense, strict=True)]
        start = np.cumsum([0, *entries])
        self.start = start.tolist()
        self.table = torch.nn.Parameter(torch.empty(self.start[-1], 2).uniform_(-1e-4, 1e-4))
        strides = [(1, n + 1, (n + 1) ** 2) if d else self.STRIDES for n, d in zip(self.cells, self.dense, strict=True)]
        strides = torch.tensor(strides, dtype=torch.int32)  # [L,3]
        corner = torch.tensor([(i & 1, i >> 1 & 1, i >> 2) for i in range(8)], dtype=torch.int32)
        offsets = (strides[:, None] * corner).sum(-1, dtype=torch.int32)  # [L,8], x changes first
        self.register_buffer("strides", strides, persistent=False)
        self.register_buffer("offsets", offsets, persistent=False)
        self.learning = levels  # number of levels, from the coarsest, that get a gradient

    def corners(self, x, level):
        """Entries int32 [8,N] of the corners around x [3,N] in [0,1], and weights [3,2N] of the upper ones.

        Each weight occurs twice, once per feature, to multiply complex entries as plain pairs.
        """
        x = x * self.cells[level]
        low = x.int().clamp_(max=self.cells[level] - 1)  # [3,N]
        weight = (x - low)[:, :, None].expand(-1, -1, 2).reshape(3, -1)
        low = low * self.strides[level, :, None]
        entry = (low[0] + low[1] + low[2]) + self.offsets[level, :, None]
        return entry if self.dense[level] else entry.bitwise_and_(self.size - 1), weight

    def forward(self, x, known=None):
        """Features [2L,N] at x [3,N] in [0,1]: the first features of all levels, then the second ones.

        Differentiable in the table, not in x. `known`, features of an earlier call for the same x, avoids the gather.
        """
        return _Interpolate.apply(self.table, x, self, known)


class _Interpolate(torch.autograd.Function):
    """Gather and trilinear interpolation; the backward pass is one scatter per level.

    Autograd would keep eight products per level and scatter a dense [N,8,2] gradient.
    """

    @staticmethod
    def forward(ctx, table, x, grid, known):
        ctx.grid, ctx.shape = grid, table.shape
        ctx.save_for_backward(x)
        if known is not None:
            return known.clone()
        entries = torch.view_as_complex(table)
        out = table.new_empty(2, len(grid.cells), x.shape[1])
        for level in range(len(grid.cells)):
            entry, weight = grid.corners(x, level)
            v = entries[grid.start[level]:grid.start[level + 1]].index_select(0, entry.view(-1))
            v = torch.view_as_real(v).view(8, -1)  # [8,2N]
            for axis in (2, 1, 0):
                v = torch.lerp(v[:len(v) // 2], v[len(v) // 2:], weight[axis])
            out[:, level] = v.view(-1, 2).T
        return out.view(2 * len(grid.cells), x.shape[1])

    @staticmethod
    def backward(ctx, grad):
        (x,), grid = ctx.saved_tensors, ctx.grid
        grad = grad.reshape(2, len(grid.cells), -1)
        out = grad.new_zeros(ctx.shape)
        entries = torch.view_as_complex(out)
        v = grad.new_empty(8, 2 * x.shape[1])
        for level in range(grid.learning):
            entry, weight = grid.corners(x, level)  # recomputed: cheaper than storing them
            v[0].view(-1, 2).copy_(grad[:, level].T)
            for axis in range(3):  # each axis splits the gradient into an upper and a lower share
                n = 1 << axis
                torch.mul(v[:n], weight[axis], out=v[n:2 * n])
                v[:n] -= v[n:2 * n]
            entries[grid.start[level]:grid.start[level + 1]].index_add_(
                0, entry.view(-1), torch.view_as_complex(v.view(-1, 2)))
        return out, None, None, None
