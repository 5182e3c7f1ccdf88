"""Where the content of an entry comes from: its files, the adapter it is derived from, or those it is composed of."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager

from hydraserve.adapters.compose import Recipe
from hydraserve.adapters.derive import split_derived
from hydraserve.adapters.registry import AdapterEntry, Origin, Registry
from hydraserve.adapters.sources import Progress
from hydraserve.errors import AdapterConflictError
from hydraserve.server.lifecycle.contents import Contents
from hydraserve.server.lifecycle.reader import AdapterReader, Read
from hydraserve.server.lifecycle.served import label_of


class Origins:
    """Reads an entry's content, from wherever that is. What it is made of stays until it is made."""

    def __init__(self, registry: Registry, reader: AdapterReader, contents: Contents) -> None:
        self._registry, self._reader, self._contents = registry, reader, contents

    def open(self, entry: AdapterEntry, source: str, progress: Progress) -> AbstractAsyncContextManager[Read]:
        """The content of `entry` at `source`, as `AdapterReader.read` gives it. Raises what reading raises."""
        if entry.origin is Origin.DERIVED:
            return self._derive(entry, source)
        if (recipe := Recipe.parse(source)) is not None:
            return self._compose(recipe)
        # Only what the operator gave: over HTTP, the same name may be asked to come from anywhere else.
        return self._reader.read(source, progress, trusted=source == entry.given)

    def parts(self, source: str) -> list[str]:
        """Names of what `source` is composed of; nothing for other sources."""
        recipe = Recipe.parse(source)
        return [] if recipe is None else [name for name, _ in recipe.parts]

    def derived_from(self, name: str) -> list[str]:
        """Names of the adapters that are made from this one."""
        derived = [entry.name for entry in self._registry if entry.origin is Origin.DERIVED]
        return [other for other in derived if (split := split_derived(other)) is not None and split[0] == name]

    @asynccontextmanager
    async def _derive(self, entry: AdapterEntry, source: str) -> AsyncIterator[Read]:
        parent_name, _, spec = entry.name.rpartition("@")
        parent = self._contents.labelled(label_of(parent_name, source.partition("@")[0]))
        with parent.held():
            async with self._reader.derive(parent.stored, spec) as read:
                yield read

    @asynccontextmanager
    async def _compose(self, recipe: Recipe) -> AsyncIterator[Read]:
        current = self._contents.current
        names = [self.part(name).name for name, _ in recipe.parts]
        if missing := [name for name in names if name not in current]:
            raise AdapterConflictError(
                what=f"compose {missing[0]!r}",
                got="an adapter that has changed meanwhile",
                expected="one that is served",
            )
        with ExitStack() as held:
            for name in names:
                held.enter_context(current[name].held())
            async with self._reader.compose(recipe, [current[name].stored for name in names]) as read:
                yield read

    def part(self, name: str) -> AdapterEntry:
        """One of them. Raises UnknownAdapterError, and AdapterConflictError for one that is composed itself."""
        entry = self._registry.get(name)
        if Recipe.parse(entry.source) is not None:
            raise AdapterConflictError(
                what=f"compose {name!r}",
                got="an adapter that is composed itself",
                expected="adapters that were read from files",
                fix="compose its parts directly",
            )
        return entry
