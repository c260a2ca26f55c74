"""HTML that is escaped unless it was made here."""

from __future__ import annotations

from html import escape

_VOID = {"img", "link", "meta", "source"}
_INLINE = {"a", "b", "cite", "code", "mark", "span", "strong"}
# Control characters cannot stand in HTML; most have a symbol that can. Surrogates are bytes that were not UTF-8.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}
_VISIBLE |= dict.fromkeys((*range(0x80, 0xA0), *range(0xD800, 0xE000)), 0xFFFD)


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def visible(content: str) -> str:
    """A string with symbols for the characters that cannot stand in HTML."""
    return content.translate(_VISIBLE)


def text(content: object) -> Markup:
    """Escape anything but :class:`Markup`."""
    return content if isinstance(content, Markup) else Markup(escape(visible(str(content))))


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element. Children and values of attributes are escaped; ``class_`` is class, ``aria_label`` aria-label."""
    words = [name]
    for key, value in attributes.items():
        if value is not None:
            words.append(f'{key.rstrip("_").replace("_", "-")}="{text(value)}"')
    tag = f"<{' '.join(words)}>"
    if name in _VOID:
        return Markup(f"{tag}\n")
    return Markup(f"{tag}{''.join(map(text, children))}</{name}>{'' if name in _INLINE else chr(10)}")
