"""Sphinx configuration: `make docs`."""

import re
from pathlib import Path

import absgd_jax

project = "absgd_jax"
version = release = absgd_jax.__version__
copyright = "The absgd_jax developers"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# The tutorials are run at every build. A cell that fails, fails the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True
nb_code_prompt_show = "Show the code of the figure"
nb_code_prompt_hide = "Hide the code of the figure"

html_theme = "furo"
html_title = "absgd_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"light_css_variables": {"code-font-size": "76%"}}  # 92 columns
copybutton_exclude = ".linenos, .gp, .go"
napoleon_google_docstring = True
autodoc_typehints = "none"
add_module_names = False


def unlink_outside(app, docname, source):
    """A link out of this folder leads out of the site: keep its text, drop the link. Pictures are copied."""
    page = Path(app.srcdir, docname)

    def keep(link):
        inside = (page.parent / link[2]).resolve().is_relative_to(app.srcdir)
        return link[0] if inside else link[1]

    source[0] = re.sub(r"(?<!!)\[([^\]]+)\]\((\.\./[^)#]*)[^)]*\)", keep, source[0])


def setup(app):
    app.connect("source-read", unlink_outside)
