"""RWKV-UNet (arXiv 2501.08458) once more, as a plain function of a released state dict: slow, literal, without modules.

It shares no code with the package and reads everything off the released names. There is no stochastic depth.
"""

import torch
import torch.nn.functional as F


def forward(state, image, training=False):
    """Logits `(B, K, H, W)` of an image `(B, 1 or the stem's channels, H, W)`, H and W multiples of 16."""
    net = Book(state, training)
    if image.shape[1] == 1:
        image = image.repeat(1, net.stem_channels, 1, 1)
    e1 = net.stage(1, net.stem(image))
    e2 = net.stage(2, e1)
    e3 = net.stage(3, e2)
    bottom = net.stage(4, e3)
    s3, s2, s1 = net.cross_channel_mix([e3, e2, e1])
    d1 = net.up("decoder1", bottom)
    d2 = net.up("decoder2", torch.cat([d1, s3], 1))
    d3 = net.up("decoder3", torch.cat([d2, s2], 1))
    d4 = net.up("decoder4", torch.cat([d3, s1], 1))
    return net.conv("final_conv", d4)


def q_shift(x):
    """Four quarters of the channels of a map `(B, C, H, W)` take their left, right, upper and lower neighbour; 0 outside."""
    g = x.shape[1] // 4
    shifted = torch.zeros_like(x)
    shifted[:, 0 * g : 1 * g, :, 1:] = x[:, 0 * g : 1 * g, :, :-1]
    shifted[:, 1 * g : 2 * g, :, :-1] = x[:, 1 * g : 2 * g, :, 1:]
    shifted[:, 2 * g : 3 * g, 1:, :] = x[:, 2 * g : 3 * g, :-1, :]
    shifted[:, 3 * g : 4 * g, :-1, :] = x[:, 3 * g : 4 * g, 1:, :]
    shifted[:, 4 * g :] = x[:, 4 * g :]
    return shifted


def bi_wkv(w, u, k, v):
    """Weighted mean of all values for each token, `(B, T, C)`, by a table of `T x T` weights per channel."""
    tokens = torch.arange(k.shape[1])
    distance = (tokens[:, None] - tokens[None, :]).abs()[None, :, :, None]
    others = torch.exp(k[:, None, :, :] - w * (distance - 1))
    itself = torch.exp(k[:, None, :, :] + u)
    weights = torch.where(distance == 0, itself, others)
    return (weights * v[:, None, :, :]).sum(2) / weights.sum(2)


def to_tokens(x):
    """`(B, C, H, W)` to `(B, T, C)`, row after row."""
    return x.flatten(2).transpose(1, 2)


def to_map(tokens, like):
    """`(B, T, C)` back to the map's `(B, C, H, W)`."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *like.shape[2:])


class Book:
    """The equations, each a method that takes the released name of its block."""

    def __init__(self, state, training):
        self.state = state
        self.training = training
        self.stem_channels = state["encoder.stage0.0.conv.conv.weight"].shape[1]

    def conv(self, name, x, stride=1):
        weight, bias = self.state[f"{name}.weight"], self.state.get(f"{name}.bias")
        kernel, groups = weight.shape[-1], x.shape[1] // weight.shape[1]
        padding = -((stride - kernel) // 2)  # ceil((k - s) / 2)
        return F.conv2d(x, weight, bias, stride=stride, padding=padding, groups=groups)

    def linear(self, name, tokens):
        return tokens @ self.state[f"{name}.weight"].T

    def batch_norm(self, name, x):
        mean, var = (None, None) if self.training else (self.of(name, "running_mean"), self.of(name, "running_var"))
        return F.batch_norm(x, mean, var, self.of(name, "weight"), self.of(name, "bias"), self.training, eps=1e-6)

    def layer_norm(self, name, tokens, eps=1e-5):
        return F.layer_norm(tokens, tokens.shape[-1:], self.of(name, "weight"), self.of(name, "bias"), eps)

    def of(self, name, tensor):
        return self.state[f"{name}.{tensor}"]

    def stem(self, image):
        p = "encoder.stage0.0"
        y = F.relu(self.batch_norm(f"{p}.conv.norm", self.conv(f"{p}.conv.conv", image)))
        z = F.silu(self.batch_norm(f"{p}.conv_local.norm", self.conv(f"{p}.conv_local.conv", y)))
        squeezed = F.silu(self.conv(f"{p}.se.conv_reduce", z.mean((2, 3), keepdim=True)))
        z = z * torch.sigmoid(self.conv(f"{p}.se.conv_expand", squeezed))
        return self.conv(f"{p}.proj.conv", z)

    def stage(self, stage, x):
        index = 0
        while f"encoder.stage{stage}.{index}.proj.conv.weight" in self.state:
            x = self.block(stage, index, x)
            index += 1
        return x

    def block(self, stage, index, x):
        p, first = f"encoder.stage{stage}.{index}", index == 0
        if stage <= 2:
            y = self.batch_norm(f"{p}.norm", x)
        else:
            y = self.layer_norm(f"{p}.norm.norm", x.permute(0, 2, 3, 1), eps=1e-6).permute(0, 3, 1, 2)
        y = F.relu(self.batch_norm(f"{p}.conv.norm", self.conv(f"{p}.conv.conv", y)))
        if stage >= 3 and not first:
            y = y + to_map(self.layer_norm(f"{p}.ln1", self.spatial_mix(f"{p}.att", y)), like=y)
        z = self.conv(f"{p}.conv_local.conv", y, stride=2 if first else 1)
        z = F.silu(self.batch_norm(f"{p}.conv_local.norm", z))
        if first:
            return self.conv(f"{p}.proj.conv", z)
        return x + self.conv(f"{p}.proj.conv", y + z)

    def mixed(self, name, x):
        mix = self.state[name]
        return to_tokens(x) * mix + to_tokens(q_shift(x)) * (1 - mix)

    def spatial_mix(self, p, x):
        k = self.linear(f"{p}.key", self.mixed(f"{p}.spatial_mix_k", x))
        v = self.linear(f"{p}.value", self.mixed(f"{p}.spatial_mix_v", x))
        r = self.linear(f"{p}.receptance", self.mixed(f"{p}.spatial_mix_r", x))
        count = x.shape[2] * x.shape[3]
        wkv = bi_wkv(self.of(p, "spatial_decay") / count, self.of(p, "spatial_first") / count, k, v)
        return self.linear(f"{p}.output", torch.sigmoid(r) * self.layer_norm(f"{p}.key_norm", wkv))

    def channel_mix(self, p, x):
        k = F.relu(self.linear(f"{p}.key", self.mixed(f"{p}.spatial_mix_k", x))) ** 2
        r = self.linear(f"{p}.receptance", self.mixed(f"{p}.spatial_mix_r", x))
        return torch.sigmoid(r) * self.linear(f"{p}.value", self.layer_norm(f"{p}.key_norm", k))

    def cross_channel_mix(self, scales):
        size = scales[-1].shape[2:]
        joined = [self.conv(f"ccm.projections.{i}", resize(x, size)) for i, x in enumerate(scales)]
        z = torch.cat(joined, 1)
        z = z + to_map(self.layer_norm("ccm.ln1", self.channel_mix("ccm.channel", z)), like=z)
        leave = "ccm.final_projections"
        return [resize(self.conv(f"{leave}.{i}", z_i), scales[i].shape[2:]) for i, z_i in enumerate(z.chunk(3, 1))]

    def up(self, p, x):
        y = F.relu(self.batch_norm(f"{p}.conv.norm", self.conv(f"{p}.conv.conv", x)))
        y = F.silu(self.batch_norm(f"{p}.conv_local.norm", self.conv(f"{p}.conv_local.conv", y)))
        y = F.relu(self.batch_norm(f"{p}.proj.norm", self.conv(f"{p}.proj.conv", y)))
        return resize(y, (2 * y.shape[2], 2 * y.shape[3]))


def resize(x, size):
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
