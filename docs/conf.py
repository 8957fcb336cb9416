"""The tutorials, and the API reference from the docstrings: `make docs`."""

project = "memstudy"
author = "memstudy authors"
extensions = ["sphinx.ext.apidoc", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["api/modules.rst"]
html_theme = "furo"
html_title = "memstudy"
html_static_path, html_css_files = ["_static"], ["lines.css"]
html_theme_options = {"light_css_variables": {"code-font-size": "74%"}}  # 100 columns fit beside the contents
html_show_copyright = False

apidoc_modules = [
    {"path": "../memstudy", "destination": "api", "separate_modules": True, "module_first": True},
]
apidoc_automodule_options = {"members", "show-inheritance"}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# What a package gathers from its modules is documented where it is defined.
autodoc_default_options = {"exclude-members": "model_config, model_post_init", "ignore-module-all": True}
napoleon_google_docstring = False
napoleon_use_ivar = True
default_role = "code"
