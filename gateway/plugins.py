"""Discover → validate → construct → order → compile. The only file that touches pluggy's manager.

Everything that can be wrong with a plugin is said at start-up, all at once, with the line of the YAML.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import hashlib
import importlib.metadata
import importlib.util
import inspect
import sys
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import pluggy
from pydantic import BaseModel, ConfigDict

from gateway import scoping
from gateway.dispatch import CompiledHooks, Impl
from gateway.hookspecs import PROJECT, Hooks
from gateway.settings import ConfigError, Problem, Source

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from gateway.kit.schema import Schema
    from gateway.services import Services
    from gateway.settings import PluginEntry, ServicesSettings, Settings

GROUP = "xenios.plugins"
GIVE_UP_SECONDS = 2.0  # for a lifespan that hangs to end once it is cancelled
CLOSE_SECONDS = 5.0  # for a plugin to close
SECTIONS = ("server", "log", "upstream", "upstreams", "catalogue", "services")
HOOKS = {f.name: getattr(Hooks, f.name) for f in fields(CompiledHooks)}


class NoConfig(BaseModel):
    """A plugin without settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A plugin of the YAML, validated and not yet constructed."""

    index: int
    id: str
    use: str
    cls: type[Any]
    config: BaseModel
    entry: PluginEntry
    version: str
    seen: tuple[Any, ...] = ()  # of the settings around it what it may have read, `reads_settings`

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal in two configurations: a reload carries the instance over, state and all."""
        return (self.cls, self.use, self.id, self.entry.when, self.entry.on_error, self.config, self.seen)


@dataclass(slots=True)
class Instance:
    """A constructed plugin and its lifespan, which runs in a task of its own."""

    blueprint: Blueprint
    plugin: Any
    users: int = 0
    _close: asyncio.Event | None = field(default=None, repr=False)
    _task: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def id(self) -> str:
        return self.blueprint.id

    async def open(self) -> None:
        """Enter the lifespan once, whoever asks first; counted. Raises what the plugin raises."""
        self.users += 1
        if self._task is not None or not hasattr(self.plugin, "lifespan"):
            return
        opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._close = asyncio.Event()
        task = asyncio.get_running_loop().create_task(self._live(opened, self._close), name=f"lifespan {self.id}")
        self._task = task
        try:
            await opened
        except BaseException:
            self.users -= 1
            self._task = None
            task.cancel()  # it hangs, and nobody waits any longer; else it has ended
            await asyncio.wait([task], timeout=GIVE_UP_SECONDS)
            raise

    def release(self) -> bool:
        """One user less. Was it the last? Then `close` is due."""
        self.users -= 1
        return self.users == 0

    async def close(self) -> None:
        """Leave the lifespan, within `CLOSE_SECONDS`. Raises what the plugin raises, or TimeoutError."""
        if self._task is None or self._close is None:
            return
        self._close.set()
        task, self._task = self._task, None
        done, _ = await asyncio.wait([task], timeout=CLOSE_SECONDS)
        if not done:
            task.cancel()
            await asyncio.wait([task], timeout=GIVE_UP_SECONDS)
            raise TimeoutError(f"it was not closed after {CLOSE_SECONDS:g} s")
        if task.cancelled():  # of something that it waited for: it has come to its end
            raise RuntimeError("its lifespan ended with a CancelledError")
        task.result()

    async def _live(self, opened: asyncio.Future[None], close: asyncio.Event) -> None:
        try:
            async with self.plugin.lifespan():
                if not opened.done():
                    opened.set_result(None)
                await close.wait()
        except BaseException as error:
            if opened.cancelled():
                return  # given up: what else it says is nobody's business
            if opened.done():
                if isinstance(error, Exception | asyncio.CancelledError):
                    raise
                raise RuntimeError(repr(error)) from error  # sys.exit() must not end the gateway
            opened.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))


# --- discover and validate ------------------------------------------------------------------------------------------


def schemas(blueprints: Sequence[Blueprint]) -> list[Schema]:
    """The tables that the plugins own, each once."""
    found = {schema.name: schema for b in blueprints if (schema := schema_of(b)) is not None}
    return list(found.values())


def schema_of(blueprint: Blueprint) -> Schema | None:
    """The tables that this plugin owns, as it is configured: `owns_tables(config)` of its class may say no."""
    schema: Schema | None = getattr(blueprint.cls, "schema", None)
    owns = getattr(blueprint.cls, "owns_tables", None)
    return None if schema is None or (owns is not None and not owns(blueprint.config)) else schema


def needs_database(blueprints: Sequence[Blueprint]) -> bool:
    """A plugin says so, or owns tables."""
    return any("database" in _required_services(b.cls) or schema_of(b) is not None for b in blueprints)


def read_plugins(settings: Settings, source: Source, classes: Mapping[str, type[Any]] | None = None) -> list[Blueprint]:
    """Load what the YAML lists, and nothing else; validate every config. Raises ConfigError with ALL problems.

    `classes`: what some `use` names stand for (a test's own plugins).
    """
    found, problems = read_entries(list(enumerate(settings.plugins)), source, classes, settings.services)
    if problems:
        raise ConfigError(problems)
    return [replace(b, seen=tuple(getattr(settings, name) for name in _sections(b.cls))) for b in found]


def _sections(cls: type[Any]) -> tuple[str, ...]:
    """The sections beside its own entry that a plugin's instance depends on; unless it says so, all."""
    return tuple(getattr(cls, "reads_settings", SECTIONS))


def read_entries(
    entries: Sequence[tuple[int, PluginEntry]],
    source: Source,
    classes: Mapping[str, type[Any]] | None = None,
    services: ServicesSettings | None = None,
) -> tuple[list[Blueprint], list[Problem]]:
    """The sound entries as blueprints, and what is wrong with the others. `entries`: (index in the YAML, entry).

    `services`: None where that section has mistakes of its own.
    """
    given = classes or {}
    points = installed()  # every installation's list is read for it: once, not for each entry
    problems: list[Problem] = []
    found: list[Blueprint] = []
    for index, entry in entries:
        where: tuple[str | int, ...] = ("plugins", index)
        try:
            cls, version = (
                (given[entry.use], "given") if entry.use in given else load(entry.use, source.base, source, points)
            )
        except LookupError as error:
            problems.append(source.problem((*where, "use"), str(error.args[0])))
            continue
        problems += [source.problem((*where, "use"), text) for text in faults_of(cls)]
        problems += [source.problem((*where, "use"), text) for text in _service_faults(cls, services)]
        problems += [source.problem((*where, "when"), text) for text in scoping.faults(entry.when, hooks_of(cls))]
        config_class = getattr(cls, "Config", NoConfig)
        if not (isinstance(config_class, type) and issubclass(config_class, BaseModel)):
            problems.append(source.problem((*where, "use"), "its Config is not a pydantic model."))
            continue
        config, mistakes = source.validate(config_class, (*where, "config"))
        problems += mistakes
        if config is not None:
            found.append(Blueprint(index, entry.id, entry.use, cls, config, entry, version))
    return found, problems + _order_problems(found, [entry for _, entry in entries], source)


def installed() -> dict[str, importlib.metadata.EntryPoint]:
    """Every plugin that is installed, by name; nothing is imported."""
    return {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}


def load(
    use: str,
    folder: Path,
    source: Source | None = None,
    points: Mapping[str, importlib.metadata.EntryPoint] | None = None,
) -> tuple[type[Any], str]:
    """The plugin's class and version; a file's as `source` has read it. Raises LookupError that says what to do."""
    if _is_file(use):
        return _load_file(use, source or Source("", folder))
    points = installed() if points is None else points
    point = points.get(use)
    if point is None:
        near = difflib.get_close_matches(use, points, 1)
        hint = f" Did you mean {near[0]!r}?" if near else f" Installed: {', '.join(sorted(points))}."
        raise LookupError(f"no plugin named {use!r} is installed.{hint}")
    try:
        cls = point.load()
    except (Exception, SystemExit) as error:
        raise LookupError(f"the plugin {use!r} can't be imported: {type(error).__name__}: {error}") from error
    return _class(cls, use), point.dist.version if point.dist else "?"


def _is_file(use: str) -> bool:
    return ".py" in use or use.startswith((".", "/"))


def file_of(use: str, folder: Path) -> Path | None:
    """The file that holds the plugin; None for an installed one."""
    return (folder / use.partition(":")[0]).resolve() if _is_file(use) else None


def _load_file(use: str, source: Source) -> tuple[type[Any], str]:
    """By its content: a reload takes up what was changed, and what wasn't is the same class as before."""
    name, _, attribute = use.partition(":")
    path = (source.base / name).resolve()
    try:
        code = source.read(path)
    except OSError:
        raise LookupError(f"there is no file {path}.") from None
    except ValueError:
        raise LookupError(f"{path} is not UTF-8.") from None
    digest = hashlib.sha256(f"{path}\0{code}".encode()).hexdigest()[:8]
    module_name = f"xenios_file_plugin_{digest}_{path.stem}"
    module = sys.modules.get(module_name)
    if module is None:
        spec = importlib.util.spec_from_file_location(module_name, path)
        if spec is None:
            raise LookupError(f"{path} is not a Python file.")
        module = importlib.util.module_from_spec(spec)
        # For good, 50 KB for each text: typing and pydantic look names up there, also for tasks that outlive a reload.
        sys.modules[module_name] = module
        try:
            # not by the loader: it would take compiled code of a change within the same second for the newest
            exec(compile(code, str(path), "exec", dont_inherit=True), module.__dict__)  # noqa: S102 - the operator's own plugin
        except (Exception, SystemExit) as error:
            del sys.modules[module_name]
            raise LookupError(f"{path} can't be imported: {type(error).__name__}: {error}") from error
    cls = getattr(module, attribute or "Plugin", None)
    if cls is None:
        raise LookupError(f"{path} has no class {attribute or 'Plugin'}.")
    return _class(cls, use), f"file {digest}"


def _class(cls: Any, use: str) -> type[Any]:
    if not isinstance(cls, type):
        raise LookupError(f"{use!r} is not a class.")  # noqa: TRY004 - all that can't be loaded is one error
    return cls


def hooks_of(cls: type[Any]) -> list[str]:
    """The hooks that a plugin class implements."""
    return [opts.get("specname") or name for name, _, opts in _marked(cls)]


def faults_of(cls: type[Any]) -> list[str]:
    """Everything that is wrong with a plugin class as a set of hook implementations, in words for its author."""
    faults: list[str] = []
    marked = _marked(cls)
    for name, function, opts in marked:
        hook = opts.get("specname") or name
        where = f"{cls.__name__}.{name}"
        spec = HOOKS.get(hook)
        if spec is None:
            near = difflib.get_close_matches(hook, HOOKS, 1)
            faults.append(f"{where}: there is no hook {hook!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
            continue
        if opts.get("hookwrapper") or opts.get("wrapper"):
            faults.append(f"{where}: hook wrappers are not supported; use around_upstream.")
        if opts.get("tryfirst") or opts.get("trylast"):
            faults.append(f"{where}: tryfirst and trylast are not supported; the YAML's order is the call order.")
        if inspect.iscoroutinefunction(function) is not inspect.iscoroutinefunction(spec):
            colour = "async def" if inspect.iscoroutinefunction(spec) else "def (not async)"
            faults.append(f"{where}: this hook must be written with {colour}.")
        wanted, given = _parameters(spec), _parameters(function)
        if wanted != given:
            faults.append(f"{where}: takes ({', '.join(given)}), must take ({', '.join(wanted)}).")
    names = {name for name, _, _ in marked}
    faults += [
        f"{cls.__name__}.{name}: has a hook's name but is not marked with @hookimpl."
        for name in HOOKS
        if name not in names and inspect.isfunction(getattr(cls, name, None))
    ]
    return faults


def _marked(cls: type[Any]) -> list[tuple[str, Any, dict[str, Any]]]:
    """(method name, function, hookimpl options) of each marked method."""
    out = []
    for name in dir(cls):
        function = inspect.getattr_static(cls, name)
        opts = getattr(function, f"{PROJECT}_impl", None)
        if opts is not None:
            out.append((name, function, dict(opts)))
    return out


def _parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def _required_services(cls: type[Any]) -> tuple[str, ...]:
    return tuple(getattr(cls, "requires_services", ()))


def _service_faults(cls: type[Any], services: ServicesSettings | None) -> list[str]:
    """Services that the plugin can't do without and that the settings don't give, and tables that can't be migrated."""
    faults: list[str] = []
    for name in _required_services(cls):
        if name not in {"redis", "database"}:
            faults.append(f"{cls.__name__}.requires_services: there is no service {name!r}; there are redis, database.")
        elif name == "redis" and services is not None and services.redis.get_secret_value() == "memory":
            faults.append(
                "it needs a Redis, and services.redis is memory: set services.redis to embedded or to an address "
                "such as redis://host:6379/0."
            )
    schema = getattr(cls, "schema", None)
    if schema is not None:
        try:
            _ = schema.head
        except (AttributeError, OSError, SyntaxError, ValueError) as error:
            faults.append(f"{cls.__name__}.schema: {error}")
    return faults


def _order_problems(found: Sequence[Blueprint], entries: Sequence[PluginEntry], source: Source) -> list[Problem]:
    """Duplicate ids, and `requires_before` that stands later or not at all."""
    problems: list[Problem] = []
    seen: set[str] = set()
    every = {entry.use for entry in entries}
    for blueprint in found:
        for wanted in getattr(blueprint.cls, "requires_before", ()):
            if wanted not in seen:
                place = "stands after it; move it up" if wanted in every else "is not in the list"
                text = f"{blueprint.id} needs {wanted} before it, which {place}."
                problems.append(source.problem(("plugins", blueprint.index), text))
        seen |= {blueprint.use, blueprint.id}
    return problems


# --- construct and compile -------------------------------------------------------------------------------------------


def construct(blueprints: Sequence[Blueprint], services: Services, carry: Sequence[Instance] = ()) -> list[Instance]:
    """Instances in YAML order; one of `carry` is used again where use, id and config are equal."""
    kept = {i.id: i for i in carry}
    out: list[Instance] = []
    for blueprint in blueprints:
        old = kept.get(blueprint.id)
        # compared, not hashed: a config may hold dicts
        if old is None or old.blueprint.identity != blueprint.identity:
            try:
                old = Instance(blueprint, blueprint.cls(blueprint.config, services.of(blueprint.id)))
            except (Exception, SystemExit) as error:
                raise PluginStartError(blueprint.id, "__init__", error) from error
        out.append(old)
    return out


class PluginStartError(Exception):
    """A plugin failed at start-up."""

    def __init__(self, plugin: str, where: str, error: BaseException) -> None:
        super().__init__(f"plugin {plugin}: {where} failed: {type(error).__name__}: {error}")
        self.plugin = plugin


def compile_hooks(instances: Sequence[Instance]) -> CompiledHooks:
    """Pluggy registers and validates; what runs later are frozen tuples in YAML order."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(Hooks)
    # pluggy calls the last registered first
    for instance in reversed(instances):
        manager.register(instance.plugin, name=instance.id)
    manager.check_pending()
    by_name = {instance.id: (index, instance) for index, instance in enumerate(instances)}
    chains: dict[str, tuple[Impl, ...]] = {}
    for hook in HOOKS:
        impls = [
            _impl(hook, *by_name[found.plugin_name], found.function)
            for found in reversed(getattr(manager.hook, hook).get_hookimpls())
        ]
        chains[hook] = tuple(reversed(impls) if hook == "request_finished" else impls)
    for instance in instances:
        manager.unregister(instance.plugin)  # it is a cycle of references, which would keep them long after a reload
    return CompiledHooks(**chains)


def _impl(hook: str, index: int, instance: Instance, function: Any) -> Impl:
    entry, cls = instance.blueprint.entry, instance.blueprint.cls
    default: Literal["fail", "ignore"] = getattr(cls, "on_error", "fail")
    return Impl(
        plugin=instance.id,
        hook=hook,
        call=function,
        on_error=entry.on_error or default,
        when=scoping.compile_when(entry.when),
        index=index,
        rewrites=bool(getattr(cls, "rewrites", False)),
        explicit=entry.on_error is not None or hasattr(cls, "on_error"),
    )


async def open_all(instances: Sequence[Instance], seconds: float | None = None) -> None:
    """Open in order; if one fails, or all take longer than `seconds`, those that are open are closed in reverse.

    Raises PluginStartError.
    """
    done: list[Instance] = []
    deadline = None if seconds is None else asyncio.get_running_loop().time() + seconds
    for instance in instances:
        limit = asyncio.timeout_at(deadline)
        try:
            async with limit:
                await instance.open()
        except BaseException as error:
            with contextlib.suppress(Exception):
                await close_all(done)
            if not isinstance(error, Exception):
                raise
            if limit.expired():
                error = TimeoutError(f"it was not open after {seconds:g} s")
            raise PluginStartError(instance.id, "lifespan", error) from error
        done.append(instance)


async def close_all(instances: Sequence[Instance]) -> list[tuple[str, Exception]]:
    """Close in reverse order those that nobody else uses, all of them; returns what failed."""
    failed: list[tuple[str, Exception]] = []
    for instance in [i for i in reversed(instances) if i.release()]:
        try:
            await instance.close()
        except Exception as error:  # noqa: BLE001 - the others must close too
            failed.append((instance.id, error))
    return failed
