"""Option dataclasses from a user's keywords, with errors that help."""

import difflib
from dataclasses import fields
from typing import TypeVar

from huggingface_hub.errors import StrictDataclassError

Options = TypeVar("Options")


def make_options(options_class: type[Options], kind: str, options: dict, also_known: tuple[str, ...] = ()) -> Options:
    """
    Make an `options_class(**options)`.

    Args:
        options_class: a strict dataclass.
        kind: what its options are called in errors, such as "gate".
        options: by name.
        also_known: other valid names, which errors may suggest.

    Raises:
        ValueError: for an option that does not exist (with the nearest known one), and for a value of the wrong type
            or outside its range.
    """
    own = [field.name for field in fields(options_class)]  # type: ignore[arg-type]  # a dataclass
    known = [*also_known, *own]
    for name in options:
        if name not in own:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean `{near[0]}`?" if near else f"Known options: {', '.join(known)}."
            raise ValueError(f"Unknown {kind} option `{name}`. {hint}")
    try:
        return options_class(**options)
    except StrictDataclassError as error:
        raise ValueError(f"Bad {kind} option: {error.__cause__ or error}") from error
