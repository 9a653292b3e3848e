"""How a run enters protection: arguments checked, the node asked what it holds, the generation agreed by all ranks.

`protect` is the one collective before training besides `Guard.restore`. What one rank is refused, all raise.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import torch

from snapshotd import faults, geometry, wire
from snapshotd.clock import Clock, SystemClock
from snapshotd.config import ClientConfig, job_name, load_client_config
from snapshotd.door_client import DoorClient
from snapshotd.errors import REFUSALS, ConfigError, DaemonUnavailable, ProtocolError, Refused
from snapshotd_client.agree import (
    Card,
    Elsewhere,
    Introduced,
    Peers,
    disagreement,
    grouping,
    next_generation,
    on_one_node,
    place,
    places,
)
from snapshotd_client.copier import Session
from snapshotd_client.hook import Guard
from snapshotd_client.state import TrainingState

INTRODUCED_S = 30.0
log = logging.getLogger("snapshotd")


def protect(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    *,
    job: str | None = None,
    every: int = 1,
    extra: Mapping[str, Any] | None = None,
    parity: int = 2,
    group_size: int = 8,
    socket: str | os.PathLike[str] | None = None,
) -> Guard:
    """Protect a training run. A collective: every rank calls it with the same arguments, before training.

    `optimizer` is one or a sequence; it stays yours. `extra` maps names to whatever else must come back: anything with
    `state_dict`/`load_state_dict`, and `torch.Generator`. `every` is the fewest steps between snapshots. `parity` and
    `group_size` shape the protection between nodes (any `parity` lost nodes of a group of about `group_size` can be
    rebuilt) and have no effect on one node.

    ConfigError for a wrong argument, RankClaimed where the job already runs on this node. A daemon that is absent is no
    error: training goes on unprotected, with one warning, until one answers.
    """
    optimizers = _checked_optimizers(optimizer)
    _check_arguments(every, parity, group_size)
    environment = dict(os.environ)
    config = _client_config(environment, socket)
    faults.arm(config.crash)
    clock = SystemClock()
    state = TrainingState(model, optimizers, _checked_extra(extra))
    state.host(0)  # an extra that cannot be stored is refused now, not at the first snapshot
    peers = Peers(config.gather_s)
    name = job_name(job, environment)
    door, taken, refusal = _take_inventory(config, name, clock)
    inventory = taken.inventory if taken is not None else None
    kind, sentence = refusal
    faults.crash_point("restore.inventory")
    cards = peers.gather(
        Card(
            peers.rank,
            peers.world_size,
            name,
            every,
            parity,
            group_size,
            secrets.token_bytes(16),
            inventory,
            f"{os.uname().nodename}:{config.socket}",
            kind,
            sentence,
        )
    )
    _refuse_together(cards)
    local = [card.rank for card in cards if on_one_node(card, cards[peers.rank])]
    nodes = places(cards)
    _warn_of_missing_daemons(cards, peers)
    inventories = [card.inventory for card in cards if card.inventory is not None]
    elsewhere = _elsewhere(peers, taken, inventories, first=peers.rank == local[0])
    inventories += elsewhere
    _introduce(peers, door if peers.rank == local[0] else None, name, nodes, elsewhere)
    session = Session(
        name,
        next_generation(cards, clock.wall_s()),
        peers.rank,
        peers.world_size,
        tuple(local),
        every,
        parity,
        group_size,
        nodes=tuple(nodes),
        groups=grouping(nodes, inventories, group_size, None),
    )
    _say_what_is_clipped(session, peers)
    threads = config.copy_threads or max(1, min(4, len(os.sched_getaffinity(0)) // (2 * len(local))))
    return Guard(state, peers, session, config, inventories, door, clock, threads)


def _client_config(environment: Mapping[str, str], socket: str | os.PathLike[str] | None) -> ClientConfig:
    config = load_client_config(environment)
    return config if socket is None else replace(config, socket=Path(socket).expanduser().absolute())


def _take_inventory(
    config: ClientConfig, job: str, clock: Clock
) -> tuple[DoorClient | None, wire.InventoryTaken | None, tuple[str, str]]:
    """Knock for a bounded time; the door, what is held of this job, and a refusal in words."""
    deadline_s, pause = clock.monotonic_s() + config.wait_s, Event()
    while True:
        try:
            door = DoorClient.connect(config.socket, timeout_s=2.0)
            door.ask(wire.Hello("trainer", os.getpid()), timeout_s=10.0)
            reply, _ = door.ask(wire.TakeInventory(job), timeout_s=120.0)
            if isinstance(reply, wire.InventoryTaken):
                return door, reply, ("", "")
            raise ProtocolError("unexpected", "the daemon answered with something else; install the same release")
        except (ProtocolError, Refused) as error:
            return None, None, (getattr(error, "kind", "protocol"), str(error))
        except DaemonUnavailable:
            if clock.monotonic_s() >= deadline_s:
                return None, None, ("", "")
            pause.wait(0.1)


def _elsewhere(
    peers: Peers, taken: wire.InventoryTaken | None, known: list[wire.Inventory], *, first: bool
) -> list[wire.Inventory]:
    """Inventories of nodes that left the job and still hold some of it, each once. One rank of a node tells."""
    members = {inventory.node for inventory in known}
    told = taken.peers if taken is not None and first else []
    mine = [one for one in told if one.node not in members and (one.shards or one.parities or one.arenas)]
    gathered = [one for message in peers.gather(Elsewhere(mine)) for one in message.inventories]
    return list({one.node: one for one in gathered}.values())


def _introduce(
    peers: Peers, door: DoorClient | None, job: str, nodes: list[wire.Place], elsewhere: list[wire.Inventory]
) -> None:
    """Have every daemon of the job believe all others, before any of them asks another for something.

    This is where trust comes from: who is in the process group is in the job. One rank of a node tells its daemon.
    """
    said = Introduced()
    if door is not None and (nodes or elsewhere):
        ask = wire.Introduce(job, nodes, [place(one, []) for one in elsewhere if one.address])
        try:
            door.ask(ask, timeout_s=INTRODUCED_S)
        except (ProtocolError, Refused) as error:
            said = Introduced(str(error))
        except DaemonUnavailable as error:  # training goes on, and attaching introduces once more
            log.warning("snapshotd: the daemon went away while it was told who is in the job (%s)", error)
    for rank, one in enumerate(peers.gather(said)):
        if one.refusal:
            raise Refused(f"rank {rank}: {one.refusal}")


def _warn_of_missing_daemons(cards: list[Card], peers: Peers) -> None:
    silent = [card.rank for card in cards if card.inventory is None]
    if peers.rank == 0 and silent and len(silent) < len(cards):
        log.warning(
            "snapshotd: no daemon answers rank %d (and %d more ranks): a job on several nodes is protected only if "
            "each has one, so training goes on unprotected; start `snapshotd serve` there and restart the job",
            silent[0],
            len(silent) - 1,
        )


def _say_what_is_clipped(session: Session, peers: Peers) -> None:
    smallest = min((len(group) for group in session.groups), default=0)
    if peers.rank == 0 and session.groups and session.parity > smallest - 1:
        log.warning(
            "snapshotd: parity=%d needs groups of more than %d nodes and the smallest of this job has %d: there it is "
            "%d, so that many lost nodes of that group can be rebuilt",
            session.parity,
            session.parity,
            smallest,
            geometry.parity_for(session.parity, smallest),
        )


def _refuse_together(cards: list[Card]) -> None:
    """Every rank raises the same: what one was refused, or where they differ."""
    for card in cards:
        if card.refusal_kind:
            sentence = f"rank {card.rank}: {card.refusal}"
            kind = REFUSALS.get(card.refusal_kind)
            raise kind(sentence) if kind is not None else ProtocolError(card.refusal_kind, sentence)
    difference = disagreement(cards)
    if difference:
        raise ConfigError(difference)


def _checked_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer or [])
    if not optimizers or not all(isinstance(one, torch.optim.Optimizer) for one in optimizers):
        raise ConfigError(f"optimizer must be a torch.optim.Optimizer or a sequence of them, not {optimizer!r}")
    for one in optimizers:
        for group in one.param_groups:
            if any(hasattr(parameter, "_in_backward_optimizers") for parameter in group["params"]):
                raise ConfigError(
                    "this optimizer steps inside backward (apply_optimizer_in_backward), where no moment exists at "
                    "which weights and optimizer state belong together; step it after backward() to protect this run"
                )
    return optimizers


def _checked_extra(extra: Mapping[str, Any] | None) -> Mapping[str, Any]:
    for name, one in (extra or {}).items():
        if not isinstance(name, str) or not name or "/" in name:
            raise ConfigError(f"extra has the key {name!r}; keys are names without a slash")
        stateful = callable(getattr(one, "state_dict", None)) and callable(getattr(one, "load_state_dict", None))
        if not stateful and not isinstance(one, torch.Generator):
            raise ConfigError(
                f"extra[{name!r}] is a {type(one).__name__} without state_dict() and load_state_dict(), so it "
                f"could not be brought back; give it both, or leave it out"
            )
    return extra or {}


def _check_arguments(every: Any, parity: Any, group_size: Any) -> None:
    for name, value, low, high in (
        ("every", every, 1, 2**40), ("parity", parity, 0, 254), ("group_size", group_size, 1, 255),
    ):  # fmt: skip
        if type(value) is not int or not low <= value <= high:
            raise ConfigError(f"{name} is {value!r}; it must be a whole number from {low} to {high}")
