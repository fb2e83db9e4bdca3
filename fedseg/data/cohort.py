"""The cases of one site: read from a folder, grouped by person, split without leaving a person on both sides.

Known folders: Medical Segmentation Decathlon (`dataset.json` with a `training` list), nnU-Net raw (`imagesTr`,
`labelsTr`, `CASE_0000.nii.gz` per channel), and a plain `images`, `labels` pair.
"""

import csv
import glob
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ValidationError, model_validator

from fedseg.data.reasons import Reason as Reason
from fedseg.errors import ConfigError, DataError
from fedseg.sections import Section

_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")


@dataclass(frozen=True)
class Case:
    """One labelled (or to be labelled) image; its files may turn out to be missing or damaged."""

    name: str
    images: tuple[Path, ...]
    """One file per channel, or one file that holds all channels."""
    label: Path | None
    person: str
    """Whose image it is; cases of one person are never separated."""


@dataclass(frozen=True)
class Cohort:
    """The cases of one site, sorted by name."""

    root: Path
    cases: tuple[Case, ...]
    labels: dict[str, int] | None = None
    """Label names and values, if the folder tells."""
    channels: tuple[str, ...] | None = None
    """Names of the input channels, if the folder tells."""

    def subset(self, names: Iterable[str]) -> "Cohort":
        """The cases with these names.

        Raises:
            DataError: a name is not in the cohort.
        """
        wanted = set(names)
        unknown = wanted - {case.name for case in self.cases}
        if unknown:
            raise DataError(f"{self.root}: no case {sorted(unknown)[0]!r}; it has {len(self.cases)} cases")
        return replace(self, cases=tuple(case for case in self.cases if case.name in wanted))

    def persons(self) -> dict[str, tuple[Case, ...]]:
        """The cases of each person."""
        grouped: dict[str, list[Case]] = {}
        for case in self.cases:
            grouped.setdefault(case.person, []).append(case)
        return {person: tuple(cases) for person, cases in grouped.items()}


class PersonRule(Section):
    """Which cases belong to one person."""

    kind: Literal["case", "pairs", "pattern", "column"] = "case"
    """`case`: each its own person. `pairs`: by the last number in the name, 1 and 2 are a person, 3 and 4 the next.
    `pattern`: the group of a regular expression. `column`: looked up in a table."""
    pattern: str | None = None
    """For `pattern`: a regular expression with one group, such as `(sub-\\d+)`, searched in the case's name."""
    file: Path | None = None
    """For `column`: a `.csv` or `.tsv` file; a relative path starts at the cohort's folder."""
    case_column: str = "case"
    """For `column`: heading of the column with case names."""
    person_column: str = "person"
    """For `column`: heading of the column with persons."""

    @model_validator(mode="after")
    def _kind_has_what_it_needs(self) -> Self:
        if (self.kind == "pattern") != (self.pattern is not None):
            raise ValueError(f'`pattern` goes with kind = "pattern", got kind {self.kind!r}, pattern {self.pattern!r}')
        if (self.kind == "column") != (self.file is not None):
            raise ValueError(f'`file` goes with kind = "column", got kind {self.kind!r}, file {self.file}')
        if self.pattern is not None:
            try:
                groups = re.compile(self.pattern).groups
            except re.error as error:
                raise ValueError(f"pattern {self.pattern!r} is no regular expression: {error}") from None
            if groups != 1:
                raise ValueError(f"pattern {self.pattern!r} needs exactly one group in brackets, got {groups}")
        return self

    @classmethod
    def parse(cls, text: str) -> "PersonRule":
        """A rule from a command line: `case`, `pairs`, `pattern:REGEX` or `column:FILE[:CASE_COLUMN:PERSON_COLUMN]`.

        Raises:
            ConfigError: it is none of these.
        """
        kind, colon, rest = text.partition(":")
        fields: dict[str, Any] = {"kind": kind if kind in ("pattern", "column") or not colon else text}
        if kind == "pattern":
            fields["pattern"] = rest
        elif kind == "column":
            parts = rest.rsplit(":", 2) if rest.count(":") >= 2 else [rest]
            fields |= dict(zip(("file", "case_column", "person_column"), [Path(parts[0]), *parts[1:]], strict=False))
        try:
            return cls(**fields)
        except ValidationError as error:
            told = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ConfigError(
                f"person rule {text!r}: {told}; use case, pairs, pattern:REGEX or column:FILE[:CASE_COLUMN:PERSON_COLUMN]"
            ) from None

    def persons(self, names: Sequence[str], root: Path) -> dict[str, str]:
        """The person of each case name.

        Raises:
            DataError: a name does not fit the rule, or the table does not hold it.
        """
        if self.kind == "column":
            table = self._table(root)
            return {name: _look_up(table, name, root / (self.file or "")) for name in names}
        return {name: self._person(name) for name in names}

    def _person(self, name: str) -> str:
        if self.kind == "pairs":
            numbers = re.findall(r"\d+", name)
            if not numbers:
                raise DataError(f"case {name!r} has no number, so the person rule `pairs` cannot group it")
            return str((int(numbers[-1]) + 1) // 2)
        if self.kind == "pattern":
            found = re.search(self.pattern or "", name)
            if found is None or not found.group(1):
                raise DataError(f"case {name!r} does not match the person pattern {self.pattern!r}")
            return str(found.group(1))
        return name

    def _table(self, root: Path) -> dict[str, str]:
        path = root / (self.file or "")
        try:
            with path.open(encoding="utf-8-sig", newline="") as stream:
                rows = csv.DictReader(stream, delimiter="\t" if path.suffix == ".tsv" else ",")
                headings = list(rows.fieldnames or [])
                missing = [name for name in (self.case_column, self.person_column) if name not in headings]
                if missing:
                    raise DataError(f"{path}: no column {missing[0]!r}; its columns are {headings}")
                pairs = [
                    ((row[self.case_column] or "").strip(), (row[self.person_column] or "").strip()) for row in rows
                ]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path}: not a readable table: {error}") from error
        table: dict[str, str] = {}
        for case, person in pairs:
            if table.setdefault(case, person) != person:
                raise DataError(f"{path}: case {case!r} belongs to two persons, {table[case]!r} and {person!r}")
        return table


def read_cohort(path: Path, person: PersonRule | None = None) -> Cohort:
    """List the cases of a folder; files are not opened, so a bad case shows up in the audit, not here.

    Args:
        path: folder in one of the known layouts.
        person: which cases belong to one person; absent: each case is its own.

    Raises:
        DataError: the folder is none of the known layouts, or the person rule does not fit its names.
    """
    if not path.is_dir():
        raise DataError(f"{path}: no such folder")
    about = _about(path)
    listed = about.get("training")
    folders = [(path / images, path / labels) for images, labels in (("imagesTr", "labelsTr"), ("images", "labels"))]
    found = next((pair for pair in folders if pair[0].is_dir()), None)
    if isinstance(listed, list) and listed:
        files = _listed_cases(path, listed)
    elif found is not None:
        files = _cases_of_folders(*found)
    else:
        raise DataError(
            f"{path}: not a cohort. Right is a folder with dataset.json and its `training` list (Decathlon), "
            "with imagesTr/ and labelsTr/ (nnU-Net), or with images/ and labels/"
        )
    if not files:
        raise DataError(f"{path}: has no case; looked for .nii and .nii.gz files")
    persons = (person or PersonRule()).persons(sorted(files), path)
    cases = tuple(Case(name, *files[name], persons[name]) for name in sorted(files))
    return Cohort(path, cases, _label_names(about), _channel_names(about))


def split_by_person(cohort: Cohort, fraction: float, seed: int, minimum: int = 1) -> tuple[Cohort, Cohort]:
    """Hold out a share of the persons; the choice does not depend on the order of cases.

    Persons are ranked by a hash of seed and person, so one more person moves at most the border.

    Args:
        cohort: what to split.
        fraction: share of persons to hold out, in [0, 1).
        seed: of the ranking.
        minimum: persons to hold out at least, if `fraction` is positive; one person always remains.

    Returns:
        The rest and what is held out.
    """
    persons = cohort.persons()
    ranked = sorted(persons, key=lambda person: hashlib.sha256(f"{seed}:{person}".encode()).digest())
    count = min(max(int(fraction * len(ranked) + 0.5), minimum), len(ranked) - 1) if fraction > 0 else 0
    held = set(ranked[: max(count, 0)])
    return (
        replace(cohort, cases=tuple(case for case in cohort.cases if case.person not in held)),
        replace(cohort, cases=tuple(case for case in cohort.cases if case.person in held)),
    )


def list_images(path: Path) -> dict[str, tuple[Path, ...]]:
    """Images to be segmented, by name of case: one file, the files of a folder, or those of a cohort.

    Args:
        path: a NIfTI file; a folder of them, where `CASE_0000`, `CASE_0001`, ... are channels; or a cohort.

    Raises:
        DataError: there is no such path, or no image in it.
    """
    if path.is_file():
        return {_stem(path): (path,)}
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    if _niftis(path):
        return {name: images for name, (images, _) in _cases_of_folders(path, path / "labels").items()}
    return {case.name: case.images for case in read_cohort(path).cases}


Files = dict[str, tuple[tuple[Path, ...], Path | None]]


def _about(root: Path) -> dict[str, Any]:
    path = root / "dataset.json"
    if not path.is_file():
        return {}
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable JSON: {error}") from error
    if not isinstance(about, dict):
        raise DataError(f"{path}: must be a JSON object, got a {type(about).__name__}")
    return about


def _listed_cases(root: Path, listed: list[Any]) -> Files:
    """Cases of a Decathlon listing, whether or not their files exist."""
    pairs: dict[tuple[Path, ...], Path | None] = {}
    for entry in listed:
        image = entry.get("image") if isinstance(entry, dict) else None
        label = entry.get("label") if isinstance(entry, dict) else None
        if not isinstance(image, str) or not isinstance(label, str | None):
            raise DataError(f'{root / "dataset.json"}: training: needs {{"image": ..., "label": ...}}, got {entry!r}')
        if not Path(image).name.startswith("._"):
            pairs[_channel_files(root / image)] = root / label if label else None
    stems = [_case_stem(images[0]) for images in pairs]
    often = Counter(stems)
    files: Files = {}
    for stem, (images, label_path) in zip(stems, pairs.items(), strict=True):
        unique = stem if often[stem] == 1 else _name_with_folders(images[0], root)
        if unique in files:
            raise DataError(f"{root / 'dataset.json'}: training: two cases would be called {unique!r}")
        files[unique] = (images, label_path)
    return files


def _name_with_folders(path: Path, root: Path) -> str:
    folders = path.parent.relative_to(root) if path.is_relative_to(root) else path.parent
    return "_".join((*(part.strip("/") for part in folders.parts if part.strip("/")), _case_stem(path)))


def _channel_files(path: Path) -> tuple[Path, ...]:
    """The listed file or, as nnU-Net has it, the `_0000`, `_0001`, ... files that stand for it."""
    if not path.exists() and path.parent.is_dir():
        return _all_channels(path.parent.glob(f"{glob.escape(_stem(path))}_[0-9][0-9][0-9][0-9].nii*")) or (path,)
    return (path,)


def _all_channels(files: Iterable[Path]) -> tuple[Path, ...]:
    """Files `_0000`, `_0001`, ... in order; a missing one in between keeps its place, so that it is missed."""
    numbered = {int(match["channel"]): path for path in files if (match := _CHANNEL.fullmatch(_stem(path)))}
    if not numbered:
        return ()
    first = min(numbered)
    name, ending = _stem(numbered[first])[:-4], numbered[first].name.removeprefix(_stem(numbered[first]))
    return tuple(numbered.get(n, numbered[first].with_name(f"{name}{n:04d}{ending}")) for n in range(max(numbered) + 1))


def _cases_of_folders(images: Path, labels: Path) -> Files:
    """Cases of an image and a label folder; a label without image and the reverse are cases too."""
    label_files = {_stem(path): path for path in _niftis(labels)}
    image_files = _niftis(images)
    plain = any(_stem(path) in label_files for path in image_files)
    whole: dict[str, Path] = {}
    channels: dict[str, list[Path]] = {}
    for path in image_files:
        stem = _stem(path)
        numbered = _CHANNEL.fullmatch(stem)
        # A name such as scan_0007 is a case of its own, and not channel 7 of `scan`, where labels are called like it.
        if numbered and stem not in label_files and (numbered["case"] in label_files or not plain):
            channels.setdefault(numbered["case"], []).append(path)
        elif stem in whole:
            raise DataError(f"{images}: {whole[stem].name} and {path.name} are the same case; remove one")
        else:
            whole[stem] = path
    found = {name: _all_channels(paths) for name, paths in channels.items()} | {n: (p,) for n, p in whole.items()}
    return {name: (found.get(name, ()), label_files.get(name)) for name in {**found, **label_files}}


def _niftis(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.name.endswith((".nii", ".nii.gz")) and not p.name.startswith("."))


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


def _case_stem(path: Path) -> str:
    numbered = _CHANNEL.fullmatch(_stem(path))
    return numbered["case"] if numbered and numbered["channel"] == "0000" else _stem(path)


def _label_names(about: dict[str, Any]) -> dict[str, int] | None:
    """Names and values from Decathlon's `{"1": "liver"}` or nnU-Net's `{"liver": 1}`; None if it is neither."""
    named: dict[str, int] = {}
    entries = about.get("labels")
    for key, value in entries.items() if isinstance(entries, dict) else ():
        if isinstance(value, int):
            named[key] = value
        elif isinstance(value, str) and key.isdecimal():
            named[value] = int(key)
        else:
            return None
    return named or None


def _channel_names(about: dict[str, Any]) -> tuple[str, ...] | None:
    entries = about.get("channel_names") or about.get("modality")
    return tuple(str(name) for name in entries.values()) if isinstance(entries, dict) and entries else None


def _look_up(table: dict[str, str], name: str, path: Path) -> str:
    person = table.get(name)
    if not person:
        raise DataError(f"{path}: {'no person for' if name in table else 'no row for'} case {name!r}")
    return person
