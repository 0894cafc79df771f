"""The book of docs/ as a site: `make docs` writes it to site/.

Sphinx with MyST, which is CommonMark, so that a page reads the same on GitHub. furo loads nothing from another host,
and its search works without a server.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

project = "UMD"
author = "the authors of umd"
extensions = ["myst_parser", "sphinx_copybutton"]
html_theme = "furo"
html_title = "UMD"
html_copy_source = html_show_sourcelink = html_show_copyright = html_show_sphinx = False
html_theme_options = {"top_of_page_buttons": []}
html_static_path = ["static"]
html_css_files = ["book.css"]
myst_heading_anchors = 3  # as GitHub makes them
highlight_language = "none"
exclude_patterns = ["static"]

# What stands in the sidebar, in this order. Written here, for GitHub would show the directive in index.md as code.
CHAPTERS = {
    "Use it": ["start", "images", "sampling", "classify", "diffmae", "checkpoints", "questions"],
    "At scale": ["latents", "Cluster <cluster>", "several-gpus", "Evaluation <evaluation>"],
    "Speed": ["performance", "performance-gpu", "performance-data", "kernels", "kernel-design"],
    "Research": [
        "Method <method>",
        "reproduction",
        "results/paper",
        "Filling <results/filling>",
        "Recognition <results/recognition>",
        "Video <results/video>",
    ],
}


def add_chapters(app, name: str, source: list[str]) -> None:
    if name == "index":
        for caption, pages in CHAPTERS.items():
            lines = "\n".join(pages)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{lines}\n```\n"


def setup(app) -> None:
    app.connect("source-read", add_chapters)
