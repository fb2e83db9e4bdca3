"""Scanner profiles and annotators as sections of configuration files, and the profiles that come with the library."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, FiniteFloat, ValidationInfo, model_validator

from fedseg.data.shift import catalogue
from fedseg.errors import ConfigError
from fedseg.sections import Fraction, PositiveInt, Section, load_section

SHIPPED = Path(__file__).parent.parent / "profiles"


class _Dose(Section):
    """How much of one effect or habit."""

    name: str
    severity: Annotated[int, Field(ge=1, le=5)] | None = None
    """1 (slight) to 5 (destructive), as calibrated; see `fedseg data effects`."""
    strength: FiniteFloat | None = None
    """Instead of a severity: a number in the effect's own unit."""
    probability: Fraction = 1.0
    """Share of cases that have it."""

    def _require(self, known: Mapping[str, catalogue.EffectKind | catalogue.HabitKind]) -> None:
        if self.name not in known:
            near = difflib.get_close_matches(self.name, known, n=1)
            raise ValueError(
                f"unknown name {self.name!r}; "
                + (f"did you mean {near[0]!r}" if near else f"known are {', '.join(known)}")
            )
        if (self.severity is None) == (self.strength is None):
            raise ValueError(f"{self.name}: needs either severity (1 to 5) or strength ({known[self.name].unit})")
        low, high = known[self.name].limits
        if self.strength is not None and not low <= self.strength <= high:
            raise ValueError(
                f"{self.name}: strength must be {low:g} to {high:g} ({known[self.name].unit}), got {self.strength:g}"
            )

    def _amount(self, strengths: catalogue.Five) -> float:
        return strengths[self.severity - 1] if self.severity is not None else float(self.strength or 0)


class Effect(_Dose):
    """One effect of a scanner; `fedseg data effects` lists the names."""

    axis: Literal["auto", "D", "H", "W"] = "auto"
    """Axis of slices or of phase encoding, or the only one with larger voxels; `auto`: drawn once for the site."""

    @model_validator(mode="after")
    def _is_known(self) -> Self:
        self._require(catalogue.EFFECTS)
        return self

    @property
    def amount(self) -> float:
        """Strength in the effect's own unit."""
        return self._amount(catalogue.EFFECTS[self.name].strengths)


class ScannerProfile(Section):
    """One hospital's scanner: what it does to every image, always in the order of physics."""

    name: str = Field(min_length=1)
    modality: catalogue.Modality
    description: str = ""
    """What it imitates."""
    effects: Annotated[tuple[Effect, ...], Field(strict=False)] = ()  # a list, where a table stands in another section
    """In any order; the one of `fedseg.data.shift.catalogue.STAGES` counts."""
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Strengths differ by up to this share from case to case."""

    @model_validator(mode="after")
    def _effects_fit(self) -> Self:
        names = [effect.name for effect in self.effects]
        if len(set(names)) != len(names):
            raise ValueError(f"each effect can be there once, got {names}")
        for name in names:
            if self.modality not in catalogue.EFFECTS[name].modalities:
                raise ValueError(
                    f"effect {name!r} is for {' and '.join(catalogue.EFFECTS[name].modalities)}, the profile for {self.modality}"
                )
        return self


class Habit(_Dose):
    """One habit of an annotator; `fedseg data effects` lists the names."""

    structures: tuple[PositiveInt, ...] = ()
    """Label values that it is about; empty: all."""

    @model_validator(mode="after")
    def _is_known(self) -> Self:
        self._require(catalogue.HABITS)
        return self

    @property
    def amount(self) -> float:
        """Strength in the habit's own unit."""
        return self._amount(catalogue.HABITS[self.name].strengths)


class Annotator(Section):
    """One hospital's way to draw outlines."""

    name: str = Field(min_length=1)
    description: str = ""
    habits: tuple[Habit, ...]
    """Applied one after the other."""


def load_profile(name: str, folder: Path | None = None) -> ScannerProfile:
    """A profile that comes with the library, or a TOML file.

    Args:
        name: as `fedseg data profiles` lists it, or a path that ends in `.toml`.
        folder: to which the path is relative; absent: the working directory.

    Raises:
        ConfigError: there is none, or it is wrong.
    """
    if name.endswith(".toml"):
        return load_section(ScannerProfile, (folder or Path()) / Path(name).expanduser())
    shipped = {path.stem: path for path in SHIPPED.glob("*.toml")}
    if name not in shipped:
        near = difflib.get_close_matches(name, shipped, n=1)
        hint = f"did you mean {near[0]!r}" if near else f"there are {', '.join(sorted(shipped))}"
        raise ConfigError(f"no scanner profile {name!r}; {hint}; a file's name must end in .toml")
    return load_section(ScannerProfile, shipped[name])


def shipped_profiles() -> dict[str, ScannerProfile]:
    """All profiles that come with the library, by name, MR first."""
    profiles = {path.stem: load_section(ScannerProfile, path) for path in sorted(SHIPPED.glob("*.toml"))}
    return dict(sorted(profiles.items(), key=lambda item: item[1].modality == "ct"))


def pick_profiles(names: Sequence[str], modality: str) -> dict[str, ScannerProfile]:
    """Profiles by name or path; `all` stands for those of the modality that come with the library.

    Raises:
        ConfigError: there is none of that name, or it is for the other modality.
    """
    chosen: dict[str, ScannerProfile] = {}
    for name in names:
        if name == "all":
            chosen |= {known: one for known, one in shipped_profiles().items() if one.modality == modality}
        else:
            chosen[name] = load_profile(name)
            if chosen[name].modality != modality:
                raise ConfigError(f"profile {name!r} is for {chosen[name].modality}, the images are {modality}")
    return chosen


def _loaded(value: Any, info: ValidationInfo) -> Any:
    """A name or a path becomes the profile, so that what is kept and hashed is the content."""
    if not isinstance(value, str):
        return value
    try:
        return load_profile(value, (info.context or {}).get("folder"))
    except ConfigError as error:
        raise ValueError(str(error)) from None


Scanner = Annotated[ScannerProfile, BeforeValidator(_loaded)]
"""In a file: the name of a profile, a path to one, or a table."""


class Shift(Section):
    """What makes a simulated hospital's cases its own. For simulations only: a real hospital has a scanner."""

    scanner: Scanner | None = None
    """In the file: the name of a profile (`fedseg data profiles`), a path to one, or a table."""
    annotator: Annotator | None = None
    """Who draws the labels that are trained on."""
    annotate_references: bool = False
    """Score against the annotator's labels too; otherwise the references of validation and test stay as they are."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the site: decides directions, axes and every case's own draw."""

    def recipe(self) -> dict[str, Any]:
        """All that decides what becomes of a case, strengths in numbers: equal recipes give equal arrays."""
        effects = (
            [] if self.scanner is None else [(e.name, e.amount, e.probability, e.axis) for e in self.scanner.effects]
        )
        habits = (
            []
            if self.annotator is None
            else [(h.name, h.amount, h.probability, h.structures) for h in self.annotator.habits]
        )
        scanner = None if self.scanner is None else [self.scanner.modality, self.scanner.jitter, sorted(effects)]
        return {"format": catalogue.FORMAT, "seed": self.seed, "scanner": scanner, "habits": habits}

    @property
    def for_scoring(self) -> "Shift":
        """The same hospital, with references as they are unless asked otherwise."""
        return self if self.annotate_references else self.model_copy(update={"annotator": None})


def require_name(name: str) -> str:
    """The name, if it is that of an effect or a habit.

    Raises:
        ConfigError: it is not.
    """
    known = [*catalogue.EFFECTS, *catalogue.HABITS]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise ConfigError(
            f"no effect or habit {name!r}; "
            + (f"did you mean {near[0]!r}" if near else f"there are {', '.join(known)}")
        )
    return name


def single_effect(name: str, severity: int | None = None, *, strength: float | None = None) -> ScannerProfile:
    """A profile with one effect, for pictures and calibration."""
    effect = Effect(name=name, severity=severity, strength=strength)
    return ScannerProfile(name=name, modality=catalogue.EFFECTS[name].modalities[0], effects=(effect,))
