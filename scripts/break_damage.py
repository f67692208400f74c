"""The kinds of damage that `break.py` does to a command, and what it yields if a law is broken."""

import errno
import hashlib
import json
import os
import pwd
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from break_commands import (
    MEASURE,
    OTHERS,
    QUANTIZE,
    READS,
    RESULTS,
    TASKS,
    Action,
    Ended,
    Stage,
    Start,
    Task,
    Watch,
    end,
    result_task,
    run,
    start,
    tree,
)
from break_laws import (
    Trial,
    below,
    complaint,
    difference,
    finished_blocks,
    judge_sources,
    judge_verify,
    looks_finished,
    place_beside,
)

# --- moments ----------------------------------------------------------------------------------------------------------


def disturbed(trial: Trial, act: Callable[[int], None]) -> Ended:
    """Run the task; at a random moment `act` is called with the number of the process."""
    arguments, usual, kind = trial.task.arguments, trial.usual, trial.draw.choice(("call", "step", "step", "clock"))
    if kind == "clock":
        child = start(arguments, trial.place)
        return end(child, trial.place, (trial.draw.random() * trial.seconds, partial(act, child)))
    watch = Watch(act=lambda: act(os.getpid()))
    if kind == "call":
        watch.call = trial.draw.randint(1, usual.calls)
    else:
        watch.step = trial.draw.randint(1, usual.steps)
    return run(arguments, trial.place, Start(watch=watch))


# --- kinds of damage --------------------------------------------------------------------------------------------------


def any_task(draw: Random) -> Task:
    return TASKS[draw.choice([*QUANTIZE, *OTHERS])]


def signals(stage: Stage, place: Path, draw: Random, chosen: tuple[int, ...]) -> Iterator[str]:
    """Send a signal to a command, up to three times; then let it end."""
    trial = Trial(stage, any_task(draw), place, draw)
    for _ in range(draw.randint(1, 3)):
        number, kept = draw.choice(chosen), finished_blocks(place)
        ended = disturbed(trial, lambda process, number=number: os.kill(process, number))  # type: ignore[misc]
        yield from trial.after(ended, number)
        if finished_blocks(place) < kept and not (place / "out").exists():
            yield f"of {kept} finished blocks {finished_blocks(place)} are left"
        if (place / "out").exists() or tree(place) == trial.expected:
            break
    yield from trial.once_more()


WRITE_ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EMFILE)


def failing_call(stage: Stage, place: Path, draw: Random) -> Iterator[str]:
    """Let one call on a file fail."""
    trial = Trial(stage, any_task(draw), place, draw)

    def fail() -> None:
        code = draw.choice((errno.EIO, errno.EACCES) if watch.last in READS else WRITE_ERRORS)
        raise OSError(code, os.strerror(code))

    watch = Watch(step=draw.randint(1, trial.usual.steps), act=fail)
    ended = run(trial.task.arguments, place, Start(watch=watch))
    yield from trial.after(ended)
    yield from trial.once_more()


def full_disk(stage: Stage, place: Path, draw: Random) -> Iterator[str]:
    """Let a file system get full (as root), or files reach their largest size."""
    task = any_task(draw)
    if os.getuid():
        trial, size = Trial(stage, task, place, draw), int(10 ** draw.uniform(1, 5.5))
        ended = run(task.arguments, place, Start(partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))))
        yield from trial.after(ended)
        yield from trial.once_more()
        return
    disk = place.with_name("disk")
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "break", disk], check=True)
    try:
        trial = Trial(stage, task, disk / "place", draw)
        filler = disk / "filler"
        filler.write_bytes(bytes(max(shutil.disk_usage(disk).free - 4096 * draw.randint(0, 80), 0)))
        yield from trial.after(run(task.arguments, trial.place))
        filler.unlink()
        yield from trial.once_more()
    finally:
        subprocess.run(["umount", disk], check=True)


def few_resources(stage: Stage, place: Path, draw: Random) -> Iterator[str]:
    """Allow a command few open files, or little memory."""
    trial = Trial(stage, any_task(draw), place, draw)
    if draw.random() < 0.5:
        kind, limit = resource.RLIMIT_NOFILE, draw.randint(8, 60)
    else:
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        kind, limit = resource.RLIMIT_AS, now + draw.randint(0, 200_000_000)
    ended = run(trial.task.arguments, place, Start(partial(resource.setrlimit, kind, (limit, limit))))
    trial.kept = "could not be removed" in ended.said  # which takes descriptors; in other kinds it is a fault
    yield from trial.after(ended)
    yield from trial.once_more()


# --- an unfinished run ------------------------------------------------------------------------------------------------


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def do_after(blocks: int, act: Action = die) -> None:
    """Have this process killed when so many blocks are in the journal, or have it do something else then."""
    from gptq.pipeline.journal import Journal

    append = Journal.append

    def count(self: Journal, kind: str, content: dict[str, Any]) -> None:
        append(self, kind, content)
        if kind == "block" and len(self.find("block")) == blocks:
            act()

    Journal.append = count  # type: ignore[method-assign]


def unfinished(stage: Stage, place: Path, draw: Random) -> tuple[Trial, Path]:
    """Return a trial whose first run was killed after a block, and its working folder."""
    trial = Trial(stage, QUANTIZE[draw.choice([name for name in QUANTIZE if name != "both"])], place, draw)
    run(trial.task.arguments, place, Start(partial(do_after, draw.randint(1, 3))))
    return trial, place / "out.partial"


Lines = list[bytes]


def _some(draw: Random, lines: Lines) -> int:
    return draw.randrange(len(lines))


def change_value(tree_of: Any, draw: Random) -> None:
    """Change a value somewhere in a JSON tree."""
    keys = list(tree_of) if isinstance(tree_of, dict) else list(range(len(tree_of)))
    if not keys:
        return
    key = draw.choice(keys)
    if isinstance(tree_of[key], dict | list) and tree_of[key] and draw.random() < 0.8:
        change_value(tree_of[key], draw)
    elif draw.random() < 0.2 and isinstance(tree_of, dict):
        del tree_of[key]
    else:
        values = [None, True, -1, 0, 7, 2**70, 0.5, "", "x", "../x", [], {}, [1], {"a": 1}]
        tree_of[key] = draw.choice([value for value in values if value != tree_of[key]])


def edit_field(lines: Lines, draw: Random, signed: bool = False) -> None:
    at = _some(draw, lines)
    whole = json.loads(lines[at])
    change_value(whole["entry"] if signed else whole, draw)
    if signed:
        whole["sha256"] = hashlib.sha256(json.dumps(whole["entry"], sort_keys=True).encode()).hexdigest()
    lines[at] = json.dumps(whole).encode() + b"\n"


def cut_line(lines: Lines, draw: Random) -> None:
    at = _some(draw, lines)
    lines[at] = lines[at][: draw.randrange(len(lines[at]))]


def swap_lines(lines: Lines, draw: Random) -> None:
    a, b = _some(draw, lines), _some(draw, lines)
    lines[a], lines[b] = lines[b], lines[a]


def flip_in_line(lines: Lines, draw: Random) -> None:
    at = _some(draw, lines)
    lines[at] = flipped(lines[at], draw)


EDITS: dict[str, Callable[[Lines, Random], None]] = {
    "field": edit_field,
    "signed field": partial(edit_field, signed=True),
    "cut line": cut_line,
    "swapped": swap_lines,
    "flip": flip_in_line,
    "dropped": lambda lines, draw: lines.__delitem__(_some(draw, lines)),
    "first dropped": lambda lines, draw: lines.__delitem__(0),
    "twice": lambda lines, draw: lines.insert(_some(draw, lines), lines[_some(draw, lines)]),
    "garbage": lambda lines, draw: lines.insert(_some(draw, lines), draw.randbytes(40) + b"\n"),
    "odd line": lambda lines, draw: lines.insert(_some(draw, lines), draw.choice((b"\n", b"{}\n", b"[1]\n"))),
    "end of lines": lambda lines, draw: lines.__setitem__(slice(None), [line[:-1] + b"\r\n" for line in lines]),
    "last newline": lambda lines, draw: lines.__setitem__(-1, lines[-1][:-1]),
    "empty": lambda lines, draw: lines.clear(),
}  # fmt: skip


def journal(stage: Stage, place: Path, draw: Random) -> Iterator[str]:
    """Edit the journal of an unfinished run, which then goes on."""
    trial, working = unfinished(stage, place, draw)
    file, how = working / "journal.jsonl", draw.choice([*EDITS])
    lines = file.read_bytes().splitlines(keepends=True)
    EDITS[how](lines, draw)
    file.write_bytes(b"".join(lines))
    yield from (f"{how}: {wrong}" for wrong in go_on(trial, working, may_differ=how == "signed field"))


def go_on(trial: Trial, working: Path, may_differ: bool = False) -> Iterator[str]:
    """Go on in a damaged working folder: the right bytes come out at the end, or a sentence about the folder."""
    ended = run(trial.task.arguments, trial.place)
    if wrong := complaint(ended):
        yield wrong
    elif ended.code:
        if working.name not in ended.said:
            yield f"a sentence that does not name {working.name}: {ended.said[-300:]!r}"
        shutil.rmtree(working, ignore_errors=True)
        yield from trial.once_more()
    elif not may_differ and (wrong := difference(tree(trial.place), trial.expected)):
        yield f"went on, but {wrong}"


def working_folder(stage: Stage, place: Path, draw: Random) -> Iterator[str]:
    """Damage a file of the working folder of an unfinished run, other than the journal."""
    trial, working = unfinished(stage, place, draw)
    file = draw.choice([path for path in sorted(working.rglob("*")) if path.name != "journal.jsonl"])
    how = draw.choice([*DAMAGE]) if file.is_file() else "gone"
    DAMAGE[how](file, draw)
    yield from (f"{how}, {file.name}: {wrong}" for wrong in go_on(trial, working))


# --- damaged files ----------------------------------------------------------------------------------------------------


def flipped(content: bytes, draw: Random) -> bytes:
    """Change one bit; those of the first kilobytes come more often."""
    at = draw.randrange(min(len(content), 10 ** draw.randint(1, 6)))
    return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]


def flip(file: Path, draw: Random) -> None:
    file.write_bytes(flipped(file.read_bytes(), draw) if file.stat().st_size else b"x")


def cut(file: Path, draw: Random) -> None:
    os.truncate(file, draw.randrange(max(file.stat().st_size, 1)))


def lengthen(file: Path, draw: Random) -> None:
    with file.open("ab") as opened:
        opened.write(draw.choice((b"\0", b" ", b"\n", bytes(4096))))


def zero_out(file: Path, draw: Random) -> None:
    content = bytearray(file.read_bytes())
    begin = draw.randrange(max(len(content), 1))
    content[begin : begin + 512] = bytes(len(content[begin : begin + 512]))
    file.write_bytes(content)


def remove(file: Path, draw: Random) -> None:
    shutil.rmtree(file) if file.is_dir() else file.unlink()


def replace_by_folder(file: Path, draw: Random) -> None:
    file.unlink()
    file.mkdir()


def link_away(file: Path, draw: Random) -> None:
    file.unlink()
    file.symlink_to(draw.choice((file.name, "/dev/zero", "nothing")))


DAMAGE: dict[str, Callable[[Path, Random], None]] = {
    "flip": flip, "cut": cut, "longer": lengthen, "zeros": zero_out, "gone": remove, "folder": replace_by_folder,
    "link": link_away,
}  # fmt: skip
READERS = (
    "inspect model", "report model", f"{MEASURE} --save --card", "quantize model out --method rtn",
    *(f"convert model out --format {chosen}" for chosen in ("gptq_v2", "mlx", "gguf")),
)  # fmt: skip


def damaged_result(stage: Stage, place: Path, draw: Random) -> Iterator[str]:
    """Damage one file of a result. `verify` has to find it; other commands have to end well."""
    command = draw.choice(("verify model", "verify model", draw.choice(READERS)))
    stage.place(result_task(command, draw.choice([*RESULTS])), place)
    files = [path for path in sorted((place / "model").rglob("*")) if path.is_file()]
    file, how = draw.choice(files), draw.choice(("flip", "flip", "flip", *DAMAGE))
    before = file.read_bytes()
    DAMAGE[how](file, draw)
    ended = run(command, place)
    name = file.relative_to(place / "model").as_posix()
    if not command.startswith("verify"):
        if wrong := complaint(ended):
            yield f"{how}, {name}, {command}: {wrong}"
    elif not file.is_file() or file.read_bytes() != before:
        yield from judge_verify(ended, how, name)
    if ended.code and (left := [path.name for path in place.iterdir() if path.name.startswith("out")]):
        yield f"{how}, {name}, {command}: left over: {left}"


def changing_source(stage: Stage, place: Path, draw: Random) -> Iterator[str]:
    """Change a source while a command reads it."""
    makers = [task for task in TASKS.values() if " out" in task.arguments]
    trial = Trial(stage, draw.choice(makers), place, draw)
    how = draw.choice(("flip", "cut", "longer", "gone", "zeros", "other", "new"))
    file = draw.choice([path for name in trial.task.needs for path in sorted((place / name).iterdir())])

    def change(_: int) -> None:
        if how == "other":
            for path in file.parent.glob("*.safetensors"):
                flip(path, draw)
        elif how == "new":
            (file.parent / draw.choice(("added_tokens.json", "notes.txt"))).write_text("{}")
        else:
            DAMAGE[how](file, draw)

    changed = place_beside(trial, "changed")
    what, ended = f"{how}, {file.relative_to(place)}", disturbed(trial, change)
    yield from (f"{what}: {wrong}" for wrong in judge_sources(trial, ended, changed))
    yield from (f"{what}: {wrong}" for wrong in trial.once_more())


# --- other processes --------------------------------------------------------------------------------------------------


def together(stage: Stage, place: Path, draw: Random) -> Iterator[str]:
    """Run a command twice at the same time, in the same folder; perhaps remove the working folder meanwhile."""
    names = [name for name in TASKS if name not in ("card", "both")]
    trial = Trial(stage, TASKS[draw.choice(names)], place, draw)
    working, sweeps = place / "out.partial", draw.choice(("", "removed", "moved"))

    def sweep() -> None:
        if working.exists():
            shutil.rmtree(working, ignore_errors=True) if sweeps == "removed" else working.rename(place / "aside")

    first = start(trial.task.arguments, place)
    time.sleep(draw.random() * trial.seconds)
    if sweeps:
        sweep()
    second = start(trial.task.arguments, place)
    ends = [end(first, place), end(second, place)]
    shutil.rmtree(place / "aside", ignore_errors=True)
    yield from (f"{sweeps or 'together'}: {wrong}" for ended in ends if (wrong := complaint(ended)))
    if not sweeps and all(ended.code for ended in ends):
        yield f"neither of two succeeded: {[ended.said[-200:] for ended in ends]}"
    if looks_finished(place) and (wrong := difference(tree(place / "out"), below("out/", trial.expected))):
        yield f"{sweeps or 'together'}: out looks finished and is not: {wrong}"
    yield from (f"{sweeps or 'together'}: {wrong}" for wrong in trial.once_more())


def start_ranks(trial: Trial, count: int, watches: list[Watch | None]) -> list[int]:
    """Start a command in several processes, as torchrun does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"TORCHELASTIC_RUN_ID": "break", "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    return [start(trial.task.arguments, trial.place,
                  Start(names={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, watch=watches[rank]))
            for rank in range(count)]  # fmt: skip


def two_ranks(stage: Stage, place: Path, draw: Random) -> Iterator[str]:
    """Kill one of two processes that share a run; then the other is ended as torchrun does it."""
    names = [name for name in QUANTIZE if name != "both"]
    trial = Trial(stage, QUANTIZE[draw.choice(names)], place, draw)
    number, victim = draw.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)), draw.randrange(2)
    watch = Watch(act=lambda: os.kill(os.getpid(), number), step=draw.randint(1, trial.usual.steps))
    watches: list[Watch | None] = (
        [None, None] if draw.random() < 0.2 else [watch, None] if victim == 0 else [None, watch]
    )
    children = start_ranks(trial, 2, watches)
    ends = [end(children[victim], place)]
    dead = ends[0].code or ends[0].signal
    other = children[1 - victim]
    ends.append(end(other, place, (5.0, lambda: os.kill(other, signal.SIGTERM)) if dead else None))
    yield from (wrong for ended, sent in zip(ends, (number, 0), strict=True) if (wrong := complaint(ended, sent)))
    if not dead and (wrong := difference(tree(place), trial.expected)):
        yield f"two processes: {wrong}"
    yield from trial.once_more()


# --- surroundings -----------------------------------------------------------------------------------------------------


def as_nobody() -> None:
    if not os.getuid():
        nobody = pwd.getpwnam("nobody")
        os.setgid(nobody.pw_gid)
        os.setuid(nobody.pw_uid)


def read_only(stage: Stage, place: Path, draw: Random) -> Iterator[str]:
    """Forbid writing to a folder, or reading of a file or folder, to a user who is not root."""
    trial = Trial(stage, any_task(draw), place, draw)
    place.parent.chmod(0o755)
    everything = [place, *place.rglob("*")]
    if not os.getuid():
        nobody = pwd.getpwnam("nobody")
        for path in everything:
            os.chown(path, nobody.pw_uid, nobody.pw_gid)
    path = draw.choice([place, place, place / "model", place / "tmp", *everything])
    mode, before = draw.choice((0o555, 0o000, 0o444)) if path != place else 0o555, path.stat().st_mode
    path.chmod(mode)
    home = draw.choice(("/proc", str(place), "/nowhere"))
    names = {"HOME": home, "HF_HOME": f"{home}/hf"}
    ended = run(trial.task.arguments, place, Start(as_nobody, names=names))
    path.chmod(before)
    where = f"{mode:o} {path.relative_to(place)}"
    if wrong := complaint(ended, may_differ=trial.task.arguments.startswith("verify")):
        yield f"{where}: {wrong}"
    if not ended.code and (wrong := difference(tree(place), trial.expected)):
        yield f"{where}: {wrong}"
    if ended.code == 2 and not any(name in ended.said for name in ("/", "out", "model", "original", "text.txt")):
        yield f"{where}: a sentence that names no path: {ended.said[-300:]!r}"
    yield from (f"{where}: {wrong}" for wrong in trial.once_more())


NAMES = (
    b"caf\xe9", b"\xff\xfe", b"a b", b"a\nb", b"x" * 200, b"'\"`$(x)", b"%s{0}", b"a:b", b"#?*", b"-dash", b"a.partial",
    *(text.encode() for text in ("\u00fcber", "\u202eabc", "\ud55c\uad6d")),
)  # fmt: skip


def odd_names(stage: Stage, place: Path, draw: Random) -> Iterator[str]:
    """Give a folder or file an odd name, which perhaps the terminal cannot print."""
    task = any_task(draw)
    expected, _, _ = stage.expected(task)
    stage.place(task, place)
    arguments, name = task.arguments.split(), os.fsdecode(draw.choice(NAMES))
    for old in draw.sample(["model", "out", "text.txt"], draw.randint(1, 3)):
        new = f"{name}.txt" if old == "text.txt" else f"{name}-{old}"
        arguments = [new if part == old else part for part in arguments]
        if (place / old).exists():
            (place / old).rename(place / new)
    if any(part.startswith("-dash") for part in arguments):
        arguments = [f"./{part}" if part.startswith("-dash") else part for part in arguments]
    encoding = draw.choice(("utf-8", "ascii", "latin-1"))
    ended = run(arguments, place, Start(names={"PYTHONIOENCODING": encoding}))
    if wrong := complaint(ended):
        yield f"{name!a}, {encoding}: {wrong}"
    made = {sha for path, sha in tree(place).items() if path.endswith((".safetensors", ".gguf"))}
    if not ended.code and not made >= {sha for path, sha in expected.items() if path.endswith(".safetensors")}:
        yield f"{name!a}, {encoding}: other tensors"
    if ended.code and (left := [path.name for path in place.glob("*.partial*") if path.name not in arguments]):
        yield f"{name!a}, {encoding}: left over: {left}"


def lost_output(stage: Stage, place: Path, draw: Random) -> Iterator[str]:
    """Let the output lead to a full device, to a pipe that nobody reads, or nowhere."""
    trial = Trial(stage, any_task(draw), place, draw)
    how, arguments = (
        draw.choice(("/dev/full", "a pipe", "nowhere")),
        trial.task.arguments + draw.choice(("", " --json")),
    )
    ended = run(arguments, place, Start(output=how))
    if wrong := complaint(ended):
        yield f"{how}: {wrong}"
    if how == "a pipe" and ended.code not in (0, 141):
        yield f"{how}: exit code {ended.code}: {ended.said[-300:]!r}"
    if wrong := difference(tree(place), trial.expected):
        yield f"{how}: {wrong}"


KINDS: dict[str, Callable[[Stage, Path, Random], Iterator[str]]] = {
    "kill": partial(signals, chosen=(signal.SIGKILL,)),
    "interrupt": partial(signals, chosen=(signal.SIGINT, signal.SIGTERM)),
    "failing call": failing_call,
    "full disk": full_disk,
    "few resources": few_resources,
    "journal": journal,
    "working folder": working_folder,
    "damaged result": damaged_result,
    "changing source": changing_source,
    "together": together,
    "two ranks": two_ranks,
    "read-only": read_only,
    "odd names": odd_names,
    "lost output": lost_output,
}
