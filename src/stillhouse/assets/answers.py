"""How a worked answer states its result; what a data set's rows are checked for, and readers rely on."""

from __future__ import annotations

import re

_MARKED = re.compile(r"####[ \t]*(\S.*)")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*(\{|\S+)")


def final_answer(answer: str) -> str | None:
    """What follows the last `####`, else the content of the last `\\boxed{...}`; None where neither is there."""
    if marked := _MARKED.findall(answer):
        return str(marked[-1]).strip()
    found = list(_BOXED.finditer(answer))
    if not found:
        return None
    boxed = found[-1]
    if boxed.group(1) != "{":  # as in `\boxed 2`
        return boxed.group(1).rstrip("$.,")
    depth = 1
    for end in range(boxed.end(), len(answer)):
        depth += {"{": 1, "}": -1}.get(answer[end], 0)
        if depth == 0:
            return answer[boxed.end() : end]
    return None
