"""The configurations that workers run under: the one in force, and what is left of those before it."""

from __future__ import annotations

__all__ = ["Generations"]

import os
from collections.abc import Iterable, Mapping

from supervisor.config import Settings, load
from supervisor.core.budget import Terms
from supervisor.errors import ConfigError, Problem
from supervisor.sources import Sources

_FOR_LIFE = ("name", "runtime_dir", "listen")


class Generations:
    """Every generation with workers, by number. Owned by the loop's thread; decides nothing.

    Args:
        settings: of the first generation, which is in force.
    """

    def __init__(self, settings: Settings) -> None:
        self.source = settings.source
        self.last = 1  # the newest there is or was
        self.in_force = 1
        self._settings = {1: settings}
        self._sources = {1: Sources(settings.supervisor.path)}

    @property
    def settings(self) -> Settings:
        """The configuration in force."""
        return self._settings[self.in_force]

    def __getitem__(self, generation: int) -> Settings:
        return self._settings[generation]

    def all(self) -> Iterable[Settings]:
        """Return the configurations of all generations."""
        return self._settings.values()

    # --- what the file says now ------------------------------------------------------------------

    def reread(self) -> tuple[Settings, list[Problem]]:
        """Return what the file holds now, and what of it only a new supervisor could take.

        Raises:
            ConfigError: the file is wrong.
        """
        from supervisor.imports import check_entry_points

        before = self.settings.supervisor
        settings = load(self.source, env=os.environ, uid=os.geteuid())
        problems = check_entry_points(settings)
        problems += [
            settings.problem(
                ("supervisor", key), "is for the whole life of a supervisor: restart it"
            )
            for key in _FOR_LIFE
            if getattr(settings.supervisor, key) != getattr(before, key)
        ]
        problems += [
            settings.problem(
                ("workers", name, "before"), "cannot change in a reload: give it another name"
            )
            for name, group in settings.groups.items()
            if any(
                name in known.groups and known.groups[name].before != group.before
                for known in self.all()
            )
        ]
        return settings, problems

    def refused(self, *problems: Problem) -> ConfigError:
        """Return why the file is not taken."""
        return ConfigError(self.source, list(problems))

    def doubt_about_code(self, folders: Iterable[str] | None) -> str:
        """Return why the code on disk may be another one than runs; "" when it is the same.

        Args:
            folders: where the modules in force came from; None where that is not known.
        """
        if folders is None:
            return "workers import code that their template does not know"
        return self._sources[self.in_force].doubt(folders)

    # --- from one to the next ----------------------------------------------------------------------

    def replace(self, settings: Settings) -> Settings:
        """Have the generation in force run under other settings; return those before."""
        before, self._settings[self.in_force] = self.settings, settings
        return before

    def add(self, settings: Settings) -> None:
        """Take a new generation, of which there are no workers yet. It is not in force."""
        self.last += 1
        self._settings[self.last] = settings
        self._sources[self.last] = Sources(settings.supervisor.path)

    def retire(self, generation: int) -> None:
        """Forget a generation that no worker will be spawned from any more."""
        del self._settings[generation], self._sources[generation]

    def budget_terms(self, counts: Mapping[str, int]) -> dict[str, Terms]:
        """Return what each budget has to do for, in all generations that there are.

        Args:
            counts: of groups that were scaled since the configuration in force was read.
        """
        terms = self.settings.budget_terms(counts)
        for settings in self.all():
            if settings is not self.settings:
                for pool, others in settings.budget_terms().items():
                    terms[pool] = terms[pool].joined(others) if pool in terms else others
        return terms
