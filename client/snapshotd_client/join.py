"""How a run enters protection: arguments checked, the node asked what it holds, the generation agreed by all ranks.

`protect` is the one collective before training besides `Guard.restore`. What one rank is refused, all raise.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import torch

from snapshotd import faults, wire
from snapshotd.clock import Clock, SystemClock
from snapshotd.config import ClientConfig, job_name, load_client_config
from snapshotd.door_client import DoorClient
from snapshotd.errors import REFUSALS, ConfigError, DaemonUnavailable, ProtocolError, Refused
from snapshotd_client.agree import Card, Peers, disagreement, next_generation, on_one_node
from snapshotd_client.copier import Session
from snapshotd_client.hook import Guard
from snapshotd_client.state import TrainingState


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
    `group_size` shape the protection between nodes and have no effect on one node.

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
    door, inventory, refusal = _take_inventory(config, name, clock)
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
    session = Session(
        name,
        next_generation(cards, clock.wall_s()),
        peers.rank,
        peers.world_size,
        tuple(local),
        every,
        parity,
        group_size,
    )
    inventories = [card.inventory for card in cards if card.inventory is not None]
    threads = config.copy_threads or max(1, min(4, len(os.sched_getaffinity(0)) // (2 * len(local))))
    return Guard(state, peers, session, config, inventories, door, clock, threads)


def _client_config(environment: Mapping[str, str], socket: str | os.PathLike[str] | None) -> ClientConfig:
    config = load_client_config(environment)
    return config if socket is None else replace(config, socket=Path(socket).expanduser().absolute())


def _take_inventory(
    config: ClientConfig, job: str, clock: Clock
) -> tuple[DoorClient | None, wire.Inventory | None, tuple[str, str]]:
    """Knock for a bounded time; the door, what the node holds of this job, and a refusal in words."""
    deadline_s, pause = clock.monotonic_s() + config.wait_s, Event()
    while True:
        try:
            door = DoorClient.connect(config.socket, timeout_s=2.0)
            door.ask(wire.Hello("trainer", os.getpid()), timeout_s=10.0)
            reply, _ = door.ask(wire.TakeInventory(job), timeout_s=120.0)
            if isinstance(reply, wire.InventoryTaken):
                return door, reply.inventory, ("", "")
            raise ProtocolError("unexpected", "the daemon answered with something else; install the same release")
        except (ProtocolError, Refused) as error:
            return None, None, (getattr(error, "kind", "protocol"), str(error))
        except DaemonUnavailable:
            if clock.monotonic_s() >= deadline_s:
                return None, None, ("", "")
            pause.wait(0.1)


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
