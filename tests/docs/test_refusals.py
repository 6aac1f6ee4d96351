"""Every sentence with which Sire refuses something is read by a test: what nobody has read is likely to be wrong."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ["cdylib", *(f"crates/sire-{name}/src" for name in ("core", "control", "cuda", "driver-hooks", "ledger"))]

# What makes an error, or a warning, out of a sentence, and what a sentence is called that becomes one in the next line.
MAKERS = re.compile(
    r"(^|\b)(invalid|inactive|refused?|refusal|foreign|Refusal::new|Error::(new|other)|log::(warning|error)!)$"
)
NAMED = re.compile(r"let (mut )?(message|why|what|wrong)\b[^;]*$")
# Strings, comments and brackets of Rust; names with what calls them.
TOKEN = re.compile(
    r"""//[^\n]*|b?r(\#*)".*?"\1|b?"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.[^']*)'|[()\[\]{}]|[\w:.]+!?|.""", re.DOTALL
)
STRING = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)

# What no test can bring about, and why.
UNREAD = {
    "the engine's statistics are not JSON": "a bug in Sire",
    "a resume was neither started nor refused": "a bug in Sire",
    "a record of a backup does not fit its buffer": "a bug in Sire",
    "a backup that moves does not fit its buffer": "a bug in Sire",
    "a run has more pages than digests have room": "a bug in Sire",
    "slice {} has no module": "a bug in Sire",
    "did not come back into the reservation": "a bug in Sire",
    "no record of": "a bug in Sire",
    "nobody asks for that from outside": "a bug in Sire",
    "of a shared backup": "a kernel that takes memory back",
    "the margin of": "nobody is told; what is said instead names the missing bytes",
    "is of another version of Sire": "nobody is told; nothing is shared then",
    "no ordinary file": "the file of a device, which root alone can make",
    "could be registered": "a system without room for one more handler",
    "the thread of time slices had failed": "a bug in Sire",
    "there are too many regions": "four thousand million of them",
    "/proc does not show this process": "a system that Sire does not run on",
    "another part of the call has failed": "nobody is told; the other part's sentence is",
}


def plain(text: str) -> str:
    """Words with one blank between them, as they are in memory: without the source's line ends and stops."""
    words = re.sub(r"\\\n\s*", "", text).replace('\\"', '"').split()
    return " ".join(filter(None, (word.strip(":;,.()") for word in words)))


def product(text: str) -> str:
    """A Rust source without its own tests."""
    tests = re.compile(r"^#\[cfg\((?:all\()?test\b.*\]\n(?:#.*\n)*(?:pub )?mod \w+ \{", re.MULTILINE)
    return tests.split(text, maxsplit=1)[0]


def sentences(text: str) -> Iterator[str]:
    """The strings in a Rust source that errors are made of."""
    within: list[str] = []
    name = ""
    for token in TOKEN.finditer(text):
        word = token.group()
        if word.startswith("//") or word.isspace():
            continue
        if word in "([{":
            within.append(name)
        elif word in ")]}":
            del within[-1:]
        elif word.startswith(('"', 'b"')):
            named = NAMED.search(text[max(0, token.start() - 90) : token.start()])
            if named or any(MAKERS.search(each) for each in within):
                yield word.partition('"')[2][:-1]
        name = word if re.match(r"[\w.]", word) else ""


def windows(text: str, width: int = 3) -> Iterator[str]:
    """Each few words of a sentence that stand together, between what is put into it."""
    for part in re.split(r"\{[^{}]*\}", text):
        words = plain(part).split(" ")
        yield from (" ".join(words[at : at + width]) for at in range(len(words) - width + 1))


def strings(file: Path) -> Iterator[str]:
    text = file.read_text()
    if file.suffix == ".py":
        nodes = list(ast.walk(ast.parse(text)))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        constants = (node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in docstrings)
        yield from (value for value in constants if isinstance(value, str))
    else:
        yield from STRING.findall(text)


def raised(text: str) -> Iterator[str]:
    """The strings in a Python source that exceptions are made of."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and re.search(r"(Error|Refused)$", ast.unparse(node.func)) and node.args:
            yield said(node.args[0])


def said(node: ast.expr) -> str:
    """A text in a Python source, with {} for what is only known at run time."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "{}"


def rust_files() -> list[Path]:
    return [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.rs"))]


def rust_sources() -> list[Path]:
    return [file for file in rust_files() if not is_test(file)]


def sources() -> list[Path]:
    return rust_sources() + sorted((ROOT / "python-shim" / "src").rglob("*.py"))


def is_test(file: Path) -> bool:
    return "tests" in file.relative_to(ROOT).parts or file.name in {"tests.rs", "conformance.rs"}


@cache
def read_by_tests() -> str:
    """All strings of all tests."""
    folders = [ROOT / "tests", *ROOT.glob("crates/*/tests"), *ROOT.glob("crates/*/src")]
    files = [file for folder in folders for file in folder.rglob("*") if file.suffix in {".py", ".c", ".cpp", ".rs"}]
    found = [string for file in files if is_test(file) and file != Path(__file__) for string in strings(file)]
    own = [file.read_text() for file in rust_sources()]
    found += [string for text in own for string in STRING.findall(text.removeprefix(product(text)))]
    return "\n".join(map(plain, found))


def unread(file: Path) -> list[str]:
    text = file.read_text()
    found = raised(text) if file.suffix == ".py" else sentences(product(text))
    parts = ((sentence, list(windows(sentence))) for sentence in found)
    return [plain(sentence) for sentence, few in parts if few and not any(words in read_by_tests() for words in few)]


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(ROOT)))
def test_every_refusal_is_read(file: Path) -> None:
    found = [sentence for sentence in unread(file) if not any(plain(known) in sentence for known in UNREAD)]
    assert not found, f"a test should read what is said here: {found}"


def test_what_no_test_can_read_is_still_said() -> None:
    left = [sentence for file in sources() for sentence in unread(file)]
    assert [known for known in UNREAD if not any(plain(known) in sentence for sentence in left)] == []


def test_sentences_are_found() -> None:
    assert sum(len(list(sentences(product(file.read_text())))) for file in rust_sources()) > 220
    assert sum(len(list(raised(file.read_text()))) for file in sources() if file.suffix == ".py") > 200
    source = """
    // refused("not this: a comment")
    let message = format!("one {tag} \\
        of these", tag);
    other("neither this one");
    Err(Error::new(Status::Busy, "two of these")); invalid(format!("three {} of", names.join(", ")));
    """
    assert [plain(each) for each in sentences(source)] == ["one {tag} of these", "two of these", "three {} of", ""]
    assert list(windows("it cannot be {at:?} done now; or")) == ["it cannot be", "done now or"]
