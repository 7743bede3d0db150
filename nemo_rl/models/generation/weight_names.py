"""The check that received weights belong to the model they are loaded into."""

from __future__ import annotations

from collections.abc import Collection

from nemo_rl.errors import WeightSyncError
from nemo_rl.utils.names import abbreviated


def check_weight_names(expected: Collection[str], received: Collection[str], tied: Collection[str] = ()) -> None:
    """Raise `WeightSyncError` unless the received tensors are exactly the model's parameters.

    Args:
        expected: Names of the model's parameters; tied parameters appear once.
        received: Names of the received tensors.
        tied: Other names of tied parameters. They may be received, too.
    """
    missing = [name for name in expected if name not in received]
    unknown = [name for name in received if name not in expected and name not in tied]
    if missing or unknown:
        raise WeightSyncError(
            f"the published weights are not this model's: missing {abbreviated(missing)}, "
            f"unknown {abbreviated(unknown)}"
        )
