"""An extension of griffe, for what our docstrings have and Markdown and griffe do not know.

``:func:`name``` becomes a link where that name has a page, and one entry for several arguments (``dtype, device: ...``)
becomes an entry for each.
"""

import re

import griffe

SEVERAL = re.compile(r"^( +)([*\w]+(?:, [*\w]+)+)(: .*\n(?:\1 +.*\n?)*)", re.MULTILINE)
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`([~.]?)([\w.]+)`")


class Roles(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        self._visit(pkg)

    def _visit(self, where: griffe.Object) -> None:
        if where.docstring:
            text = ROLE.sub(lambda match: self._link(where, *match.groups()), where.docstring.value)
            where.docstring.value = SEVERAL.sub(_one_by_one, text)
        for member in where.members.values():
            if not member.is_alias:
                self._visit(member)

    def _link(self, where: griffe.Object, short: str, name: str) -> str:
        shown = name.rpartition(".")[2] if short else name.removeprefix("randlora.")
        return f'<autoref identifier="{_meant(where, name)}" optional><code>{shown}</code></autoref>'


def _meant(where: griffe.Object, name: str) -> str:
    """The full name: what `name` is where it is written, in a class, its module or the package."""
    scope = where
    while scope is not None and not name.startswith("randlora."):
        try:
            found = scope[name] if name.split(".")[0] in scope.all_members else None
        except KeyError:
            found = None
        if found is not None:
            return found.canonical_path if found.is_alias else found.path
        scope = scope.parent
    return name


def _one_by_one(entry: re.Match) -> str:
    indent, names, text = entry.groups()
    if names.split(", ")[0].endswith(("Error", "Exception")):
        return entry[0]
    return "".join(f"{indent}{name}{text.rstrip()}\n" for name in names.split(", "))
