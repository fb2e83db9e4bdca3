"""The job that every contestant does: a tiny 3D network, eight sites with four volumes of 16^3 each, one SGD step a round."""

import json

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

SITES, ROUNDS, LEARNING_RATE = 8, 20, 0.1


class Tiny3D(nn.Module):
    """Two 3x3x3 convolutions of 8 channels and a head for two labels: 2,010 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(1, 8, 3, padding=1), nn.InstanceNorm3d(8, affine=True), nn.ReLU(),
            nn.Conv3d(8, 8, 3, padding=1), nn.InstanceNorm3d(8, affine=True), nn.ReLU(),
            nn.Conv3d(8, 2, 1),
        )  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image)


def make_model() -> Tiny3D:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Tiny3D()
    assert sum(parameter.numel() for parameter in model.parameters()) == 2010
    return model


def make_volumes(site: int) -> tuple[np.ndarray, np.ndarray]:
    """Images `(4, 1, 16, 16, 16)` and labels `(4, 16, 16, 16)`: a bright ball in noise."""
    generator = np.random.default_rng(site)
    grid = np.stack(np.meshgrid(*[np.arange(16)] * 3, indexing="ij"))
    centres = generator.uniform(5, 11, (4, 3, 1, 1, 1))
    label = (((grid - centres) ** 2).sum(1) < generator.uniform(9, 25, (4, 1, 1, 1))).astype(np.int64)
    image = label + generator.standard_normal(label.shape)
    return image[:, None].astype(np.float32), label


def loss_of(model: nn.Module, image: Tensor, label: Tensor) -> Tensor:
    return functional.cross_entropy(model(image), label)


def train_step(model: nn.Module, image: Tensor, label: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    optimizer.zero_grad(set_to_none=True)
    loss_of(model, image, label).backward()
    optimizer.step()


def report(model: nn.Module) -> None:
    """Print what came out, so that the contestants can be compared."""
    model.eval()
    with torch.no_grad():
        losses = [float(loss_of(model, *map(torch.from_numpy, make_volumes(site)))) for site in range(SITES)]
        norm = float(torch.cat([parameter.reshape(-1) for parameter in model.parameters()]).norm())
    print(json.dumps({"loss": sum(losses) / SITES, "norm": norm}))
