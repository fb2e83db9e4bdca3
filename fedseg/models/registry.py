"""What networks there are, which presets and options they have, and which patches they can take. No torch in here.

Adding a network is one file with an `nn.Module` and one entry in `ARCHITECTURES`.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedseg.errors import ModelError

Size = tuple[int, int, int]

LARGEST_SIDE = 2048
"""Voxels of a patch along one axis."""
LARGEST_BATCH = 2**30
"""Values in one batch of patches, input or output: 4 GiB. An experiment comes from outside and must not ask for all memory."""


@dataclass(frozen=True)
class Option:
    """One keyword argument of a network, as far as it can be checked without building the network."""

    kind: str
    """`int`, `float`, `bool`, `ints` or `floats` (lists of them) or `choice`."""
    choices: tuple[str, ...] = ()
    """What a `choice` may be."""
    least: float = 0
    """Smallest value (of each entry)."""
    most: float = math.inf
    """Largest value (of each entry)."""
    length: tuple[int, int] = (1, 8)
    """Fewest and most entries of a list."""
    odd: bool = False
    """Whether entries must be odd."""

    def describe(self) -> str:
        """What would be right, in words."""
        if self.kind == "choice":
            return "one of " + ", ".join(map(repr, self.choices))
        if self.kind == "bool":
            return "true or false"
        number = {
            "float": "a number",
            "int": "an odd number" if self.odd else "a whole number",
            "floats": "numbers",
            "ints": "odd numbers" if self.odd else "whole numbers",
        }
        words = f"{number[self.kind]} of at least {self.least:g}"
        if self.most < math.inf:
            words = f"{number[self.kind]} from {self.least:g} to {self.most:g}"
        if self.kind in ("ints", "floats"):
            low, high = self.length
            words = f"{low if low == high else f'{low} to {high}'} {words}"
        return words

    def accepts(self, value: object) -> bool:
        """Whether a network can be built with this value."""
        if self.kind == "choice":
            return value in self.choices
        if self.kind == "bool":
            return isinstance(value, bool)
        if self.kind in ("ints", "floats"):
            return (
                isinstance(value, (list, tuple))
                and self.length[0] <= len(value) <= self.length[1]
                and all(self._is_number(entry, whole=self.kind == "ints") for entry in value)
            )
        return self._is_number(value, whole=self.kind == "int")

    def _is_number(self, value: object, *, whole: bool) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            return False
        return self.least <= value <= self.most and not (self.odd and value % 2 == 0)


@dataclass(frozen=True)
class Preset:
    """A network's published or tried configuration."""

    description: str
    """One line for `fedseg models`."""
    patch_size: Size
    """Input size `(D, H, W)` that it was made for."""
    in_channels: int = 1
    """Input channels of that task."""
    num_labels: int = 3
    """Labels of that task, background included."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the network."""


@dataclass(frozen=True)
class Architecture:
    """One network: where it lives, what can be set, and how far it shrinks a patch."""

    module: str
    """Module that defines it; imported only when the network is built."""
    factory: str
    """Class in that module, called as `(in_channels, num_labels, patch_size, *, deep_supervision, **options)`."""
    default_preset: str
    presets: Mapping[str, Preset]
    options: Mapping[str, Option]
    stride: Callable[[Mapping[str, Any]], Size]
    """Input voxels per voxel of the coarsest level, given all options; patches are padded to a multiple of it."""
    per_sample: Callable[[Mapping[str, Any]], bool]
    """Whether the coarsest level is normalised over each sample's (each slice's) voxels alone, given all options."""
    encoder: str
    """Regular expression for the names of the encoder's tensors, bottleneck included; the others are the decoder's."""


@dataclass(frozen=True)
class ModelInfo:
    """A network and preset that `build_model` knows, with the task it was made for."""

    name: str
    preset: str
    description: str
    patch_size: Size
    """Input size in voxels, `(D, H, W)`."""
    in_channels: int
    num_labels: int
    """Output channels, background included."""
    default: bool
    """Whether `build_model` takes this preset when none is named."""


def list_models() -> list[ModelInfo]:
    """All networks and presets."""
    return [
        ModelInfo(
            name,
            preset_name,
            preset.description,
            preset.patch_size,
            preset.in_channels,
            preset.num_labels,
            preset_name == architecture.default_preset,
        )
        for name, architecture in ARCHITECTURES.items()
        for preset_name, preset in architecture.presets.items()
    ]


def resolve(name: str, preset: str | None, options: Mapping[str, Any]) -> tuple[Architecture, Preset, dict[str, Any]]:
    """Look a network up and join its preset's options with the given ones.

    Raises:
        ModelError: unknown name, preset or option, or an option's value that does not fit.
    """
    if name not in ARCHITECTURES:
        raise ModelError(f"no network is called {name!r}; {_choices(name, ARCHITECTURES)}")
    architecture = ARCHITECTURES[name]
    chosen = architecture.default_preset if preset is None else preset
    if chosen not in architecture.presets:
        raise ModelError(f"{name} has no preset {chosen!r}; {_choices(chosen, architecture.presets)}")
    for key, value in options.items():
        if key not in architecture.options:
            raise ModelError(f"{name} has no option {key!r}; {_choices(key, architecture.options)}")
        option = architecture.options[key]
        if not option.accepts(value):
            raise ModelError(f"{name}: option {key} must be {option.describe()}, got {value!r}")
    found = architecture.presets[chosen]
    joined = {**found.options, **options}
    return architecture, found, {k: tuple(v) if isinstance(v, list) else v for k, v in joined.items()}


def check_model(
    name: str,
    *,
    preset: str | None,
    options: Mapping[str, Any],
    in_channels: int,
    num_labels: int,
    patch_size: Size,
    batch_size: int,
) -> None:
    """Check, without torch, that a network exists and can be trained with such batches.

    Raises:
        ModelError: unknown name, preset or option, or a batch that is too small for the network's statistics or too large
            for any machine.
    """
    architecture, _, joined = resolve(name, preset, options)
    check_counts(name, in_channels, num_labels)
    if any(length < 1 for length in patch_size):
        raise ModelError(f"{name}: a patch needs at least one voxel per axis, got {tuple(patch_size)}")
    values = batch_size * math.prod(patch_size) * max(in_channels, num_labels)
    if max(patch_size) > LARGEST_SIDE or values > LARGEST_BATCH:
        raise ModelError(
            f"{name}: a batch of {batch_size} patches of {_by(patch_size)} with {max(in_channels, num_labels)} channels has"
            f" {values:.3g} values; there can be {LARGEST_BATCH:.3g}, and {LARGEST_SIDE} voxels along an axis"
        )
    stride = architecture.stride(joined)
    per_sample = architecture.per_sample(joined)
    counting = [i for i, axis in enumerate("DHW") if not (per_sample and axis == joined.get("slice_axis"))]
    coarsest = [-(-patch_size[i] // stride[i]) for i in counting]
    if math.prod(coarsest) * (1 if per_sample else batch_size) > 1:
        return
    axis = min(counting, key=lambda i: (stride[i], -i))
    larger = tuple(step + 1 if i == axis else n for i, (n, step) in enumerate(zip(patch_size, stride, strict=True)))
    raise ModelError(
        f"{name}: a patch of {_by(patch_size)} shrinks to a single voxel (one per {_by(stride)}), which has no statistics"
        f" to normalise with; use a larger patch, at least {_by(larger)}" + ("" if per_sample else ", or a batch of 2")
    )


def check_counts(name: str, in_channels: int, num_labels: int) -> None:
    """Check the numbers of channels.

    Raises:
        ModelError: less than one input channel or two labels.
    """
    if in_channels < 1:
        raise ModelError(f"{name}: needs at least one input channel, got {in_channels}")
    if num_labels < 2:
        raise ModelError(f"{name}: needs at least two labels, background and a structure, got {num_labels}")


def _choices(wrong: str, right: Iterable[str]) -> str:
    names = list(right)
    near = difflib.get_close_matches(wrong.lower(), names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}There is: {', '.join(names)}"


def _by(size: Iterable[int]) -> str:
    return "x".join(map(str, size))


def _pyramid(options: Mapping[str, Any]) -> Size:
    factor = 2 ** (len(options["depths"]) - 1)
    d, h, w = options["stem"]
    return d * factor, h * factor, w * factor


def _unet_stride(options: Mapping[str, Any]) -> Size:
    factor = 2 ** (len(options["widths"]) - 1)
    return factor, factor, factor


_MLRU = {
    "base_width": 16,
    "depths": (3, 3, 3, 3),
    "decoder_depth": 3,
    "n_res": 2,
    "attn_dropout": 0.1,
    "conv_dropout": 0.1,
    "norm": "batch",
}
_RWKV_SIZES: Mapping[str, Mapping[str, Any]] = {
    "t": {"depths": (2, 2, 4, 2), "widths": (32, 48, 96, 160), "expansions": (2, 2.5, 3, 3.5)},
    "s": {"depths": (3, 3, 6, 3), "widths": (32, 64, 128, 192), "expansions": (2, 2.5, 3, 4)},
    "b": {"depths": (3, 3, 6, 3), "widths": (48, 72, 144, 240), "expansions": (2, 2.5, 4, 4)},
}
_RWKV_OPTIONS: Mapping[str, Option] = {
    "depths": Option("ints", least=1, most=32, length=(4, 4)),
    "widths": Option("ints", least=4, most=4096, length=(4, 4)),
    "expansions": Option("floats", least=1, most=16, length=(4, 4)),
    "stem_width": Option("int", least=1, most=4096),
    "kernel": Option("int", least=1, most=15, odd=True),
    "decoder_kernel": Option("int", least=1, most=15, odd=True),
    "drop_path": Option("float", most=0.99),
    "norm": Option("choice", ("batch", "instance", "group")),
    "memory_format": Option("choice", ("auto", "contiguous", "channels_last")),
}


def _rwkv(factory: str, description: str, patch_size: Size, defaults: Mapping[str, Any]) -> Architecture:
    """RWKV-UNet over slices, if its defaults have a `slice_axis`, or over volumes."""
    slices = {"slice_axis": Option("choice", ("D", "H", "W"))} if "slice_axis" in defaults else {}
    return Architecture(
        module="fedseg.models.rwkv",
        factory=factory,
        default_preset="t",
        presets={
            size: Preset(
                description.format(size.upper()),
                patch_size,
                num_labels=9,
                options={**options, "norm": "batch", **defaults},
            )
            for size, options in _RWKV_SIZES.items()
        },
        options={**_RWKV_OPTIONS, **slices},
        stride=_rwkv_stride,
        per_sample=lambda options: options["norm"] == "instance",
        encoder=r"^(stem|stages)\.",
    )


def _rwkv_stride(options: Mapping[str, Any]) -> Size:
    depth, height, width = (1 if axis == options.get("slice_axis") else 16 for axis in "DHW")
    return depth, height, width


_SYNAPSE = Preset(
    "as released for Synapse, abdominal CT",
    (64, 128, 128),
    num_labels=14,
    options={**_MLRU, "stem": (2, 4, 4), "attn_dropout": 0.15},
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "mlru++": Architecture(
        module="fedseg.models.mlru",
        factory="MLRUPlusPlus",
        default_preset="light",
        presets={
            "light": Preset(
                "small volumes, trains on a CPU",
                (40, 56, 40),
                options={
                    "stem": (2, 2, 2),
                    "base_width": 8,
                    "depths": (1, 1, 1),
                    "decoder_depth": 1,
                    "n_res": 1,
                    "attn_dropout": 0.0,
                    "conv_dropout": 0.0,
                    "pos_embed": "none",
                    "norm": "instance",
                    "gamma_init": 0.1,
                },
            ),
            "synapse": _SYNAPSE,
            "btcv": Preset("as released for BTCV, the same as synapse", (64, 128, 128), 1, 14, _SYNAPSE.options),
            "acdc": Preset(
                "as released for ACDC, cardiac MR",
                (16, 160, 160),
                num_labels=4,
                options={**_MLRU, "stem": (1, 4, 4)},
            ),
            "lung": Preset(
                "as released for Decathlon Lung, chest CT",
                (32, 192, 192),
                num_labels=2,
                options={**_MLRU, "stem": (1, 4, 4)},
            ),
            "tumor": Preset(
                "as released for Decathlon brain tumours, four MR sequences",
                (128, 128, 128),
                in_channels=4,
                num_labels=4,
                options={**_MLRU, "stem": (4, 4, 4), "n_res": 1},
            ),
        },
        options={
            "stem": Option("ints", least=1, most=16, length=(3, 3)),
            "base_width": Option("int", least=2, most=512),
            "depths": Option("ints", least=1, most=32, length=(2, 6)),
            "decoder_depth": Option("int", least=1, most=32),
            "n_res": Option("int", least=0, most=8),
            "attn_dropout": Option("float", most=0.99),
            "conv_dropout": Option("float", most=0.99),
            "msd_kernels": Option("ints", least=1, most=15, odd=True),
            "fold": Option("choice", ("2d", "3d")),
            "pool": Option("choice", ("padded", "masked")),
            "pos_embed": Option("choice", ("learned", "none")),
            "norm": Option("choice", ("batch", "instance", "group")),
            "gamma_init": Option("float"),
            "memory_format": Option("choice", ("auto", "contiguous", "channels_last")),
            "checkpoint_activations": Option("bool"),
        },
        stride=_pyramid,
        per_sample=lambda options: options["norm"] == "instance",
        encoder=r"^(downs|encoder|skip)\.",
    ),
    "unet": Architecture(
        module="fedseg.models.unet",
        factory="UNet",
        default_preset="r0",
        presets={
            "r0": Preset(
                "plain U-Net (MONAI), the yardstick",
                (40, 56, 40),
                options={"widths": (16, 32, 64, 128), "residual_units": 0, "norm": "instance"},
            ),
            "r2": Preset(
                "U-Net with two residual units per level (MONAI)",
                (40, 56, 40),
                options={"widths": (16, 32, 64, 128), "residual_units": 2, "norm": "instance"},
            ),
        },
        options={
            "widths": Option("ints", least=1, most=4096, length=(2, 6)),
            "residual_units": Option("int", most=32),
            "norm": Option("choice", ("instance", "batch")),
            "dropout": Option("float", most=0.99),
        },
        stride=_unet_stride,
        per_sample=lambda options: options["norm"] == "instance",
        encoder=r"^net\.model\.(1\.submodule\.)*(0|conv|residual|adn)\.",
    ),
    "dynunet": Architecture(
        module="fedseg.models.unet",
        factory="DynamicUNet",
        default_preset="small",
        presets={
            "small": Preset(
                "small nnU-Net (MONAI DynUNet), deep supervision",
                (40, 56, 40),
                options={"widths": (16, 32, 64, 128), "norm": "instance"},
            ),
            "base": Preset(
                "nnU-Net's widths (MONAI DynUNet), deep supervision",
                (64, 128, 128),
                options={"widths": (32, 64, 128, 256, 320), "norm": "instance"},
            ),
        },
        options={
            "widths": Option("ints", least=1, most=4096, length=(3, 6)),
            "residual": Option("bool"),
            "norm": Option("choice", ("instance", "batch")),
        },
        stride=_unet_stride,
        per_sample=lambda options: options["norm"] == "instance",
        encoder=r"^(input_block|downsamples|bottleneck)\.",
    ),
    "rwkv-unet": _rwkv("RWKVUNet", "as released, size {}, slice by slice", (1, 224, 224), {"slice_axis": "D"}),
    "rwkv-unet-3d": _rwkv(
        "RWKVUNet3d",
        "RWKV-UNet over volumes, size {} (our extension)",
        (48, 64, 48),
        {"kernel": 3, "decoder_kernel": 5},
    ),
}
