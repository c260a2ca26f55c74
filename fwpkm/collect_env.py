"""``python -m fwpkm.collect_env``: what a report of a bug needs to say of a machine, as text to paste."""

from fwpkm.compile import environment


def report() -> str:
    """A line a thing, between the fences of a block of code."""
    lines = environment().lines()
    width = max(map(len, lines))
    return "\n".join(["```text", *(f"{name:{width}}  {found}" for name, found in lines.items()), "```"])


if __name__ == "__main__":
    print(report())
