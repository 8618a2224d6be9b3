"""Words that prompts may not hold: a file of rules, matched on whole words of normalised text.

A file is UTF-8, a rule a line; ``#`` begins a comment. A rule is a word or phrase; alternatives are separated by commas, and
``+`` joins what must all be in the prompt, in any order::

    hentai
    sex scene, sex scenes
    child, children, kid, kids + nude, naked

Text is compared after Unicode's NFKC, without case, accents, punctuation and invisible characters. Words that mix letters with
digits, signs or another script's look-alikes (``n4ked``, ``$ex``) are read both as written and as what they look like, and
single letters in a row (``n a k e d``) also as one word. A rule never matches inside a longer word: ``ass`` is not in ``class``.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path

from archipel.errors import ArchipelError

PACKAGED = "blocklist.txt"  # beside this module
_MOST_BYTES = 4 << 20  # of a file
_WORD = re.compile(r"[^\W_]+")
_ACCENTS = re.compile("[\u0300-\u036f]")
_MIXED = re.compile(r"(?=.*[a-z])(?=.*[^a-z])")
# Signs in the place of a letter, where a letter or digit follows: not the ! that ends a sentence.
_SIGNS = ((re.compile(r"@(?=\w)"), "a"), (re.compile(r"\$(?=\w)"), "s"), (re.compile(r"(?<=\w)!(?=\w)"), "i"))
_LOOKS = str.maketrans("034579аеіорсухѕαεικορτυχ", "oeastgaeiopcyxsaeikoptux")
_ONES = ("i", "l")  # what a 1 can stand for


class Blocklist:
    """The rules of one file. Raises ArchipelError, naming the line, where it cannot be read as such."""

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self._phrases: dict[str, list[tuple[tuple[str, ...], int]]] = {}  # first word -> (words, group)
        self._rules: list[tuple[int, list[int]]] = []  # (line, groups of which one alternative each must be there)
        groups = 0
        for number, line in enumerate(text.splitlines(), 1):
            rule = line.partition("#")[0].strip()
            if not rule:
                continue
            needs = []
            for group in rule.split("+"):
                for alternative in group.split(","):
                    words = tuple(_WORD.findall(_plain(alternative)))
                    if not words:
                        raise ArchipelError(f"{name}, line {number}: a rule is words, such as: child, kid + naked")
                    self._phrases.setdefault(words[0], []).append((words, groups))
                needs.append(groups)
                groups += 1
            self._rules.append((number, needs))
        if not self._rules:
            raise ArchipelError(f"{name} holds no rule: give a word or phrase per line")

    @classmethod
    def read(cls, path: Path | None = None) -> Blocklist:
        """The rules of a file, or (None) the short list that comes with Archipel. Raises ArchipelError."""
        if path is None:
            return cls((resources.files("archipel.ensemble") / PACKAGED).read_text(encoding="utf-8"), "the blocklist")
        try:
            with path.open("rb") as file:
                data = file.read(_MOST_BYTES + 1)
            if len(data) > _MOST_BYTES:
                raise ArchipelError(
                    f"{path} has more than {_MOST_BYTES >> 20} MB: give a text file with a rule per line"
                )
            return cls(data.decode("utf-8-sig"), str(path))
        except UnicodeDecodeError as error:
            raise ArchipelError(f"{path} is not a text in UTF-8: give a file with a rule per line") from error
        except OSError as error:
            raise ArchipelError(f"the blocklist {path} cannot be read: {error.strerror or error}") from error

    def line(self, prompt: str) -> int | None:
        """The line of the first rule that ``prompt`` meets, else None."""
        found: set[int] = set()
        for words in _readings(prompt):
            for at, word in enumerate(words):
                for phrase, group in self._phrases.get(word, ()):
                    if tuple(words[at : at + len(phrase)]) == phrase:
                        found.add(group)
        return next((line for line, needs in self._rules if found.issuperset(needs)), None)


def _plain(text: str) -> str:
    """Compatible forms, case, accents and invisible characters taken away."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = _ACCENTS.sub("", unicodedata.normalize("NFD", text))
    return unicodedata.normalize("NFC", "".join(c for c in text if unicodedata.category(c) != "Cf"))


def _readings(prompt: str) -> Iterator[Sequence[str]]:
    """The words of a prompt, once as written, then as signs and digits look; each also with single letters joined."""
    plain = _plain(prompt)
    looking = plain
    for sign, letter in _SIGNS:
        looking = sign.sub(letter, looking)
    readings = [_WORD.findall(plain)]
    for one in _ONES:
        words = _WORD.findall(looking)
        readings.append([w.translate(_LOOKS).replace("1", one) if _MIXED.match(w) else w for w in words])
    for words in readings:
        yield words
        joined = _joined(words)
        if len(joined) < len(words):
            yield joined


def _joined(words: Sequence[str]) -> list[str]:
    """Runs of three and more single characters as one word."""
    found: list[str] = []
    run: list[str] = []
    for word in [*words, ""]:
        if len(word) == 1:
            run.append(word)
            continue
        found += ["".join(run)] if len(run) > 2 else run
        run = []
        found += [word] if word else []
    return found
