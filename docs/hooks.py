"""MkDocs hooks: pages made from files outside docs/, and links to the repository."""

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

REPOSITORY = "https://github.com/softprompt/softprompt"
ROOT = Path(__file__).parent.parent
GENERATED = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "results.md": "benchmarks/RESULTS.md",
}
_LINK = re.compile(r"(\]\()(?!https?:|#|mailto:)([^)#\s]+)")

_log = logging.getLogger("mkdocs.hooks.repository")


def on_files(files, config):
    """Add the pages that are made from files outside docs/."""
    for page, source in GENERATED.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point links to files outside docs/ at the repository."""
    uri = page.file.src_uri
    source = GENERATED.get(uri, f"docs/{uri}")
    pages = {text: name for name, text in GENERATED.items()}

    def rewritten(match):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        if not (ROOT / target).exists():
            _log.warning("%s links to %s, which does not exist", source, match[2])
        if target in pages:
            target = f"docs/{pages[target]}"
        if not target.startswith("docs/") or not Path(target).suffix or target.endswith(".py"):
            return f"{match[1]}{REPOSITORY}/blob/main/{target}"
        here = posixpath.dirname(f"docs/{uri}")
        return match[1] + posixpath.relpath(target, here)

    return _LINK.sub(rewritten, markdown)
