"""Sphinx: the pages are Markdown (MyST), the reference comes from the code, measured numbers from numbers.json."""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS / "ext"), str(DOCS.parent)]

import gptq_reference  # noqa: E402

from gptq.version import __version__  # noqa: E402

project, author, project_copyright = "gptq", "the gptq authors", "the gptq authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "ext"]
smartquotes = False  # they would turn -- and ' of commands into other characters

myst_enable_extensions = ["substitution", "deflist"]
myst_heading_anchors = 3
myst_substitutions = gptq_reference.substitutions()

nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!gptq\.).*")]  # torch and transformers have no pages here
autodoc_typehints = "none"  # signatures fit a phone; types stand in the text
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"

html_theme = "furo"
html_title = f"gptq {__version__}"
html_static_path = ["_static"]
html_css_files = ["gptq.css"]
html_show_sphinx = False
html_copy_source = False

GENERATED = DOCS / "_build" / "generated"
GENERATED.mkdir(parents=True, exist_ok=True)
for name in ("commands", "options"):
    (GENERATED / f"{name}.md").write_text(getattr(gptq_reference, name)(), encoding="utf-8")
