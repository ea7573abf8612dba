"""JUnit files: what a continuous integration shows of a check."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from refmodels.files import replacing


@dataclass(frozen=True)
class TestCase:
    """One line of the file. `outcome` is empty where it passed; `message` says why it did not, `text` at more length."""

    __test__ = False  # no test of pytest's

    group: str
    name: str
    outcome: Literal["", "failure", "error", "skipped"] = ""
    message: str = ""
    text: str = ""
    seconds: float = 0.0


def write_junit(path: Path, suite: str, cases: Iterable[TestCase]) -> None:
    """Write the file: complete or not there."""
    root = ElementTree.Element("testsuite", name=_held(suite))
    counts = {"tests": 0, "failure": 0, "error": 0, "skipped": 0}
    for case in cases:
        counts["tests"] += 1
        names = {"classname": _held(case.group), "name": _held(case.name), "time": f"{case.seconds:.3f}"}
        element = ElementTree.SubElement(root, "testcase", names)
        if case.outcome:
            counts[case.outcome] += 1
            ElementTree.SubElement(element, case.outcome, message=_held(case.message)).text = _held(case.text) or None
    for outcome, label in (("tests", "tests"), ("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        root.set(label, str(counts[outcome]))
    with replacing(path) as beside:
        ElementTree.ElementTree(root).write(beside, encoding="utf-8", xml_declaration=True)


def _held(text: str) -> str:
    """With `?` for the characters that XML cannot hold."""
    return "".join(c if c in "\t\n" or " " <= c <= "\ud7ff" or "\ue000" <= c <= "\ufffd" or c > "\uffff" else "?" for c in text)
