"""A griffe extension: the roles of docstrings, as :meth:`step`, become links of Markdown.

A name is looked up as Python would: in the object itself, in what is around it, in the package.
"""

import re

import griffe

PACKAGE = "gradacc_kernels"
ROLE = re.compile(r":(?:attr|class|func|meth|mod):`([\w.]+)`")


class Roles(griffe.Extension):
    """Rewrites every docstring of the package, once all of it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_):
        """Walks the modules, classes and functions of the package."""
        if pkg.path == PACKAGE:
            self._walk(pkg, pkg)

    def _walk(self, item, package):
        if item.is_alias:
            return
        if item.docstring:
            text = item.docstring.value
            item.docstring.value = ROLE.sub(lambda role: _link(role[1], item, package), text)
        for member in getattr(item, "members", {}).values():
            self._walk(member, package)


def _link(name, item, package):
    """The link of a name as it is meant in the docstring of an object, or just the name in code."""
    first, *rest = name.split(".")
    scope = item
    while scope is not None and first not in scope.members:
        scope = scope.parent
    found = (scope or package).members.get(first)
    if found is None:
        return f"`{name}`"
    path = ".".join([found.target_path if found.is_alias else found.path, *rest])
    public = _public_path(path, package)
    return f"[`{name}`][{public}]" if public else f"`{name}`"


def _public_path(path, package):
    """The path of an object by a name in ``__all__`` of the package; None where it has none."""
    for name in map(str, package.exports or ()):
        member = package.members[name]
        inside = member.target_path if member.is_alias else member.path
        if path == inside or path.startswith(f"{inside}."):
            return f"{PACKAGE}.{name}{path.removeprefix(inside)}"
    return None
