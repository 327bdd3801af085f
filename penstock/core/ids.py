"""Distinct kinds of identifiers, so that one is never passed for another."""

from typing import NewType

RequestId = NewType("RequestId", str)
"""Chosen by the API side, unique among the requests in flight."""

SequenceId = NewType("SequenceId", int)
"""Given by the scheduler, never reused within one engine process."""

BlockId = NewType("BlockId", int)
"""Index of a block in the pool, `0 <= block_id < num_blocks`."""

TenantId = NewType("TenantId", str)
"""Who pays and who is limited; `DEFAULT_TENANT` where nobody logs in."""

ModelName = NewType("ModelName", str)
"""A name, alias or adapter that a client may write in `model`."""

DEFAULT_TENANT = TenantId("default")
