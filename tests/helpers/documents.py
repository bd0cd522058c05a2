"""The documents for users and contributors: their code blocks, and the commands in them."""

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ("training", "dense", "cluster", "deployment", "benchmarks", "comparisons", "robustness", "evidence")
GUIDES = [ROOT / "README.md", *(ROOT / "docs" / f"{page}.md" for page in PAGES), ROOT / "CONTRIBUTING.md"]
RUNNERS = ("python", "accelerate launch", "torchrun", "sbatch", "pip install", "hf")
INLINE = rf"`((?:[A-Z_]+=\S+\s)*(?:{'|'.join(RUNNERS)})\s[^`]+)`"


@cache
def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def list_blocks(document: str, language: str) -> list[str]:
    """The contents of the code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", document, flags=re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """A command of a document.

    Attributes:
        source: the document's name.
        words: as a shell splits it, without variables set in front of it and without a comment.
        environment: these variables.
    """

    source: str
    words: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return shlex.join([*(f"{name}={value}" for name, value in self.environment), *self.words])


def list_commands(document: str, source: str = "") -> list[Command]:
    """The commands of all bash blocks, and those within sentences, in order; each part of `A && B` is one."""
    found = []
    for match in re.finditer(rf"^```(\w*)\n(.*?)^```|{INLINE}", document, flags=re.MULTILINE | re.DOTALL):
        language, block, inline = match.groups()
        if inline is not None:
            found += split_line(" ".join(inline.split()), source)
        elif language == "bash":
            lines = block.replace("\\\n", "").splitlines()
            found += [command for line in lines for command in split_line(line, source)]
    return found


def split_line(line: str, source: str) -> list[Command]:
    """The commands of a line of a shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|<>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    commands: list[list[str]] = [[]]
    for word in lexer:
        if word == "&&":
            commands.append([])
        else:
            commands[-1].append(word)
    return [separate_environment(words, source) for words in commands if words]


def separate_environment(words: list[str], source: str) -> Command:
    """The command of these words; NAME=VALUE in front of it are variables."""
    count = next((index for index, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), len(words))
    environment = tuple((name, value) for name, _, value in (word.partition("=") for word in words[:count]))
    return Command(source, tuple(words[count:]), environment)
