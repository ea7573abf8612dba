"""An accelerator that packs: every matrix is transposed into an object of its own, and lies in memory once.

Its arithmetic is the reference's, over the host bridge, so that its outputs are the reference's bits. `taken`, `loaded` and
`unloaded` count trees or parts; `most` is the most leaves that lay on both sides while a tree was taken.
"""

import threading
import weakref

import numpy as np

from refmodels.accelerator import Accelerator
from refmodels.parameters import copy_containers, flatten, replace_leaves


class Packed:
    """A matrix, transposed: nothing that NumPy takes."""

    __array_ufunc__ = None
    __array__ = None

    def __init__(self, matrix):
        self.transposed, self.shape, self.dtype = np.array(matrix.T, order="C"), matrix.shape, matrix.dtype

    def matrix(self):
        return np.array(self.transposed.T, order="C")


class Packing(Accelerator):
    """Packs matrices, and has a private entry in every attention."""

    def __init__(self, **options):
        super().__init__("packing", **options)
        self.taken = self.loaded = self.unloaded = self.most = 0
        self._counting_trees = threading.Lock()
        self.fail = None
        """What to raise when half of a tree is taken."""

    def load(self, params):
        with self._counting_trees:
            self.loaded += 1
        tree = replace_leaves(copy_containers(params), lambda leaf: Packed(leaf) if leaf.ndim == 2 else leaf)
        for layer in tree.get("layers", []):
            layer["self_attention"] = self._with_private(layer["self_attention"])
        return tree

    def _with_private(self, node):
        return {**node, "_query": [node["query"]["kernel"]]} if "query" in node else node

    def take(self, params):
        with self._counting_trees:
            self.taken += 1
        self._host = [weakref.ref(leaf) for _, leaf in flatten(params) if leaf.ndim == 2]
        self._done = 0
        self._take(params)
        return params

    def _take(self, node):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            if isinstance(node[key], dict | list):
                self._take(node[key])
            elif node[key].ndim == 2:
                packed = Packed(node[key])
                alive = sum(leaf() is not None for leaf in self._host)
                self.most = max(self.most, alive - (len(self._host) - self._done - 1))
                node[key] = packed
                self._done += 1
                if self.fail is not None and self._done > len(self._host) // 2:
                    raise self.fail
        if isinstance(node, dict):
            node.update(self._with_private(node))

    def unload(self, tree):
        self.unloaded += 1
        self._unload(tree)
        return tree

    def _unload(self, node):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            if isinstance(key, str) and key.startswith("_"):
                del node[key]
            elif isinstance(node[key], dict | list):
                self._unload(node[key])
            else:
                node[key] = node[key].matrix() if isinstance(node[key], Packed) else np.array(node[key])

    def asnumpy(self, x):
        return x.matrix() if isinstance(x, Packed) else x
