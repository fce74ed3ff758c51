"""Structures followed token by token: the engine's `Constraint`, by llguidance and a model's tokenizer.

Masks are computed on a few threads of its own while the engine computes the next scores (llguidance needs no GIL for
them). Knows no engine, and no text but the tokenizer's.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from tokenizers import Tokenizer

from pipelines.engine import Bits, Constraint
from pipelines.grammar import compile_structure, refused, start
from pipelines.structure import Structure
from pipelines.vocabulary import Vocabulary

_NO_END = "<|no end|>"
_stack = threading.Lock()


class Constraints:
    """A model's. Its tokens are read once, in the background: 0.1 s for 49,152 of them, 1.1 to 2.3 s for 262,144.

    llguidance holds the GIL meanwhile, so this is begun where a model is loaded, and not by the first request.
    """

    def __init__(self, vocabulary: Vocabulary, eos_ids: Iterable[int], *, threads: int = 0) -> None:
        count = threads or max(1, min(8, (os.cpu_count() or 2) // 2))
        self._pool = ThreadPoolExecutor(count, "masks")
        self._tokenizer = self._pool.submit(_read, vocabulary, sorted(eos_ids))

    def __call__(self, structure: Structure) -> Constraint:
        """One request's, with its first mask computed. May take a second: not for the engine's thread."""
        tokenizer, no_end = self._tokenizer.result()
        return _deep(lambda: _Followed(start(tokenizer, compile_structure(structure)), no_end, self._pool))


class _Followed:
    """`no_end` is the id, in the matcher alone, that stands for the end of a model that has no id for it."""

    def __init__(self, matcher: LLMatcher, no_end: int | None, pool: ThreadPoolExecutor) -> None:
        self._matcher = matcher
        self._no_end = no_end
        self._pool = pool
        self._complete = False
        self._next: Future[Bits] = Future()
        self._next.set_result(self._compute())

    def mask(self) -> Bits:
        return self._next.result()

    def accept(self, token_id: int) -> None:
        """Waits for the mask before it: a matcher is asked by one thread at a time."""
        self._next.result()
        if not self._matcher.consume_token(token_id):
            raise refused(self._matcher.get_error())
        self._complete = self._matcher.is_stopped()
        if not self._complete:
            self._next = self._pool.submit(self._compute)
            if self._no_end is not None and not self._next.result().any():
                self._complete = True

    @property
    def complete(self) -> bool:
        return self._complete

    def _compute(self) -> Bits:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.int32)
        if self._matcher.is_error():
            raise refused(self._matcher.get_error())
        if self._no_end is not None:
            bits = bits.copy()
            bits.view(np.uint32)[self._no_end // 32] &= np.uint32(0xFFFFFFFF ^ 1 << self._no_end % 32)
        return bits


def _deep(make: Callable[[], _Followed]) -> _Followed:
    """In a thread with a deep stack: llguidance goes down a grammar by recursion, and an overflow ends the process."""
    made: Future[_Followed] = Future()

    def run() -> None:
        try:
            made.set_result(make())
        except Exception as error:
            made.set_exception(error)

    with _stack:
        before = threading.stack_size(256 << 20)  # of addresses: pages are had when they are touched
        try:
            threading.Thread(target=run, name="structure", daemon=True).start()
        finally:
            threading.stack_size(before)
    return made.result()


def _read(vocabulary: Vocabulary, eos_ids: list[int]) -> tuple[LLTokenizer, int | None]:
    ends = [token_id for token_id in eos_ids if vocabulary.token(token_id) is not None]
    size = len(vocabulary.tokens)
    no_end = None if ends else size  # one more token, which is this one's alone
    if vocabulary.merges:
        return LLTokenizer(TokenizerWrapper(_Plain(vocabulary, ends)), eos_token=ends or [size]), no_end
    text = vocabulary.tokenizer.to_str()
    if no_end is not None:
        tokenizer = Tokenizer.from_str(text)
        tokenizer.add_special_tokens([_NO_END])
        text = tokenizer.to_str()
    return LLTokenizer(text, eos_token=ends or [size]), no_end


class _Plain:
    """A vocabulary as llguidance's TokenizerWrapper takes one. Its own reader of tokenizer.json takes 6 s for 262,144
    tokens, and takes those for special that are added and stand in angle brackets: so do we."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, ends: list[int]) -> None:
        self._vocabulary = vocabulary
        self.tokens = vocabulary.bytes()
        self.special_token_ids = [token_id for token_id in vocabulary.added if self._is_special(token_id)]
        if not ends:
            ends = [len(self.tokens)]
            self.special_token_ids += ends
            self.tokens.append(_NO_END.encode())
        self.eos_token_id = ends[0]

    def _is_special(self, token_id: int) -> bool:
        token = self._vocabulary.token(token_id) or ""
        return token in self._vocabulary.special or (token.startswith("<") and token.endswith(">"))

    def __call__(self, text: str) -> list[int]:
        """Of bytes, which it is asked for first, it raises: what is text is spelt."""
        return self._vocabulary.spelt(text)
