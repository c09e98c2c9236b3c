"""Hooks of mkdocs: documents that lie outside docs/, links to them, and fragments as GitHub makes them.

A document keeps its path in the site, but for two: those of docs/ are at its top, and docs/README.md is pages.md, because the
README of the repository is the first page.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\[[^\]]*\]\()([^)\s]+)(\))")
SHOWN = (".md", ".svg", ".png")  # what may be linked from outside docs/; any other link there fails the build


def place(path: str) -> str:
    """Where a file of the repository is in the site."""
    return "pages.md" if path == "docs/README.md" else path.removeprefix("docs/")


def targets(path: str):
    """Files of the repository that a document links to."""
    for _, link, _ in LINK.findall((ROOT / path).read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:|#", link):
            yield posixpath.normpath(posixpath.join(posixpath.dirname(path), link.partition("#")[0]))


def shown(path: str) -> bool:
    return path.endswith(SHOWN) and (ROOT / path).exists()  # mkdocs warns of what does not exist


def outside() -> list[str]:
    """Documents and pictures outside docs/ that can be reached by links."""
    reached = ["README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]
    for path in reached:  # which grows
        if path.endswith(".md"):
            reached += [target for target in dict.fromkeys(targets(path)) if shown(target) and target not in reached]
    return [path for path in reached if not path.startswith("docs/")]


def slug(heading: str, separator: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", separator)


def on_config(config):
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug
    return config


def on_files(files, config):
    files.remove(files.get_file_from_path("README.md"))
    for path in ("docs/README.md", *outside()):
        files.append(File.generated(config, place(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    path = Path(page.file.abs_src_path).relative_to(ROOT).as_posix()

    def moved(found):
        link, sharp, fragment = found[2].partition("#")
        if not link or re.match(r"[a-z]+:", link):
            return found[0]
        target = place(posixpath.normpath(posixpath.join(posixpath.dirname(path), link)))
        return found[1] + posixpath.relpath(target, posixpath.dirname(place(path)) or ".") + sharp + fragment + found[3]

    return LINK.sub(moved, markdown)
