"""Results on disk: a standard zarr v3 group, written shard by shard, each committed once, and read back by memory maps.

`format` is the bytes, `durable` how they reach the disk, `journal` what is known to be there, `writer` and `reader` the two
sides, `verify` the proof, `fingerprint` whose results they are, `work` what one block computes, `produce` the loop over blocks.
"""

from .reader import Store, open_store

__all__ = ["Store", "open_store"]
