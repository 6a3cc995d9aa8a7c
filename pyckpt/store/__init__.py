"""Stores: where the tiles of a streamed run live while they are not on the device.

`plan` says what there will be and its bytes; `interface` how tiles come and go; `memory` keeps them in the memory of
one device; `staged` moves them through a ring of device buffers, by the `lanes` that copy beside compute, from and to a
`backing`: pinned host memory or a scratch file; `mapped` lends a CPU the tiles of a scratch file where they are.
`kinds` are the stores that users choose from.
"""

from pyckpt.store.interface import OpenStore, Store
from pyckpt.store.kinds import STORES, DeviceStore, FileStore, HostStore, make_store, scratch_folder
from pyckpt.store.plan import Key, Plan, Slab

__all__ = [
    "STORES",
    "DeviceStore",
    "FileStore",
    "HostStore",
    "Key",
    "OpenStore",
    "Plan",
    "Slab",
    "Store",
    "make_store",
    "scratch_folder",
]
