"""In-memory fault tolerance for PyTorch training: the daemon and what it shares with its trainers.

Nothing in this package imports torch; the trainer's side is `snapshotd_client`.
"""
