"""Counts operations and the bytes that they read and write, on any device; on torch's meta device without computing."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(TorchDispatchMode):
    """Counts the bytes that all operations read and write while it is active, as if there were no cache.

    Views and allocations count as zero. An operation reads its arguments and writes its results, or the arguments that
    it changes in place according to its schema.
    """

    FREE = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view"}

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.operations = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result, schema = func(*args, **kwargs), func._schema
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        if not view and schema.name.split("::")[1] not in self.FREE:
            given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
            changed = [given.get(a.name) for a in schema.arguments if a.alias_info and a.alias_info.is_write]
            fresh = result if not any(r.alias_info for r in schema.returns) else ()
            self.operations += 1
            read = {name: value for name, value in given.items() if name != "out"}
            self.bytes += sum(self.size(x) for x in tree_leaves((read, changed, fresh)))
        return result

    @staticmethod
    def size(x: object) -> int:
        return min(x.nbytes, x.untyped_storage().nbytes()) if isinstance(x, torch.Tensor) else 0
