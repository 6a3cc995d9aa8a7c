"""`attend`: the only part of a block that mixes tokens. `dense` for one device; ring and all-to-all come here later."""
