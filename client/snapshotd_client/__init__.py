"""Bring a PyTorch training run back after a crash, from memory.

guard = snapshotd_client.protect(model, optimizer, job="llama-7b", extra={"scheduler": scheduler})
for step in range(guard.restore(), steps):
    ...
    guard.step()
guard.close()
"""

from snapshotd.errors import (
    ConfigError,
    DaemonUnavailable,
    LayoutChanged,
    NoRoom,
    ProtocolError,
    RankClaimed,
    Refused,
    SnapshotError,
    SnapshotGone,
    SnapshotLost,
)
from snapshotd_client.hook import Guard
from snapshotd_client.join import protect

__all__ = [
    "ConfigError",
    "DaemonUnavailable",
    "Guard",
    "LayoutChanged",
    "NoRoom",
    "ProtocolError",
    "RankClaimed",
    "Refused",
    "SnapshotError",
    "SnapshotGone",
    "SnapshotLost",
    "protect",
]
