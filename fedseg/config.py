"""The experiment: what the study's coordinator decides, in one TOML file and one frozen model.

An experiment travels inside every instruction as JSON and is validated with the same class at both ends. What a hospital
decides (where its data lie, its device, its limits) is not in here and never leaves the hospital.

Spatial values are in array order `(D, H, W)`: D runs along the patient's S axis, H along A, W along R once a volume is in
`RAS` orientation. Lengths are in mm.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    FiniteFloat,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from fedseg.errors import ModelError
from fedseg.names import Name
from fedseg.sections import (
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
    load_section,
    validate_section,
)
from fedseg.slicing import Slicing

TamePositiveInt = Annotated[int, Field(gt=0, le=100_000)]
"""A number of things that are all in memory at once, or done one after the other."""
Size3D = tuple[PositiveInt, PositiveInt, PositiveInt]
Millimetres = Annotated[float, Field(ge=0.01, le=50, allow_inf_nan=False)]
Spacing3D = tuple[Millimetres, Millimetres, Millimetres]


def _plain_value(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """One error in place of one per member of the union."""
    try:
        return validate(value)
    except ValidationError:
        raise ValueError("must be true or false, a number, a text, or a list of numbers or of texts") from None


Exchange = Literal["all", "all-but-norms", "all-but-statistics", "decoder"]

OptionValue = Annotated[
    bool | int | FiniteFloat | str | list[int] | list[FiniteFloat] | list[str] | None, WrapValidator(_plain_value)
]

MAX_LABELS = 256
"""Label values are kept in a byte."""


class TaskConfig(Section):
    """What is segmented in which kind of image."""

    name: str = Field(min_length=1)
    """Short name of the task, shown in tables and reports."""
    modality: Literal["mr", "ct"]
    """Decides the intensity scheme: `mr` z-scores each volume, `ct` clips a window in Hounsfield units."""
    channels: tuple[str, ...] = ("image",)
    """One name per input channel, in file order (`_0000`, `_0001`, ...)."""
    labels: dict[str, int]
    """Label names and values: `background = 0`, then 1, 2, ... without a gap."""

    @field_validator("labels")
    @classmethod
    def _labels_are_named_without_gaps(cls, labels: dict[str, int]) -> dict[str, int]:
        if any(not name.strip() for name in labels):
            raise ValueError("a label has no name; every value needs one, such as `spleen = 1`")
        if labels.get("background") != 0:
            raise ValueError("`background = 0` is missing")
        if sorted(labels.values()) != list(range(len(labels))):
            raise ValueError(f"values must be 0, 1, 2, ... each once: {_fault_of_values(list(labels.values()))}")
        if len(labels) < 2:
            raise ValueError("there is only background; name at least one structure")
        if len(labels) > MAX_LABELS:
            raise ValueError(f"there can be {MAX_LABELS} labels at most, there are {len(labels)}")
        return labels

    @field_validator("channels")
    @classmethod
    def _channels_are_distinct(cls, channels: tuple[str, ...]) -> tuple[str, ...]:
        if not channels or len(set(channels)) != len(channels):
            raise ValueError("needs at least one channel name, each once")
        return channels

    @property
    def num_labels(self) -> int:
        """Number of output channels, background included."""
        return len(self.labels)

    @property
    def structures(self) -> dict[str, int]:
        """The foreground labels, by value."""
        return {name: value for name, value in sorted(self.labels.items(), key=lambda item: item[1]) if value}


class DataConfig(Section):
    """How every site turns its files into network input, and when it has too little to take part."""

    orientation: str = "RAS"
    """Anatomical orientation to which volumes are turned, as nibabel writes axis codes."""
    spacing: Spacing3D | None = None
    """Voxel spacing in mm, `(D, H, W)`, to which volumes are resampled; absent: kept as they are."""
    crop: Literal["none", "nonzero"] = "none"
    """`nonzero` crops each volume to the box of its non-zero voxels."""
    percentiles: tuple[Fraction, Fraction] = (0.005, 0.995)
    """MR: intensities are clipped to these quantiles of the volume before its z-score."""
    window: tuple[FiniteFloat, FiniteFloat] | None = None
    """CT: lower and upper bound in Hounsfield units, mapped to [-1, 1]."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of a site's persons (never split) that is kept for validation."""
    min_cases: PositiveInt = 2
    """A site abstains with fewer usable training cases."""
    min_usable_share: Fraction = 0.5
    """A site abstains if a smaller share of its cases is usable."""
    fingerprint: bool = False
    """Before round 1 every site sends sums of label-free statistics of its images (docs/privacy.md). Sites and `fedseg predict`
    then know how unusual an image is."""
    polarity: Literal["as-is", "aligned"] = "as-is"
    """MR: `aligned` negates the z-scored images of sites where bright and dark are reversed against the majority, and of such
    images in `fedseg predict`. Needs `fingerprint`."""

    @field_validator("orientation")
    @classmethod
    def _orientation_is_a_frame(cls, code: str) -> str:
        axes = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}
        if len(code) != 3 or sorted(axes.get(letter, -1) for letter in code) != [0, 1, 2]:
            raise ValueError("must name one of R/L, A/P and S/I each, such as RAS or LPS")
        return code

    @field_validator("percentiles", "window")
    @classmethod
    def _bounds_are_ordered(cls, bounds: tuple[float, float] | None) -> tuple[float, float] | None:
        if bounds is not None and not bounds[0] < bounds[1]:
            raise ValueError("the lower bound must be below the upper one")
        return bounds


class ModelConfig(Section):
    """Which network: see `fedseg models`."""

    name: str = "mlru++"
    """A name that `fedseg models` lists."""
    preset: str | None = None
    """One of the network's presets; absent: its default."""
    options: dict[str, OptionValue] = Field(default={})
    """Keyword arguments of the network that replace the preset's."""
    slices: Annotated[PositiveInt, Field(le=15)] = 1
    """Slices that the network sees at once: 1, or an odd number (2.5D), its neighbours being further channels."""
    slice_axis: Literal["auto", "D", "H", "W"] = "auto"
    """Axis along which networks of images cut volumes into slices; `auto`: that of the coarsest `data.spacing`, else D."""

    pretrained: str | None = None
    """Warm start: local safetensors file whose weights the first round starts from, relative to the experiment's file. Sites
    get the weights with the first instructions, and of the path its last part."""
    pretrained_part: Literal["encoder", "all"] = "encoder"
    """What is taken from that file; what it does not have starts fresh."""

    @field_validator("slices")
    @classmethod
    def _slices_have_a_middle(cls, slices: int) -> int:
        if slices % 2 == 0:
            raise ValueError("must be odd, such as 3: a slice and its neighbours")
        return slices

    @field_validator("options")
    @classmethod
    def _slice_axis_is_set_in_one_place(cls, options: dict[str, Any]) -> dict[str, Any]:
        if "slice_axis" in options:
            raise ValueError("slice_axis is a setting of [model], not one of its options")
        return options


class TrainingConfig(Section):
    """How a site trains between two exchanges."""

    patch_size: Size3D
    """Training patch in voxels `(D, H, W)`; volumes smaller than that are padded."""
    batch_size: TamePositiveInt = 2
    """Patches per step."""
    steps_per_epoch: TamePositiveInt | None = None
    """Steps that count as one epoch; absent: one patch of each training case."""
    foreground_share: Fraction = 0.33
    """Share of patches that are centred on a foreground voxel."""
    augmentation: Literal["none", "light", "strong"] = "light"
    """`light`: left-right flip, intensity scale and shift; `strong`: also rotation, zoom, noise, blur, gamma, low resolution."""
    contrast_reversal: Fraction = 0.0
    """Probability that bright and dark change places in a training patch, for networks that are to read T1 and T2 alike."""
    contrast_curve: Fraction = 0.0
    """Probability that intensities of a training patch go through a random rising curve."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """`sgd` is with Nesterov momentum, as in the networks' papers. Its state is new in every round."""
    learning_rate: PositiveFloat = 1e-3
    """Learning rate of the first round."""
    schedule: Literal["constant", "poly", "cosine"] = "poly"
    """Decay over the rounds of the federation; `poly` is (1 - progress)^0.9."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Momentum of `sgd`."""
    weight_decay: NonNegativeFloat = 3e-5
    """Weight decay on all parameters."""
    clip_norm: PositiveFloat | None = 12.0
    """Largest L2 norm of the gradient; absent: not clipped."""
    deep_supervision: bool = True
    """Train the network's auxiliary outputs too, where it has them."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type on a GPU (parameters stay fp32); on a CPU, bf16 works and fp16 is refused."""


class EvaluationConfig(Section):
    """How a model is scored."""

    overlap: Annotated[float, Field(ge=0, le=0.9)] = 0.5
    """Overlap of neighbouring windows in sliding-window inference, blended with a Gaussian; 0.9 is 1000 times the work."""
    surface_tolerance: PositiveFloat = 1.0
    """Tolerance of the surface Dice in mm."""
    surface_metrics: bool = False
    """Compute HD95 and surface Dice in every round too, not only at the end."""


class ScreeningConfig(Section):
    """What the server refuses before an update can touch the global model."""

    max_norm_ratio: PositiveFloat = 20.0
    """Largest update norm, as a multiple of the median norm of the last accepted updates."""
    max_norm: PositiveFloat | None = None
    """Largest update norm whatever the others sent; absent: only the ratio counts."""


class FederationConfig(Section):
    """How rounds are run and updates are joined."""

    rounds: PositiveInt
    """Number of rounds."""
    local_epochs: PositiveInt = 1
    """Passes over a site's training cases per round."""
    proximal_mu: NonNegativeFloat = 0.0
    """FedProx: weight of (mu/2)||w - w_global||^2; 0 is FedAvg."""
    control_variates: bool = False
    """SCAFFOLD: sites correct their gradients by what the federation's differ from their own; wants `optimizer = "sgd"`."""
    normalise_steps: bool = False
    """FedNova: updates are divided by what the site's local steps amount to, for sites that take different numbers of steps."""
    personal_lambda: PositiveFloat | None = None
    """Ditto: each site also trains a network of its own, pulled to what it receives by (lambda/2)||v - w||^2."""
    exchange: Exchange = "all"
    """Tensors that are joined: `all`; `all-but-norms`: norm layers stay at their site (FedBN);
    `all-but-statistics`: only their running statistics do (SiloBN); `decoder`: the encoder does."""
    aggregate: Literal["mean", "median", "trimmed-mean"] = "mean"
    """`mean` streams; the robust ones hold all updates of a round in memory."""
    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.2
    """Share of values that `trimmed-mean` drops at each end."""
    weighting: Literal["cases", "uniform"] = "cases"
    """Weight of a site in the mean: its number of training cases, or 1."""
    server_optimizer: Literal["average", "momentum", "adam"] = "average"
    """`average` takes the mean as it is; `momentum` is FedAvgM, `adam` is FedAdam."""
    server_learning_rate: PositiveFloat = 1.0
    """Step size of the server optimizer; FedAdam wants about 0.01."""
    server_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """First-moment decay of `momentum` and `adam`."""
    participation: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of sites asked in a round, drawn anew each round from the seed."""
    min_sites: PositiveInt = 2
    """Quorum: a round with fewer accepted updates is repeated."""
    max_attempts: PositiveInt = 3
    """Tries per round before the run stops with a QuorumError; it can be resumed."""
    deadline: PositiveFloat | None = None
    """Seconds after which a round ends with the sites that answered; absent: waits for all."""
    evaluate_every: PositiveInt = 1
    """Sites score the incoming weights every so many rounds (and always after the last)."""
    screening: ScreeningConfig = ScreeningConfig()


class PrivacyConfig(Section):
    """What every site does to its update before it leaves. A site's own policy can demand it."""

    clip_norm: PositiveFloat | None = None
    """Largest L2 norm of an update, over all tensors that leave; longer ones are scaled down. Absent: not clipped. Batch norm's
    running variances are among them and dwarf the weights: use another norm, or `federation.exchange = "all-but-norms"`."""
    noise_multiplier: NonNegativeFloat = 0.0
    """Standard deviation of the Gaussian noise that a site adds to every value, as a multiple of `clip_norm`."""

    @model_validator(mode="after")
    def _noise_is_measured_against_the_clip(self) -> Self:
        if self.noise_multiplier and self.clip_norm is None:
            raise ValueError("noise_multiplier is a multiple of clip_norm; set clip_norm too, such as 1.0")
        return self


class Experiment(Section):
    """Everything that the coordinator decides.

    Raises:
        ConfigError: from `load_experiment` and `parse_experiment`, naming file, key, value and what would be right.
    """

    name: Name
    """Name of the study; letters, digits, `.`, `_`, `-`."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of everything random."""
    task: TaskConfig
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    federation: FederationConfig
    privacy: PrivacyConfig = PrivacyConfig()

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        if self.task.modality == "ct" and self.data.window is None:
            raise ValueError("data.window: a CT task needs one in Hounsfield units, such as window = [-160.0, 240.0]")
        if self.task.modality == "mr" and self.data.window is not None:
            raise ValueError("data.window: is for CT; an MR task uses data.percentiles. Leave it out")
        if self.data.polarity == "aligned" and not self.data.fingerprint:
            raise ValueError(
                "data.polarity: who is reversed is seen in the fingerprint; set data.fingerprint = true too"
            )
        if self.data.polarity == "aligned" and self.task.modality == "ct":
            raise ValueError("data.polarity: Hounsfield units are never reversed; leave it out for a CT task")
        federation = self.federation
        for key in ("control_variates", "normalise_steps"):
            if getattr(federation, key) and federation.aggregate != "mean":
                raise ValueError(f'federation.{key}: is about a mean of updates; use aggregate = "mean"')
        if federation.personal_lambda is not None and federation.exchange != "all":
            raise ValueError('federation.personal_lambda: gives each site a whole network; use exchange = "all"')
        if federation.control_variates and self.training.optimizer != "sgd":
            raise ValueError('federation.control_variates: corrects gradient steps; use training.optimizer = "sgd"')
        from fedseg.models.registry import check_model, resolve

        key = "model"
        try:
            resolve(self.model.name, self.model.preset, self.model.options)
            key = "training.patch_size"
            check_model(
                self.model.name,
                preset=self.model.preset,
                options=self.network_options,
                in_channels=self.in_channels,
                num_labels=self.task.num_labels,
                patch_size=self.training.patch_size,
                batch_size=self.training.batch_size,
            )
        except ModelError as error:
            raise ValueError(f"{key}: {error}") from error
        return self

    @property
    def slicing(self) -> Slicing:
        """What the network sees of neighbouring slices."""
        spacing = self.data.spacing or (1.0, 1.0, 1.0)
        axis = self.model.slice_axis
        return Slicing(self.model.slices, spacing.index(max(spacing)) if axis == "auto" else "DHW".index(axis))

    @property
    def in_channels(self) -> int:
        """Input channels of the network."""
        return len(self.task.channels) * self.model.slices

    @property
    def network_options(self) -> dict[str, Any]:
        """Keyword arguments of the network; those of images are told the axis of their slices."""
        from fedseg.models.registry import ARCHITECTURES

        architecture = ARCHITECTURES.get(self.model.name)
        if architecture is None or "slice_axis" not in architecture.options:
            return dict(self.model.options)
        return {**self.model.options, "slice_axis": "DHW"[self.slicing.axis]}

    def to_json(self) -> str:
        """The canonical JSON document: the same experiment gives the same text, in whatever folder its files lie."""
        document = self.model_dump(mode="json")
        if self.model.pretrained is not None:
            document["model"]["pretrained"] = Path(self.model.pretrained).name
        return json.dumps(document, sort_keys=True, separators=(",", ":"))

    def located(self, folder: Path) -> Self:
        """The same experiment, with paths relative to `folder` made absolute."""
        if self.model.pretrained is None:
            return self
        model = self.model.model_copy(update={"pretrained": str(folder.resolve() / self.model.pretrained)})
        return self.model_copy(update={"model": model})

    def digest(self) -> str:
        """SHA-256 of the canonical JSON document."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def load_experiment(path: Path) -> Experiment:
    """Read and validate an experiment file."""
    return load_section(Experiment, path).located(path.parent)


def parse_experiment(document: str) -> Experiment:
    """Validate an experiment that arrived as JSON."""
    return validate_section(Experiment, document, source="the received experiment")


def _fault_of_values(values: list[int]) -> str:
    if min(values) < 0:
        return f"{min(values)} is negative"
    missing = sorted(set(range(max(values) + 1)) - set(values))
    return f"{missing[0]} has no name" if missing else "two names share a value"
