"""mkdocs hooks: what the pages of docs/ have for readers on GitHub, made fit for the site.

A link to a file outside of docs/, as [train_lm.py](../examples/train_lm.py), becomes its text: the
site has no such file. CHANGELOG.md becomes a page. A link to a file that does not exist is a
warning, by which ``mkdocs build --strict`` fails.
"""

import logging
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)[^)]*\)")
_log = logging.getLogger("mkdocs.hooks.docs")


def on_files(files, config):
    """Adds the changelog to the pages."""
    text = (ROOT / "CHANGELOG.md").read_text()
    files.append(File.generated(config, "changelog.md", content=text))
    return files


def on_page_markdown(markdown, page, **_):
    """Replaces links that leave docs/ by their text, and the path."""

    def text_of(link):
        text, path = link.groups()
        if not (ROOT / path).exists():
            _log.warning("%s: no such file: ../%s", page.file.src_path, path)
        return text if text.strip("`") == path else f"{text} (`{path}`)"

    return OUTSIDE.sub(text_of, markdown)
