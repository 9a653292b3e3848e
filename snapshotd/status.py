"""What a person is told: the status document, and how it reads as text. Pure functions of plain data.

`docs/status.md` describes the document.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from snapshotd import recovery
from snapshotd.budget import Room, shown
from snapshotd.wire import Inventory

VERSION = 1


@dataclass(frozen=True)
class SlotFacts:
    """One slot of an arena. `snapshot` is empty where nothing is in it, or nothing that has a name."""

    index: int
    state: str
    step: int | None
    snapshot: str
    file_bytes: int
    pins: int
    quarantine: str


@dataclass(frozen=True)
class ArenaFacts:
    """One rank's arena. `pid` is 0 and `lease_left_s` counts down where no trainer holds it."""

    arena: str
    rank: int
    held: bool
    pid: int
    passed: int
    closed: bool
    total_bytes: int
    lease_left_s: float
    slots: list[SlotFacts]


@dataclass(frozen=True)
class ParityFacts:
    """One parity set of this node."""

    arena: str
    index: int
    state: str
    step: int | None
    snapshot: str
    position: int | None
    bytes: int
    quarantine: str


@dataclass(frozen=True)
class GroupFacts:
    """Nodes that protect each other, by position. `silent` are those not heard of lately; `losses_left` is how many
    more of them may be lost (None: this node does not hear that group)."""

    nodes: list[str]
    parity: int
    silent: list[str]
    losses_left: int | None
    own: bool


@dataclass(frozen=True)
class CohortFacts:
    """The nodes of a generation on several."""

    coordinator: str
    me: str
    nodes: list[dict[str, Any]]
    groups: list[GroupFacts]
    trouble: str


@dataclass(frozen=True)
class GenerationFacts:
    """One generation of a job."""

    number: int
    nonce: str
    world_size: int
    every: int
    fenced: bool
    restored: str
    complete: bool
    committed_step: int | None
    next_step: int | None
    commits: int
    aborts: int
    abort_ratio: float
    arenas: list[ArenaFacts]
    parity: dict[str, Any]
    cohort: CohortFacts | None


@dataclass(frozen=True)
class NodeFacts:
    """The daemon itself."""

    node: str
    label: str
    version: str
    pid: int
    uptime_s: float
    socket: str
    shm_dir: str
    listen: str
    advertise: str
    streams: str
    authenticates: bool
    domain: str
    connections: int
    memory_limit_bytes: int
    used_bytes: int
    codec: dict[str, Any] = field(default_factory=dict)
    scrub: dict[str, Any] = field(default_factory=dict)


def document(
    node: NodeFacts,
    rooms: Iterable[Room],
    jobs: Mapping[str, list[GenerationFacts]],
    inventories: Mapping[str, Sequence[Inventory]],
    damaged: Iterable[str],
    counters: Mapping[str, Any],
    protections: Mapping[str, Mapping[str, Any] | None] | None = None,
) -> dict[str, Any]:
    """The whole status as JSON values. `protections` tells of jobs that wait."""
    tightest_first = [asdict(room) for room in rooms]
    return {
        "status_version": VERSION,
        **{key: value for key, value in asdict(node).items() if key not in ("memory_limit_bytes", "used_bytes")},
        "memory": {
            "limit_bytes": node.memory_limit_bytes,
            "arenas_bytes": node.used_bytes,
            "available_bytes": tightest_first[0]["available_bytes"] if tightest_first else None,
            "limits": tightest_first,
        },
        "jobs": {
            job: {
                "recoverable": _recoverable(inventories[job]),
                "protection": (protections or {}).get(job),
                "generations": [asdict(one) for one in generations],
            }
            for job, generations in sorted(jobs.items())
        },
        "damaged": list(damaged),
        "counters": dict(counters),
    }


def _recoverable(inventories: Sequence[Inventory]) -> dict[str, Any]:
    choice = recovery.choose(inventories)
    return {
        "step": choice.snapshot.step if choice.snapshot else None,
        "generation": choice.snapshot.generation.number if choice.snapshot else None,
        "lost": choice.lost,
        "why": choice.why,
    }


# --- as text -------------------------------------------------------------------------------------


def text(status: Mapping[str, Any]) -> str:
    """The status for a terminal."""
    memory = status["memory"]
    lines = [
        f"snapshotd {status['version']} on {status['label']}: pid {status['pid']}, up {duration(status['uptime_s'])}, "
        f"node {status['node'][:8]}",
        f"socket {status['socket']}, arenas in {status['shm_dir']}",
        f"memory: {shown(memory['arenas_bytes'])} in arenas, {_available(memory)}",
    ]
    lines += [
        f"codec for k={one['k']}, m={one['m']}: {one['why']}" for one in status.get("codec", {}).get("chosen", [])
    ]
    for job, facts in status["jobs"].items():
        lines += ["", *_job_lines(job, facts)]
    if not status["jobs"]:
        lines += ["", "no job has anything in memory"]
    lines += [f"! {sentence}" for sentence in [*status["damaged"], *status.get("scrub", {}).get("rotten", [])]]
    counters = status["counters"]
    lines += [
        "",
        f"since the start: {counters['commits_total']} commits, {counters['aborts_total']} aborts, "
        f"{counters['deaths_total']} trainers died, {counters['dropped_total']} connections dropped, "
        f"{counters['errors_total']} errors",
        f"scrubber: {_scrubbed(status.get('scrub', {}), counters)}",
    ]
    return "\n".join(lines)


def _scrubbed(scrub: Mapping[str, Any], counters: Mapping[str, Any]) -> str:
    if not scrub.get("bandwidth"):
        return "off"
    return (
        f"{counters['scrub_checked_total']} blocks read again, {counters['scrub_found_total']} had rotted, "
        f"{counters['scrub_repaired_total']} were repaired"
    )


def _available(memory: Mapping[str, Any]) -> str:
    if not memory["limits"]:
        return "no limit known"
    tightest = memory["limits"][0]
    return f"{shown(tightest['available_bytes'])} more before {tightest['name']} is full"


def _job_lines(job: str, facts: Mapping[str, Any]) -> list[str]:
    recoverable = facts["recoverable"]
    what = "nothing to restore" if recoverable["step"] is None else f"step {recoverable['step']} can be restored"
    lines = [f"job {job}: {'LOST' if recoverable['lost'] else what}", f"  why: {recoverable['why']}"]
    protection = facts.get("protection")
    if protection is not None:
        lines.append(f"  it waits, {protection['state']}: {protection['why']}{_made(protection)}")
    for generation in facts["generations"]:
        lines += _generation_lines(generation)
    return lines


def _made(protection: Mapping[str, Any]) -> str:
    kept = protection["foster_bytes"]
    return f" ({shown(kept)} here for that)" if kept else ""


def _generation_lines(facts: Mapping[str, Any]) -> list[str]:
    marks = ["fenced"] if facts["fenced"] else [] if facts["complete"] else ["not all ranks attached"]
    if facts["restored"]:
        marks.append(f"went on from {facts['restored']}")
    committed = "nothing" if facts["committed_step"] is None else f"step {facts['committed_step']}"
    lines = [
        f"  generation {facts['number']}-{facts['nonce'][:6]}, {facts['world_size']} ranks, committed {committed} "
        f"({facts['commits']} commits, {facts['aborts']} aborts)" + "".join(f", {mark}" for mark in marks)
    ]
    lines += [_arena_line(arena) for arena in facts["arenas"]]
    if facts["parity"]["sets"]:
        sets = ", ".join(f"{one['state']} step {one['step']}" for one in facts["parity"]["sets"])
        lines.append(f"    parity: {shown(facts['parity']['total_bytes'])} for others; {sets}")
    return lines + (_cohort_lines(facts["cohort"]) if facts["cohort"] else [])


def _cohort_lines(facts: Mapping[str, Any]) -> list[str]:
    lines = [f"    {len(facts['nodes'])} nodes, {facts['coordinator']} coordinates, this is {facts['me']}"]
    for number, group in enumerate(facts["groups"]):
        left = group["losses_left"]
        if left is None:
            losses = "not heard from here"
        elif group["parity"]:
            losses = f"{left} more lost {'node' if left == 1 else 'nodes'} can be rebuilt"
        else:
            losses = "no parity: a lost node is lost"
        silent = f"; silent: {', '.join(group['silent'])}" if group["silent"] else ""
        mine = " (ours)" if group["own"] else ""
        lines.append(
            f"    group {number}{mine}: {', '.join(group['nodes'])}; parity {group['parity']}, {losses}{silent}"
        )
    if facts["trouble"]:
        lines.append(f"    ! {facts['trouble']}")
    return lines


def _arena_line(arena: Mapping[str, Any]) -> str:
    if arena["held"]:
        holder = f"pid {arena['pid']}, at step {arena['passed']}"
    else:
        holder = f"no trainer, freed in {duration(arena['lease_left_s'])}"
    slots = ", ".join(_slot(slot) for slot in arena["slots"])
    return f"    rank {arena['rank']}: {holder}{', closed' if arena['closed'] else ''}; {slots}"


def _slot(slot: Mapping[str, Any]) -> str:
    if slot["step"] is None:
        return str(slot["state"])
    return f"{slot['state']} step {slot['step']}" + (
        f" (set aside: {slot['quarantine']})" if slot["quarantine"] else ""
    )


def duration(seconds: float) -> str:
    """A length of time as people say it."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} days"
