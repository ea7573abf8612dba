"""Where the parameters of a model are: on the host, at an accelerator, or on both sides.

A tree that nobody but the model holds moves: an accelerator that can `take` it packs leaf after leaf and keeps the only copy,
from which the host's arrays come back by `unload`. A tree that somebody else may hold stays on the host as it is, and the
accelerator has what `load` makes of it. Several threads may ask at once: what is moved is moved once, under a lock.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from refmodels.accelerator import Accelerator, AcceleratorError
from refmodels.op import Array, Params
from refmodels.parameters import copy_containers, flatten


class Form(NamedTuple):
    """What a leaf is on the host."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class Leaves(Mapping[str, Array]):
    """The host's arrays of a tree by path, and their `forms`, for which no array is touched."""

    def __init__(self, forms: dict[str, Form], read: Callable[[str], Array]) -> None:
        self.forms = forms
        self._read = read

    def __getitem__(self, path: str) -> Array:
        return self._read(path)

    def __contains__(self, path: object) -> bool:
        return path in self.forms

    def __iter__(self) -> Iterator[str]:
        return iter(self.forms)

    def __len__(self) -> int:
        return len(self.forms)

    def close(self) -> None:
        """Hold no arrays any more."""

        def closed(path: str) -> Array:
            raise RuntimeError(f"{path} is read after the block of leaves()")

        self._read = closed


@dataclass(frozen=True)
class _State:
    """Where everything is. A change puts another object in its place, so that who reads one sees one moment."""

    host: Params | None = None
    shared: bool = False
    """Whether somebody else may hold arrays of the host's tree."""

    accelerator: Accelerator | None = None
    device: Params | None = None
    forms: dict[str, Form] = field(default_factory=dict)
    """Of the host's leaves, where the accelerator has taken them."""

    lost: str = ""
    """What was interrupted on the way from one place to another."""


class Placement:
    """The parameters of one model. Before any are drawn or put here, it is `empty`."""

    def __init__(self) -> None:
        self._state = _State()
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:  # a copy has the host's tree; a lock cannot be copied
        with self._lock:
            return {"_state": _State() if self.empty else replace(_State(), host=self._brought()[0], shared=True)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__ |= state

    @property
    def empty(self) -> bool:
        """Whether there are no parameters yet."""
        state = self._state
        return state.host is None and state.device is None and not state.lost

    def put(self, tree: Params, *, shared: bool) -> None:
        """From now on these are the parameters. `shared` says whether somebody else may hold arrays of the tree."""
        with self._lock:
            self._state = _State(host=tree, shared=shared)

    def stream(self, tree: Params, forms: dict[str, Form], accelerator: Accelerator) -> None:
        """From now on these are the parameters, of these forms: a tree whose arrays are read as the accelerator takes them."""
        with self._lock:
            self._take(tree, forms, accelerator)

    def fill(self, draw: Callable[[], Params]) -> None:
        """If there are no parameters yet, those that `draw` gives."""
        with self._lock:
            if self.empty:
                self.put(draw(), shared=False)

    def shown(self) -> Params:
        """The host's tree, for somebody who may keep or change its arrays: from now on the host has one. An accelerator gets it
        anew at the next call, which so sees what was changed."""
        with self._lock:
            host, _ = self._brought()
            self._state = _State(host=host, shared=True)
            return host

    def array(self, path: str) -> Array:
        """The host's array of this path, for somebody who may keep it. That of a tree at an accelerator comes alone, and cannot
        be written to, which would change no parameter."""
        with self._lock:
            if self._checked().host is not None:
                found: Array = dict(flatten(self.shown()))[path]
                return found
            with self.leaves() as leaves:
                found = leaves[path]
            found.setflags(write=False)
            return found

    def on_host(self) -> Params:
        """The host's tree, to read in a call."""
        host = self._state.host
        if host is not None:
            return host
        with self._lock:
            host, shared = self._brought()
            self._state = _State(host=host, shared=shared)
            return host

    def at(self, accelerator: Accelerator, *, own: bool, check: Callable[[], None]) -> Params:
        """The tree as this accelerator wants it. The model's `own` accelerator may take it, another loads a copy; `check` is
        called before, and raises if that cannot be."""
        state = self._state  # read once: it may change at any time
        if state.accelerator is accelerator and state.device is not None:
            return state.device
        del state  # which would keep alive what is taken
        with self._lock:
            if self._state.accelerator is not accelerator:
                check()
                self.on_host()  # it may be at another accelerator
                if self._state.shared or not own or not self._taken(accelerator):
                    loaded = accelerator.load(self.on_host())
                    self._state = replace(self._state, accelerator=accelerator, device=loaded)
            device = self._state.device
        assert device is not None
        return device

    @contextmanager
    def leaves(self) -> Iterator[Leaves]:
        """The host's arrays, to read inside the block: nothing is taken meanwhile. Those of a tree at an accelerator come
        layer by layer, as they are asked for, and the tree stays there."""
        with self._lock:
            leaves = self._leaves()
            try:
                yield leaves
            finally:
                leaves.close()

    def paths(self) -> list[str]:
        """The path of every leaf, in the order of the tree. Moves nothing."""
        with self._lock:
            state = self._checked()
            return list(state.forms) if state.host is None else [path for path, _ in flatten(state.host)]

    def change(self, function: Callable[[Params], Params]) -> None:
        """Put what the function makes of the tree in its place; arrays that it passes on stay whose they were. If it fails,
        everything is as it was."""
        with self._lock:
            host, shared = self._brought()
            self._state = _State(host=function(host), shared=shared)

    def given_away(self, purpose: str) -> tuple[dict[str, Array], bool]:
        """Every leaf by path, and whether somebody else may hold them: no reference is kept here, so that the caller can
        replace one after the other. Until another tree is put here there are no parameters: they are not drawn at random
        again if `purpose` is interrupted, but asking for them says so."""
        with self._lock:
            state, self._state = self._checked(), _State(lost=purpose)
            if state.host is not None:
                return dict(flatten(state.host)), state.shared
            accelerator, forms, tree = state.accelerator, state.forms, copy_containers(state.device)
            del state  # so that each leaf at the accelerator can go when it is unloaded
            return dict(flatten(_unloaded(accelerator, tree, forms))), False

    def _leaves(self) -> Leaves:
        state = self._checked()
        if state.host is None:
            return Leaves(state.forms, _Reader(state))
        found = dict(flatten(state.host))
        forms = {path: Form(np.shape(leaf), np.asarray(leaf).dtype) for path, leaf in found.items()}
        return Leaves(forms, found.__getitem__)

    def _checked(self) -> _State:
        """The state, if there are parameters."""
        if self._state.lost:
            raise RuntimeError(
                f"the parameters are lost: {self._state.lost} did not come to its end; load the model again, or assign params"
            )
        return self._state

    def _brought(self) -> tuple[Params, bool]:
        """The host's tree, from the accelerator if need be, and whether it is shared. Changes nothing here."""
        state = self._checked()
        if state.host is not None:
            return state.host, state.shared
        return _unloaded(state.accelerator, copy_containers(state.device), state.forms), False

    def _taken(self, accelerator: Accelerator) -> bool:
        """Let the accelerator take the host's tree; whether it does that."""
        tree = copy_containers(self._state.host)
        return self._take(tree, {path: Form(leaf.shape, leaf.dtype) for path, leaf in flatten(tree)}, accelerator)

    def _take(self, tree: Params, forms: dict[str, Form], accelerator: Accelerator) -> bool:
        self._state = _State(lost=f"moving them to accelerator {accelerator.name!r}")
        device = accelerator.take(tree)
        if device is None:
            self._state = _State(host=copy_containers(tree))
            return False
        self._state = _State(accelerator=accelerator, device=copy_containers(device), forms=forms)
        return True


class _Reader:
    """Gives the host's arrays of a tree at an accelerator by path. A layer comes as a whole, and stays until another does."""

    def __init__(self, state: _State) -> None:
        self._state = state
        self._prefix: str | None = None
        self._leaves: dict[str, Array] = {}

    def __call__(self, path: str) -> Array:
        if path not in self._state.forms:
            raise KeyError(path)
        keys = path.split(".")
        # The least that can be unloaded by itself: a layer, which stands in a list, or outside of any the leaf's dictionary.
        keys = keys[: next((place + 1 for place, key in enumerate(keys) if key.isdigit()), len(keys) - 1)]
        prefix = "".join(f"{key}." for key in keys)
        if prefix != self._prefix:
            self._prefix, self._leaves = None, {}
            part: Any = self._state.device
            for key in keys:
                part = part[int(key) if isinstance(part, list) else key]
            forms = {path.removeprefix(prefix): form for path, form in self._state.forms.items() if path.startswith(prefix)}
            unloaded = _unloaded(self._state.accelerator, copy_containers(part), forms)
            self._prefix, self._leaves = prefix, dict(flatten(unloaded, prefix))
        return self._leaves[path]


def _unloaded(accelerator: Accelerator | None, tree: Params, forms: dict[str, Form]) -> Params:
    """What the accelerator gives back of this tree, which is its own to take apart: leaves of these forms."""
    assert accelerator is not None
    host = accelerator.unload(tree)
    if host is None:
        raise AcceleratorError(f"accelerator {accelerator.name!r} takes parameters, but does not unload them")
    found = dict(flatten(host))
    for path in [*forms, *found]:
        leaf, form = found.get(path), forms.get(path)
        if not isinstance(leaf, np.ndarray) or form != (leaf.shape, leaf.dtype):
            got = "nothing" if leaf is None else f"{type(leaf).__name__} {getattr(leaf, 'shape', '')}"
            wanted = "nothing" if form is None else f"an array {form.shape} of {form.dtype}"
            raise AcceleratorError(f"accelerator {accelerator.name!r} unloads {path} as {got}, wanted {wanted}")
    return host
