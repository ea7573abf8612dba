"""Weights on their way to a GPU: read as they are taken, and never all of them on both sides."""

import weakref
from functools import partial

import numpy as np
import pytest
from emulated import Emulated
from packing import Packing
from refmodels_cupy.accelerator import Cupy

from refmodels import OPTCausalLM
from refmodels.accelerator import AcceleratorError, Room
from refmodels.backbone import Backbone
from refmodels.parameters import Unread, flatten, stored_bytes


def test_an_unread_dictionary():
    made = []

    def leaf(name):
        made.append(name)
        return np.ones(2)

    def fresh():
        made.clear()
        return Unread({name: partial(leaf, name) for name in "abc"} | {"inner": Unread({"d": partial(leaf, "d")})})

    tree = fresh()
    assert list(tree) == ["a", "b", "c", "inner"]
    assert len(tree) == 4
    assert "z" not in tree
    assert tree.get("z") is None
    assert tree.pop("z", 7) == 7
    del tree["c"]
    assert made == []
    assert tree["a"] is tree["a"]
    assert tree.pop("b").tolist() == [1, 1]
    assert made == ["a", "b"]


@pytest.mark.parametrize(
    "everything",
    [dict, lambda tree: {**tree}, lambda tree: dict(tree.items()), lambda tree: dict(zip(tree, tree.values(), strict=True))],
)
def test_a_copy_of_an_unread_dictionary_is_read(everything):
    tree = Unread({"a": partial(np.ones, 2), "inner": Unread({"b": partial(pytest.fail, "read")})})
    copy = everything(tree)
    assert copy["a"] is tree["a"]
    assert copy["inner"] is tree["inner"]


@pytest.fixture
def preset(tmp_path):
    """As opt-125m in little: its table is by far the largest of its matrices."""
    model = OPTCausalLM.from_preset("opt_tiny_stdlib")
    model.save_to_preset(tmp_path / "preset")
    return tmp_path / "preset"


def watched(monkeypatch):
    """Host arrays that are read, and the most bytes of them that were alive at once."""
    alive, seen = [], {"read": 0, "most": 0}
    read = Backbone.read

    def watching(self, leaf):
        def noted(parameter):
            array = leaf(parameter)
            alive.append(weakref.ref(array))
            seen["read"] += 1
            seen["most"] = max(seen["most"], sum(ref().nbytes for ref in alive if ref() is not None))
            return array

        return read(self, noted)

    monkeypatch.setattr(Backbone, "read", watching)
    return seen


@pytest.mark.parametrize("form", ["plain", "int8", "int4"])
def test_weights_are_read_as_they_are_taken(monkeypatch, tmp_path, preset, form):
    model = OPTCausalLM.from_preset(preset)
    if form != "plain":
        model.quantize(form)
        model.save_to_preset(tmp_path / form)
        preset = tmp_path / form
    leaves = dict(flatten(OPTCausalLM.from_preset(preset).backbone.params))
    largest, everything = max(leaf.nbytes for leaf in leaves.values()), sum(leaf.nbytes for leaf in leaves.values())
    seen = watched(monkeypatch)
    loaded = OPTCausalLM.from_preset(preset, accelerator=Cupy(Emulated(tmp_path)))
    assert seen["read"] == len(leaves)
    assert seen["most"] <= largest + 0.1 * everything
    assert largest < 0.6 * everything
    with loaded.backbone.leaves() as back:
        assert all(back[path].tobytes() == leaf.tobytes() for path, leaf in leaves.items())


def test_an_accelerator_that_does_not_take_gets_what_was_read(preset):
    class Refusing(Packing):
        def take(self, params):
            return None

    refusing = Refusing()
    model = OPTCausalLM.from_preset(preset, accelerator=refusing)
    assert type(model.backbone.placement._state.host) is dict
    assert model.generate("import", max_new_tokens=2) == OPTCausalLM.from_preset(preset).generate("import", max_new_tokens=2)
    assert refusing.loaded == 1


def test_the_tree_of_an_accelerator_is_of_plain_dictionaries(preset):
    model = OPTCausalLM.from_preset(preset, accelerator=Packing())

    def types(node):
        children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        return {type(node)}.union(*map(types, children)) if children else {type(node)}

    assert Unread not in types(model.backbone.placement._state.device)


class Small(Packing):
    """Has room for so many bytes."""

    free = 0

    def room(self):
        return Room("a small device", self.free, 10**7)


def test_a_model_that_does_not_fit(preset):
    small = Small()
    model = OPTCausalLM.from_preset(preset, accelerator=small)
    backbone = model.backbone
    held = stored_bytes(backbone.parameters(), "float32")
    with pytest.raises(AcceleratorError) as caught:
        model.generate("import", max_new_tokens=2)
    said = str(caught.value)
    assert said.startswith(f"accelerator 'packing': the weights of {backbone.name} are ")
    assert "and a small device has 0 B of 10.0 MB free; they would be " in said
    for how in ('in bfloat16 (dtype="bfloat16")', 'in int8 (quantize("int8"))', 'in int4 (quantize("int4"))'):
        assert how in said
    assert (small.taken, small.loaded) == (0, 0)
    small.free = held // 2
    model.quantize("int8")
    assert len(model.generate("import", max_new_tokens=2)) > 0
    assert small.taken == 1
