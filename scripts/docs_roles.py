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
    scope = item
    while scope is not None:
        if name.split(".")[0] in scope.members:
            break
        scope = scope.parent
    path = f"{(scope or package).path}.{name}"
    is_public = _public_path(path, package)
    return f"[`{name}`][{is_public}]" if is_public else f"`{name}`"


def _public_path(path, package):
    """The name of an object as `__all__` of the package has it; None where that has none."""
    for public in package.exports or ():
        canonical = package[str(public)].canonical_path
        if path == canonical or path.startswith(canonical + "."):
            return f"{PACKAGE}.{public}{path[len(canonical) :]}"
        if path == f"{PACKAGE}.{public}" or path.startswith(f"{PACKAGE}.{public}."):
            return path
    return None
