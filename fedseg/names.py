"""Names that become folders, parts of certificates and labels of series."""

import re
from typing import Annotated

from pydantic import AfterValidator

LONGEST = 64
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{LONGEST - 1}}}")


def checked_name(name: str) -> str:
    """The name, if it is one.

    Raises:
        ValueError: it is not; says what one may hold.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            "a name may hold letters (a-z, A-Z, without accents), digits, '.', '_' and '-', no spaces; it begins with a letter "
            f"or a digit and has {LONGEST} characters at most"
        )
    return name


Name = Annotated[str, AfterValidator(checked_name)]
"""Of a study, a site or a method."""
