"""Rules about the files of the repository: no private data, and no dead links."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Paths of the machine on which a file was written, and notes on its origin, say nothing to a reader.
PRIVATE = re.compile(
    r"""(?<![\w.~}-])/(?:work|root|tmp/brief)[/]\w
      | \b(?:agent|assistant|coding)[ ]session
      | \b(?:developed|generated|written)[ ](?:by|with)[ ](?:an?[ ])?(?:agent|AI|LLM)s?\b
      | ^co-authored-by:[ ]
    """,
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
LINK = re.compile(r"\]\(([^()\s]+)\)")


def repository() -> list[Path]:
    """The files under version control, and those about to be; the documents alone outside a repository."""
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/**/*.md")]
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return sorted(documents)
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted({path for line in done.stdout.split("\0") if line and (path := ROOT / line).is_file()})


FILES = repository()
DOCUMENTS = [path for path in FILES if path.suffix == ".md"]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_no_file_speaks_of_the_machine_it_was_written_on() -> None:
    found = {name(path): PRIVATE.findall(path.read_text(encoding="utf-8", errors="replace")) for path in FILES}
    assert {file: words for file, words in found.items() if words} == {}


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", document.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(text)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_local_links_lead_somewhere(document: Path) -> None:
    for link in LINK.findall(CODE.sub("", document.read_text("utf-8"))):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        path = (document.parent / target).resolve() if target else document
        assert path.exists() and path.is_relative_to(ROOT), f"{name(document)} links to {link}"
        assert not anchor or path.suffix != ".md" or anchor in anchors(path), f"{name(document)} links to {link}"
