"""What PyTorch is asked to do: operations counted, and those refused that make the host wait for the device."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select")


class Operations(TorchDispatchMode):
    """Counts the operations of a block by their names, such as `aten::mm`; views launch nothing and count as well."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()
        self.arguments: dict[str, Any] = {}  # of the last one of each name

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        self.counted[name] += 1
        self.arguments[name] = args
        self.look(name, args, kwargs or {})
        return function(*args, **kwargs or {})

    def look(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        """Called before each operation."""


class NoReads(Operations):
    """An operation whose result the host must see, or a copy from one device to another, is an error."""

    def look(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        if name in READS:
            raise AssertionError(f"{name} reads the device")
        if name == "aten::_to_copy" and kwargs.get("device") not in (None, args[0].device):
            raise AssertionError(f"{name} from {args[0].device} to {kwargs['device']}")
        if name == "aten::copy_" and args[0].device != args[1].device:
            raise AssertionError(f"{name} from {args[1].device} to {args[0].device}")
