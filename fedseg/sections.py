"""Sections of configuration files: checked when they are read, with errors that name file, key and value."""

import difflib
import json
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedseg.errors import ConfigError

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]

FAULTS_TOLD, LONGEST_KEY = 20, 80
"""Faults of one file, and characters of one key, that an error tells; others may have chosen them."""

_TOO_DEEP = re.compile(r"""\.(?:[\w"'-]{0,99}[ \t]?\.[ \t]?){100}""")
"""tomllib takes a minute for a key with fifty thousand dots."""


class Section(BaseModel):
    """A frozen part of a configuration file; unknown keys and wrong types are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


S = TypeVar("S", bound=Section)


def load_section(kind: type[S], path: Path) -> S:
    """Read a TOML file into a section.

    Raises:
        ConfigError: the file is missing, is no TOML, or does not validate.
    """
    try:
        document = json.dumps(read_toml(path), default=str)
    except (ValueError, RecursionError) as error:  # keys with a thousand dots, numbers of 5000 digits
        raise ConfigError(f"{path}: no configuration is nested so deeply or holds such numbers: {error}") from None
    return validate_section(kind, document, source=str(path), folder=path.parent)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ConfigError: the file is missing or is no TOML.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if _TOO_DEEP.search(text):
            raise ValueError("a key has more than a hundred parts")
        return tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable TOML file: {error}") from error
    except RecursionError:
        raise ConfigError(f"{path}: not a readable TOML file: tables or lists are nested too deeply") from None


def validate_section(kind: type[S], document: str, *, source: str, folder: Path | None = None) -> S:
    """Validate a JSON document against a section.

    Args:
        kind: the section.
        document: JSON.
        source: where it comes from, for messages.
        folder: to which paths of files that are read at once are relative; absent: the working directory.

    Raises:
        ConfigError: one line per fault: source, key, what is wrong, the value that stood there.
    """
    try:
        return kind.model_validate_json(document, context={"folder": folder})
    except ValidationError as error:
        faults = error.errors(include_url=False)
        lines = [_explain(kind, source, fault) for fault in faults[:FAULTS_TOLD]]
        if len(faults) > FAULTS_TOLD:
            lines.append(f"{source}: and {len(faults) - FAULTS_TOLD} more faults")
        raise ConfigError("\n".join(lines)) from None


def _explain(kind: type[Section], source: str, fault: Any) -> str:
    loc = fault["loc"]
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        message = f"unknown key; {_known_keys(kind, loc)}"
    elif fault["type"] == "missing" and isinstance(loc[-1], int):
        loc, message = loc[:-1], "has too few values"
    elif fault["type"] == "missing":
        return f"{source}: {_dotted(loc)}: is missing"
    value = repr(fault["input"])
    whole_section = isinstance(fault["input"], dict) and fault["type"] == "value_error" and len(value) > 120
    shown = "" if not loc or whole_section else f", got {value if len(value) <= 120 else value[:117] + '...'}"
    return f"{source}: {_dotted(loc) + ': ' if loc else ''}{message}{shown}"


def _dotted(loc: tuple[int | str, ...]) -> str:
    return ".".join(text if len(text) <= LONGEST_KEY else f"{text[:LONGEST_KEY]}..." for text in map(str, loc))


def _known_keys(kind: type[Section], loc: tuple[int | str, ...]) -> str:
    """What could have been meant by the last key of `loc`."""
    sections = [kind]
    for part in loc[:-1]:
        fields = [section.model_fields[part] for section in sections if part in section.model_fields]
        if fields:  # else an index, or a key of a dictionary: the sections stay the same
            sections = [section for field in fields for section in _sections_in(field.annotation)]
    known = [name for section in sections for name in section.model_fields]
    near = difflib.get_close_matches(str(loc[-1])[:LONGEST_KEY].lower(), known, n=1)
    return f"did you mean {near[0]!r}" if near else f"known here are {', '.join(known)}"


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections_in(part)]
