"""Stochastic depth: a residual branch is left out at random while training (Huang et al., arXiv 1603.09382)."""

from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd


class DropPath(_DropoutNd):
    """Zeroes a branch for whole samples with probability `p` and scales the others by `1 / (1 - p)`."""

    def forward(self, x: Tensor) -> Tensor:
        """Keep or drop each sample of `(B, ...)`."""
        if not self.training or self.p == 0:
            return x
        keep = 1.0 - self.p
        kept = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(keep).div_(keep)
        return x * kept
