"""The settings of a run with their defaults and comments, as the source of the dataclasses has them."""

import inspect
import re
from typing import Any

FIELD = re.compile(r"    (\w+): (.+?) = (.+?)(?:  # (.*))?")


def describe(section: str, cls: Any) -> list[str]:
    """Two lines for each setting of a dataclass: how it is typed with its default, and what it means."""
    lines, comment = [], ""
    for line in inspect.getsource(cls).splitlines():
        if line.startswith("    # "):
            comment = f"{comment} {line.strip('# ')}".strip()
        elif (found := FIELD.fullmatch(line)) and not found[2].startswith("ClassVar"):
            name, kind, default, beside = found.groups()
            choices = ", ".join(re.findall(r'"([^"]+)"', kind)) if kind.startswith("Literal") else ""
            meaning = "; ".join(filter(None, (choices, comment, beside)))
            lines.append(f"  --config.{section}.{name}={default.strip(chr(34))}")
            lines += [f"      {meaning}"] if meaning else []
            comment = ""
        else:
            comment = ""
    return lines
