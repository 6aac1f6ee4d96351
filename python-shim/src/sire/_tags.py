"""Tags on their way into C: text without NUL, not absurdly long. The library judges the rest."""

from __future__ import annotations

from ._errors import InvalidArgumentError

MAX_TAG_BYTES = 255


def encode_tag(tag: object) -> bytes:
    """``tag`` as the library takes it; `InvalidArgumentError` if C could not carry it whole."""
    if not isinstance(tag, str):
        raise InvalidArgumentError(f"a tag is a str such as 'model/weights', not {_kind(tag)}")
    if "\0" in tag:
        raise InvalidArgumentError(f"the tag {tag[:40]!r} contains a NUL character")
    try:
        encoded = tag.encode()
    except UnicodeEncodeError:
        raise InvalidArgumentError(f"the tag {tag[:40]!r} cannot be written as UTF-8") from None
    if len(encoded) > MAX_TAG_BYTES:
        raise InvalidArgumentError(
            f"the tag {tag[:40]!r}... has {len(encoded)} bytes; a tag has at most {MAX_TAG_BYTES}"
        )
    if not encoded:
        raise InvalidArgumentError("a tag is not empty; leave it out to mean everything")
    return encoded


def encode_selection(tag: object) -> bytes | None:
    """As `encode_tag`, where None means everything."""
    return None if tag is None else encode_tag(tag)


def is_within(tag: str, above: str | None) -> bool:
    """Whether ``tag`` is ``above`` or lies under it; everything lies under None."""
    return above is None or tag == above or tag.startswith(f"{above}/")


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"
