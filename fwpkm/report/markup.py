"""HTML that is escaped unless it was made here."""

from __future__ import annotations

from html import escape

_VOID = {"img", "link", "meta", "source"}
_INLINE = {"a", "b", "cite", "code", "mark", "span", "strong"}
# Control characters cannot stand in HTML; each has a symbol (U+2400 and on) that can. A surrogate stands for a lost byte.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}
_VISIBLE |= {code: 0xFFFD for code in (*range(0x80, 0xA0), *range(0xD800, 0xE000))}


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(content: object) -> Markup:
    """Escape anything but :class:`Markup`."""
    return content if isinstance(content, Markup) else Markup(escape(str(content).translate(_VISIBLE)))


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element: children and attribute values are escaped; ``class_`` means ``class``, ``http_equiv`` ``http-equiv``."""
    words = [name]
    for key, value in attributes.items():
        if value is not None:
            words.append(f'{key.rstrip("_").replace("_", "-")}="{text(value)}"')
    tag = f"<{' '.join(words)}>"
    if name in _VOID:
        return Markup(f"{tag}\n")
    return Markup(f"{tag}{''.join(map(text, children))}</{name}>{'' if name in _INLINE else chr(10)}")
