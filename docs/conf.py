"""Sphinx configuration: `make docs`."""

import absgd_jax

project = "absgd_jax"
version = release = absgd_jax.__version__
copyright = "The absgd_jax developers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # links to READMEs lead out of the site; the tests check all links
html_theme = "furo"
html_title = "absgd_jax"
napoleon_google_docstring = True
autodoc_typehints = "none"
add_module_names = False
exclude_patterns = ["_build"]
