"""Sphinx's settings. `make docs` lays the sources out first (scripts/docs.py): links, pages of the root, reference."""

import itertools
import re

import sinkroute

project = "sinkroute"
author = "The sinkroute maintainers"
copyright = "The sinkroute maintainers"
version = release = sinkroute.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["conf.py"]
html_theme = "furo"
html_title = f"sinkroute {version}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
highlight_language = "text"  # what stands further in; examples are known by their >>>

myst_heading_anchors = 6
myst_enable_extensions = ["colon_fence"]
myst_links_external_new_tab = False
# A class's annotation `Config` or `Router` may be any of several; its link is then left out.
suppress_warnings = ["ref.python"]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_mock_imports = ["deepspeed", "megatron", "torchtitan"]
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def _as_rst(app, what, name, obj, options, lines):
    """Turn a docstring, which is plain text with `code`, into reStructuredText with the same look."""
    lines[:] = as_rst(lines)


def as_rst(lines: list[str]) -> list[str]:
    """Code is ``code``; what stands further in after a blank line, and columns, are kept as they are; the rest is text.

    >>> as_rst(["Sums of `x_E`, 2 * n:", "", "    a | b"])
    ['Sums of ``x_E``, 2 \\\\* n:', '', '::', '', '    a | b']
    >>> as_rst(["solve  a plan", "MoE    a layer"])
    ['::', '', '    solve  a plan', '    MoE    a layer']
    """
    out: list[str] = []
    base = None  # the indentation of the paragraph before; None after a heading such as "Args:", which napoleon reads
    for block, is_blank in _blocks(lines):
        if is_blank or any(line.lstrip().startswith(">>>") for line in block):
            out += block
            continue
        indentation = len(block[0]) - len(block[0].lstrip())
        if base is not None and indentation > base:
            out += [" " * base + "::", "", *block]
            continue
        if len(block) > 1 and all(re.search(r"\w {2,}\S", line) for line in block):
            out += ["::", "", *(f"    {line}" for line in block)]
            continue
        heading = re.fullmatch(r"\s*\w+:", block[0])
        base = None if heading else indentation
        out += _words("\n".join(block)).split("\n")  # code may go over the end of a line
    return out


def _blocks(lines):
    """Runs of lines that are blank, or are not."""
    return ((list(block), is_blank) for is_blank, block in itertools.groupby(lines, lambda line: not line.strip()))


def _words(text: str) -> str:
    parts = re.split(r"(`[^`]+`|(?<!\S)\*\w[^*]*\w\*)", text)
    return "".join(
        (f"`{part}`" if part.startswith("`") else part)
        if number % 2
        else re.sub(r"([*|])|(?<=\w)(_)(?!\w)", r"\\\1\2", part)
        for number, part in enumerate(parts)
    )


def _public(app, what, name, obj, *_):
    """Load what a module imports when it is first asked for: autodoc looks at what is there."""
    if what == "module":
        vars(obj).update({public: getattr(obj, public) for public in getattr(obj, "__all__", ())})


def setup(app):
    app.connect("autodoc-process-docstring", _public)
    app.connect("autodoc-process-docstring", _as_rst, priority=400)  # before napoleon
