"""The tokenizers that a repository's own code takes from the hub by name, kept in its folder instead.

moondream2's code asks for one when its model is made. With these files beside it the folder is all that is needed.
Whoever pulls such a repository fetches each one's tokenizer.json to where `asked_for` says. Runs no code of the folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

_ASKED = re.compile(r"""\bTokenizer\.from_pretrained\(\s*["']([\w.-]+/[\w.-]+)["']""")


def asked_for(home: Path) -> dict[str, Path]:
    """The repositories whose tokenizer.json the code wants, and where in the folder each is."""
    sources = (file.read_text(encoding="utf-8", errors="replace") for file in sorted(home.glob("*.py")))
    names = {name for source in sources for name in _ASKED.findall(source)}
    return {name: home / f"tokenizer.{name.replace('/', '--')}.json" for name in sorted(names)}


@contextmanager
def from_folder(home: Path) -> Iterator[None]:
    """Meanwhile `Tokenizer.from_pretrained` finds these there; what the folder lacks it looks for as ever."""
    own = {name: file for name, file in asked_for(home).items() if file.exists()}
    usual = Tokenizer.from_pretrained

    def found(identifier: str, *args: Any, **kwargs: Any) -> Tokenizer:
        return Tokenizer.from_file(str(own[identifier])) if identifier in own else usual(identifier, *args, **kwargs)

    Tokenizer.from_pretrained = staticmethod(found)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tokenizer.from_pretrained = usual  # type: ignore[method-assign]
