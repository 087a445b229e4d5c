"""The HTML pages of results, from the templates of this package."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape


def rendered(template: str, **values: Any) -> str:
    """A page, with whatever stands in ``values`` escaped.

    Args:
        template: its file in ``benchmarks/templates``.
        **values: what the template calls by these names.
    """
    environment = Environment(
        loader=PackageLoader("benchmarks"),
        autoescape=select_autoescape(default=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
