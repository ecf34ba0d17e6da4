"""How the pages are built."""

import gradnorm_jax

project = "gradnorm_jax"
author = "The gradnorm_jax authors"
release = gradnorm_jax.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
html_theme = "furo"
html_title = "gradnorm_jax"
html_static_path = ["_static"]
exclude_patterns = ["_build"]
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
default_role = "code"
suppress_warnings = ["myst.xref_missing"]
